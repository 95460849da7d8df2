"""The settings of an endpoint picker: those of a router that mean something to it, and its own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Final
from urllib.parse import urlsplit

from eldr.router.config.endpoint import ROLES, Role, why_no_endpoint
from eldr.router.config.settings import ConfigError, RouterConfig, host_and_port
from eldr.settings import group, setting

# The address of a worker that is not known yet.
ANY: Final = "0.0.0.0"
# What a phase needs, as long as nothing else is known.
PHASE_ROLES: Final[dict[str, tuple[Role, ...]]] = {
    "decode": ("decode",), "prefill": ("prefill",), "pair": ("prefill", "decode"),
}  # fmt: skip
PHASES = tuple(PHASE_ROLES)


@dataclass
class PickerSettings:
    """Where Envoy asks, and what it is told."""

    grpc_listen: str = setting(
        "127.0.0.1:9002", "address at which Envoy asks for workers, over gRPC; port 0 takes a free one", flag=True,
        metavar="HOST:PORT", page="gateway.md#what-it-is",
    )  # fmt: skip
    phase: str = setting(
        "decode", "what a request without the header `EPP-Profile` gets: a decode or aggregated worker, a prefill "
        "worker, or a pair for llm-d's sidecar", choices=PHASES, flag=True, page="gateway.md#phases",
    )  # fmt: skip
    fallbacks: int = setting(
        1, "how many more endpoints to name, for a gateway to try where the first accepts no connection", most=16,
        flag=True, page="gateway.md#fallbacks",
    )  # fmt: skip


@dataclass
class PickerConfig(RouterConfig):
    """The settings of an endpoint picker. It sends nothing to workers but probes, and answers clients nothing."""

    without: ClassVar[frozenset[str]] = frozenset(
        (
            "api_key_file", "allowed_origins", "request_timeout_s", "prefill_timeout_s", "decode_first_byte_timeout_s",
            "decode_idle_timeout_s", "decode_answer_timeout_s", "stream_keepalive_s", "retries", "retry_ratio",
            "retry_burst", "otel_endpoint", "otel_sampling", "routed_experts_share", "processes",
        )
    )  # fmt: skip

    picker: PickerSettings = group("Endpoint picker")

    def check_workers(self) -> None:
        """Any legs will do: there may be one picker for each phase."""
        workers, listen = self.workers, self.listen
        if listen.admin_listen is None and not (workers.prefill or workers.decode or workers.worker):
            raise ConfigError(
                "no workers are given: give some as prefill, decode or worker, such as http://10.0.0.1:8000"
            )
        found = [(endpoint.url, endpoint.url) for endpoint in workers.endpoints]
        # What else is found has an address, but also the path and the ranks that it is given.
        found += [(url, urlsplit(url)._replace(netloc=ANY).geturl()) for url, _ in workers.dns_names]
        found += [(str(each), url) for each, _ in workers.kubernetes for url in each.worker_urls(ANY, 1)]
        for given, url in found:
            why = why_no_endpoint(url)
            if why is not None:
                raise ConfigError(f"{given}: {why}")
        host_and_port("grpc_listen", self.picker.grpc_listen)

    def needed_roles(self, present: Collection[Role]) -> frozenset[Role]:
        """Those that it knows: another picker may choose for the other phase."""
        known = frozenset(role for role in ROLES if self.workers.urls(role)).union(present)
        return known or frozenset(PHASE_ROLES[self.picker.phase])
