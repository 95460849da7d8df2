"""Reads the settings of one router from a TOML file and flags, and checks them before anything starts."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from eldr.errors import EldrError
from eldr.policies.options import cost_table
from eldr.router.config.endpoint import LEGS, ROLES, Role, UrlError, worker_urls
from eldr.router.config.groups import (
    ClientLimits,
    EjectionSettings,
    ExpertSettings,
    ListenSettings,
    ObserveSettings,
    PeerSettings,
    PlacementSettings,
    QueueLimits,
    RetrySettings,
    Timeouts,
    WorkerSettings,
)
from eldr.settings import SettingError, build, group


class ConfigError(EldrError):
    """A setting that cannot be used. The message names its key."""


@dataclass
class RouterConfig:
    """The settings of a router, in groups. In TOML files and flags they are flat, and `of` and `load` read that form.

    Each part of the router keeps its group. A reload changes the live settings of that group in place.
    """

    workers: WorkerSettings = group("Workers")
    placement: PlacementSettings = group("Placement")
    listen: ListenSettings = group("Listening and access")
    clients: ClientLimits = group("Limits of clients")
    queue: QueueLimits = group("Queue")
    timeouts: Timeouts = group("Timeouts of requests")
    retry: RetrySettings = group("Retries")
    ejection: EjectionSettings = group("Ejection")
    peers: PeerSettings = group("Replicas")
    experts: ExpertSettings = group("Experts of finished requests")
    observe: ObserveSettings = group("Observability")

    def check_workers(self) -> None:
        """Check that the workers that are given will do. Raises ConfigError."""
        listen, workers = self.listen, self.workers
        if listen.admin_listen is None and not (workers.prefill or workers.decode or workers.worker):
            raise ConfigError(
                "no workers are given: give aggregated ones as worker, such as http://10.0.0.1:8000, or both prefill "
                "and decode"
            )
        for leg in LEGS:
            if not workers.urls(leg) and listen.admin_listen is None and (workers.prefill or workers.decode):
                raise ConfigError(f"{leg} is empty: give at least one {leg} worker, such as http://10.0.0.1:8000")

    def needed_roles(self, present: Collection[Role]) -> frozenset[Role]:
        """The roles without which some request cannot be answered. present: those of the workers that are there.

        They are those that the settings name, and those that came by other ways. A hand-off needs both of its legs.
        """
        needed = frozenset(role for role in ROLES if self.workers.urls(role)).union(present)
        return needed if needed == {"aggregated"} else needed.union(LEGS)

    def __post_init__(self) -> None:
        """Check settings that depend on each other."""
        listen, workers = self.listen, self.workers
        self.check_workers()
        for url in workers.worker:
            if url in workers.decode:
                raise ConfigError(f"{url} is given as worker and as decode; it can have one role")
        if listen.admin_listen is not None:
            host_and_port("admin_listen", listen.admin_listen)
            if listen.admin_key_file is None:
                raise ConfigError("admin_listen needs admin_key_file: without a key, nobody could use the admin API")
        if (listen.tls_cert is None) != (listen.tls_key is None):
            raise ConfigError("tls_cert and tls_key go together: give both or neither")
        if self.experts.routed_experts_share and not self.experts.expert_geometry:
            raise ConfigError(
                "routed_experts_share needs expert_geometry, such as 48x128x8: workers do not say how many experts "
                "there are"
            )
        # With the admin API, a DNS name or Kubernetes, that worker may still join.
        named = (*workers.dns_names, *workers.kubernetes)
        if listen.admin_listen is None and not any(role != "prefill" for _, role in named):
            known = (*workers.decode, *workers.worker)
            for url in self.placement.options.worker_costs:
                if url not in known:
                    raise ConfigError(
                        f"worker_costs names {url}, which is not one of the workers that decode: {', '.join(known)}"
                    )

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """Make a configuration from flat settings, as files and flags give them. Raises ConfigError."""
        try:
            if "worker_costs" in settings:
                settings["worker_costs"] = _costs_of_urls(settings["worker_costs"])
            return build(cls, settings)
        except ConfigError:
            raise
        except EldrError as error:
            raise ConfigError(str(error)) from None

    @classmethod
    def load(cls, path: Path | None, overrides: Mapping[str, Any]) -> Self:
        """Read a TOML file, if one is given. `overrides` (the flags) win over its keys. Raises ConfigError."""
        try:
            return cls.of(**{**({} if path is None else _read_toml(path)), **overrides})
        except ConfigError as error:
            raise error if path is None else ConfigError(f"{path}: {error}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (OSError, ValueError, RecursionError) as error:  # overlong numbers and deep nesting included
        raise ConfigError(f"cannot be read as TOML: {error}") from None


def _costs_of_urls(value: Any) -> dict[str, str]:
    """The table of worker_costs, with the URLs in the normal form that identifies workers."""
    costs: dict[str, str] = {}
    for text, cost in cost_table("worker_costs", value).items():
        try:
            costs |= dict.fromkeys(worker_urls(text), cost)
        except UrlError as error:
            raise SettingError(f"worker_costs: {error}") from None
    return costs


def read_key(path: Path) -> bytes:
    """The key in a one-line file. Raises ConfigError if there is none, or if it does not fit into a header."""
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{path}: the key cannot be read: {error.strerror}") from None
    if not key or any(byte <= 0x20 or byte >= 0x7F for byte in key):
        raise ConfigError(f"{path}: expected one line with a key of visible ASCII characters")
    return key


def host_and_port(key: str, value: str) -> tuple[str, int]:
    """Split HOST:PORT. An IPv6 host is given in brackets. Raises ConfigError."""
    host, _, port = value.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535 or (":" in host and host[0] != "["):
        raise ConfigError(f"{key} is {value!r}, expected HOST:PORT such as 127.0.0.1:8001")
    return host.strip("[]"), int(port)
