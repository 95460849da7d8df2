"""Everything that can be set about a router, from flags or a TOML file, checked before anything starts."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eldr.cost import DEFAULT_PRESET
from eldr.errors import EldrError
from eldr.policies import PolicyOptions
from eldr.policies.expected_union import ANCHOR, TAIL_GUARD
from eldr.policies.options import OPTION_NAMES, REFIT_WINDOW_S
from eldr.router.config.endpoint import ROLES, Endpoint, Endpoints, Role, UrlError, worker_urls

# In front of a worker's URL: its host is a name with several addresses, each of which is a worker.
DNS = "dns+"
LOG_LEVELS = ("debug", "info", "warning", "error")
PATHS = (
    "calibration", "decision_log",
    "worker_api_key_file", "worker_ca", "api_key_file", "tls_cert", "tls_key", "admin_key_file"
)  # fmt: skip
DURATIONS = (
    "queue_timeout_s", "load_interval_s",
    "dns_interval_s", "health_interval_s", "health_timeout_s", "connect_timeout_s", "prefill_timeout_s",
    "decode_first_byte_timeout_s", "decode_idle_timeout_s", "decode_answer_timeout_s", "request_timeout_s",
    "eject_base_s", "eject_max_s",
    "head_timeout_s", "body_timeout_s", "idle_timeout_s", "stall_timeout_s",
)  # fmt: skip


class ConfigError(EldrError):
    """A setting that cannot be used; the message names its key."""


@dataclass(kw_only=True)
class RouterConfig:
    """The settings of a router. In a TOML file they are top-level keys of the same names.

    prefill, decode: URLs of the workers, http or https; dns+http://NAME:PORT for one worker per address of a name,
        #dp=N after a URL for its N data-parallel engines.
    model: name that every worker must serve; by default a worker must share a name with those already there.
    policy: name of the decode policy; calibration: file written by `eldr fit`, needed by locality-band.
    tau ... expert_parallel: as in eldr.policies.options.PolicyOptions; cost is a preset or a file, worker_costs the
        same of single decode workers, URL -> preset or file.
    max_inflight: most requests in flight at each decode worker; less where the worker says that requests wait in it.
        What exceeds it queues in the router.
    max_streams: most requests past the queue at once. max_queued: most waiting requests of each priority.
    queue_timeout_s: longest wait in the queue. client_header: the header whose value tells clients apart there,
        by default their API keys.
    worker_wait_s: how long requests wait for a role whose last worker went, counted from then; 0 refuses them at once.
    load_interval_s: time between two looks at a worker's metrics, varied by a fifth either way.
    worker_api_key_file: file with the key that workers ask for; it replaces the client's Authorization.
    worker_ca: PEM certificates that https workers are checked against, the system's if not given.
    api_key_file: file with the keys that clients must have, one a line; without it everybody may ask.
    tls_cert, tls_key: PEM files with the certificate chain and key shown to clients; without them plain HTTP.
    admin_key_file: file with the key that recording and the admin API ask for; without it nobody may use either.
    admin_listen: HOST:PORT of the admin API, which needs admin_key_file; off by default.
    dns_interval_s: time between two resolutions of a dns+ name, varied by a fifth either way.
    drain_timeout_s: how long running requests of a worker that leaves may finish.
    decision_log: file to append every decision to; it is reopened on SIGHUP.
    prefix_window_bytes: how much of the prompt decides the prefill worker; for chat it starts after the system
        messages.
    max_body_bytes: largest request body taken.
    max_connections: most client connections at once.
    head_timeout_s, body_timeout_s: within which a request's head, and then its body, must arrive.
    idle_timeout_s: how long a connection may wait for its next request.
    stall_timeout_s: how long a client may leave an answer unread.
    health_interval_s: time between two probes of a worker, varied by a fifth either way.
    connect_timeout_s: longest wait for a connection to a worker.
    prefill_timeout_s: longest wait for the answer of a prefill worker.
    decode_first_byte_timeout_s: longest wait for the first event of a stream, from the decode request on.
    decode_idle_timeout_s: longest silence of a decode worker within a stream.
    decode_answer_timeout_s: longest wait for a decode worker's answer that is not streamed.
    request_timeout_s: longest life of a request, queue and retries included.
    health_timeout_s: longest wait for the answer to a probe.
    retries: most retries of one request, refused connections aside. retry_ratio: most retries per request of all, in
        the long run; retry_burst: how many more at once.
    eject_failures: failures in a row that eject a worker; eject_rate: share of its latest requests that does.
    eject_base_s, eject_max_s: duration of a first ejection, doubled by each further one, and of the longest.
    eject_share: largest share of a role's workers that is ejected at once; 0 ejects nobody.
    grace_s: how long running requests may finish after SIGTERM.
    otel_endpoint: where the spans of sampled requests go, as OTLP over HTTP, such as http://collector:4318/v1/traces.
    otel_sampling: share of the requests sampled that bring no trace context of their own.
    """

    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()
    model: str | None = None
    policy: str = "jsq"
    calibration: Path | None = None
    tau: float = 0.1
    two_nearest: bool = True
    refit_interval_s: float = float("inf")
    refit_window_s: float = REFIT_WINDOW_S
    cost: str = DEFAULT_PRESET
    cost_scope: str = "step"
    worker_costs: Mapping[str, str] = field(default_factory=dict)
    others_weight: float = 1.0
    anchor: float = ANCHOR
    tail_guard: float = TAIL_GUARD
    step_tokens: float = 1.0
    expert_parallel: int = 1
    seed: int = 0
    host: str = "127.0.0.1"
    port: int = 8000
    max_inflight: int = 256
    max_streams: int = 16384
    max_queued: int = 1024
    queue_timeout_s: float = 60.0
    worker_wait_s: float = 10.0
    client_header: str | None = None
    load_interval_s: float = 2.0
    worker_api_key_file: Path | None = None
    worker_ca: Path | None = None
    api_key_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    admin_key_file: Path | None = None
    admin_listen: str | None = None
    decision_log: Path | None = None
    prefix_window_bytes: int = 1024
    max_body_bytes: int = 32 * 1024 * 1024
    max_connections: int = 16384
    head_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    idle_timeout_s: float = 75.0
    stall_timeout_s: float = 120.0
    health_interval_s: float = 2.0
    connect_timeout_s: float = 2.0
    prefill_timeout_s: float = 300.0
    decode_first_byte_timeout_s: float = 120.0
    decode_idle_timeout_s: float = 120.0
    decode_answer_timeout_s: float = 600.0
    request_timeout_s: float = 3600.0
    health_timeout_s: float = 5.0
    retries: int = 2
    retry_ratio: float = 0.2
    retry_burst: int = 500
    eject_failures: int = 5
    eject_rate: float = 0.5
    eject_base_s: float = 5.0
    eject_max_s: float = 300.0
    eject_share: float = 0.5
    dns_interval_s: float = 10.0
    drain_timeout_s: float = 300.0
    grace_s: float = 30.0
    otel_endpoint: str | None = None
    otel_sampling: float = 0.01
    log_level: str = "warning"

    def __post_init__(self) -> None:
        for role in ROLES:
            setattr(self, role, _urls(role, getattr(self, role)))
            if not getattr(self, role) and self.admin_listen is None:
                raise ConfigError(f"{role} is empty: give at least one {role} worker, such as http://10.0.0.1:8000")
        for key in ("policy", "host"):
            _text(key, getattr(self, key))
        for key in ("model", "otel_endpoint", "admin_listen", "client_header"):
            if getattr(self, key) is not None:
                _text(key, getattr(self, key))
        if self.admin_listen is not None:
            host_and_port("admin_listen", self.admin_listen)
            if self.admin_key_file is None:
                raise ConfigError("admin_listen needs admin_key_file: the admin API has no user without a key")
        for key in PATHS:
            setattr(self, key, _path(key, getattr(self, key)))
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key go together: give both or neither")
        for key in ("tau", "others_weight", "anchor"):
            _number(key, getattr(self, key), 0.0)
        _number("step_tokens", self.step_tokens, 1.0)
        _whole("expert_parallel", self.expert_parallel, 1, 1024)
        for key in ("tail_guard", "refit_interval_s"):
            if getattr(self, key) != float("inf"):
                _number(key, getattr(self, key), 0.0)
        _number("refit_window_s", self.refit_window_s, 0.0)
        for key in ("cost", "cost_scope"):
            _text(key, getattr(self, key))
        static = self.admin_listen is None and not any(url.startswith(DNS) for url in self.decode)
        self.worker_costs = _worker_costs(self.worker_costs, self.decode, static)
        if type(self.two_nearest) is not bool:
            raise ConfigError(f"two_nearest is {self.two_nearest!r}, expected true or false")
        _whole("seed", self.seed, 0, 2**63 - 1)
        _whole("port", self.port, 0, 65535)
        for key in ("max_inflight", "max_streams"):
            _whole(key, getattr(self, key), 1, 2**31)
        _whole("max_queued", self.max_queued, 0, 2**31)
        _whole("prefix_window_bytes", self.prefix_window_bytes, 1, 2**31)
        _whole("max_body_bytes", self.max_body_bytes, 1, 2**31)
        _whole("max_connections", self.max_connections, 1, 2**31)
        for key in DURATIONS:
            _number(key, getattr(self, key), 0.01)
        for key in ("worker_wait_s", "drain_timeout_s", "grace_s", "retry_ratio", "eject_rate", "eject_share"):
            _number(key, getattr(self, key), 0.0)
        for key in ("retries", "retry_burst"):
            _whole(key, getattr(self, key), 0, 2**31)
        _whole("eject_failures", self.eject_failures, 1, 2**31)
        if self.eject_share > 1:
            raise ConfigError(f"eject_share is {self.eject_share!r}, expected a share of at most 1")
        _number("otel_sampling", self.otel_sampling, 0.0)
        if self.otel_sampling > 1:
            raise ConfigError(f"otel_sampling is {self.otel_sampling}, expected a share from 0 to 1")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"log_level is {self.log_level!r}, expected one of {', '.join(LOG_LEVELS)}")

    def policy_options(self) -> PolicyOptions:
        """The options of policies. Raises CostError or PolicyError for a cost or an option that cannot be used."""
        return PolicyOptions.from_settings({name: getattr(self, name) for name in OPTION_NAMES})

    @property
    def endpoints(self) -> Endpoints:
        """The workers given by their own URLs."""
        return frozenset(Endpoint(url, role) for role in ROLES for url in getattr(self, role) if url[:4] != DNS)

    @property
    def dns_names(self) -> list[tuple[str, Role]]:
        """The URLs whose hosts are to be resolved, without dns+, and their roles."""
        return [(url[4:], role) for role in ROLES for url in getattr(self, role) if url[:4] == DNS]

    @classmethod
    def load(cls, path: Path | None, overrides: Mapping[str, Any]) -> RouterConfig:
        """Settings from a TOML file, if one is given; `overrides` (flags) replace its keys. Raises ConfigError."""
        try:
            return cls(**{**({} if path is None else _read_toml(path)), **overrides})
        except ConfigError as error:
            raise error if path is None else ConfigError(f"{path}: {error}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read as TOML: {error}") from None
    known = {field.name for field in dataclasses.fields(RouterConfig)}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ConfigError(f"unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
    return values


def read_key(path: Path) -> bytes:
    """The key in a one-line file. Raises ConfigError if there is none or it cannot stand in a header."""
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{path}: the key cannot be read: {error.strerror}") from None
    if not key or any(byte <= 0x20 or byte >= 0x7F for byte in key):
        raise ConfigError(f"{path}: expected one line with a key of visible ASCII characters")
    return key


def _urls(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(url, str) for url in value):
        raise ConfigError(f"{key} is {value!r}, expected a list of URLs")
    urls: list[str] = []
    for text in value:
        try:
            urls += [DNS + _dns_url(text)] if text.startswith(DNS) else worker_urls(text)
        except UrlError as error:
            raise ConfigError(f"{key}: {error}") from None
    for url in urls:
        if urls.count(url) > 1:
            raise ConfigError(f"{key} names {url} twice")
    return tuple(urls)


def _dns_url(text: str) -> str:
    url = text.removeprefix(DNS)
    if not url.startswith("http://") or "#" in url:
        # A certificate names a host; what is found behind the name are addresses.
        raise UrlError(f"{text!r}: expected dns+http://NAME:PORT")
    return worker_urls(url)[0]


def host_and_port(key: str, value: str) -> tuple[str, int]:
    """HOST:PORT in two parts; an IPv6 host stands in brackets. Raises ConfigError."""
    host, _, port = value.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535 or (":" in host and host[0] != "["):
        raise ConfigError(f"{key} is {value!r}, expected HOST:PORT such as 127.0.0.1:8001")
    return host.strip("[]"), int(port)


def _worker_costs(value: Any, decode: tuple[str, ...], static: bool) -> dict[str, str]:
    """URL -> cost. From a file it is a table, from flags a list of pairs. static: no other worker can ever join."""
    if not isinstance(value, dict | list):
        raise ConfigError(f"worker_costs is {value!r}, expected a table: URL of a decode worker = cost file or preset")
    costs: dict[str, str] = {}
    for text, cost in dict(value).items():
        try:
            urls = worker_urls(text)
        except UrlError as error:
            raise ConfigError(f"worker_costs: {error}") from None
        for url in urls:
            if static and url not in decode:
                raise ConfigError(f"worker_costs names {url}, which is no decode worker; there are {', '.join(decode)}")
            _text(f"worker_costs of {url}", cost)
            costs[url] = cost
    return costs


def _path(key: str, value: Any) -> Path | None:
    if value is None or isinstance(value, Path):
        return value
    _text(key, value)
    return Path(value)


def _text(key: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key} is {value!r}, expected text")


def _whole(key: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{key} is {value!r}, expected a whole number from {least} to {most}")


def _number(key: str, value: Any, least: float) -> None:
    if type(value) not in (int, float) or not least <= value < float("inf"):
        raise ConfigError(f"{key} is {value!r}, expected a number of at least {least}")
