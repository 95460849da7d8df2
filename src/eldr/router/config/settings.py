"""The settings of one router, from a TOML file and flags, checked before anything starts."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eldr.errors import EldrError
from eldr.policies.options import cost_table
from eldr.router.config.endpoint import ROLES, UrlError, worker_urls
from eldr.router.config.groups import (
    ClientLimits,
    EjectionSettings,
    ListenSettings,
    ObserveSettings,
    PlacementSettings,
    QueueLimits,
    RetrySettings,
    Timeouts,
    WorkerSettings,
)
from eldr.settings import SettingError, build, group


class ConfigError(EldrError):
    """A setting that cannot be used; the message names its key."""


@dataclass
class RouterConfig:
    """The settings of a router, in groups. A TOML file and flags have them flat: `of` and `load` read those.

    Parts of the router keep the group that they work with. A reload changes its live settings in place.
    """

    workers: WorkerSettings = group("Workers")
    placement: PlacementSettings = group("Placement")
    listen: ListenSettings = group("Listening and access")
    clients: ClientLimits = group("Limits of clients")
    queue: QueueLimits = group("Queue")
    timeouts: Timeouts = group("Timeouts of requests")
    retry: RetrySettings = group("Retries")
    ejection: EjectionSettings = group("Ejection")
    observe: ObserveSettings = group("Observability")

    def __post_init__(self) -> None:
        """The checks that concern more than one setting."""
        listen = self.listen
        for role in ROLES:
            if not getattr(self.workers, role) and listen.admin_listen is None:
                raise ConfigError(f"{role} is empty: give at least one {role} worker, such as http://10.0.0.1:8000")
        if listen.admin_listen is not None:
            host_and_port("admin_listen", listen.admin_listen)
            if listen.admin_key_file is None:
                raise ConfigError("admin_listen needs admin_key_file: the admin API has no user without a key")
        if (listen.tls_cert is None) != (listen.tls_key is None):
            raise ConfigError("tls_cert and tls_key go together: give both or neither")
        # Through the admin API or a name any worker may still come.
        if listen.admin_listen is None and not any(role == "decode" for _, role in self.workers.dns_names):
            for url in self.placement.options.worker_costs:
                if url not in self.workers.decode:
                    known = ", ".join(self.workers.decode)
                    raise ConfigError(f"worker_costs names {url}, which is no decode worker; there are {known}")

    @classmethod
    def of(cls, **settings: Any) -> RouterConfig:
        """From flat settings, in the form that files and flags have them in. Raises ConfigError."""
        try:
            if "worker_costs" in settings:
                settings["worker_costs"] = _costs_of_urls(settings["worker_costs"])
            return build(cls, settings)
        except ConfigError:
            raise
        except EldrError as error:
            raise ConfigError(str(error)) from None

    @classmethod
    def load(cls, path: Path | None, overrides: Mapping[str, Any]) -> RouterConfig:
        """Settings from a TOML file, if one is given; `overrides` (flags) replace its keys. Raises ConfigError."""
        try:
            return cls.of(**{**({} if path is None else _read_toml(path)), **overrides})
        except ConfigError as error:
            raise error if path is None else ConfigError(f"{path}: {error}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (OSError, ValueError, RecursionError) as error:  # also of numbers too long and lists too deep
        raise ConfigError(f"cannot be read as TOML: {error}") from None


def _costs_of_urls(value: Any) -> dict[str, str]:
    """The table of worker_costs, by the URLs that are the identity of workers."""
    costs: dict[str, str] = {}
    for text, cost in cost_table("worker_costs", value).items():
        try:
            costs |= dict.fromkeys(worker_urls(text), cost)
        except UrlError as error:
            raise SettingError(f"worker_costs: {error}") from None
    return costs


def read_key(path: Path) -> bytes:
    """The key in a one-line file. Raises ConfigError if there is none or it cannot stand in a header."""
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{path}: the key cannot be read: {error.strerror}") from None
    if not key or any(byte <= 0x20 or byte >= 0x7F for byte in key):
        raise ConfigError(f"{path}: expected one line with a key of visible ASCII characters")
    return key


def host_and_port(key: str, value: str) -> tuple[str, int]:
    """HOST:PORT in two parts; an IPv6 host stands in brackets. Raises ConfigError."""
    host, _, port = value.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535 or (":" in host and host[0] != "["):
        raise ConfigError(f"{key} is {value!r}, expected HOST:PORT such as 127.0.0.1:8001")
    return host.strip("[]"), int(port)
