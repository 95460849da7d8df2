"""The settings of a router, each declared once, in groups. Each part of the router works with one group."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from eldr.counts import CountsError
from eldr.policies import POLICY_NAMES, PolicyOptions
from eldr.routed_experts import parse_geometry
from eldr.router.config.endpoint import ROLES, Endpoint, Endpoints, Role, UrlError, worker_url, worker_urls
from eldr.router.config.kubernetes import KUBERNETES, KubernetesAddress, kubernetes_address
from eldr.settings import SettingError, group, setting

# The prefix of a URL whose host is a DNS name. Each address of the name is a worker.
DNS = "dns+"
# The ports that browsers leave out of an origin.
OWN_PORTS = {"http": "80", "https": "443"}
ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[a-z0-9._-]+|\[[0-9a-f:.]+\])(:(?P<port>[0-9]{1,5}))?")
# A part of a subject of NATS.
FLEET = re.compile(r"[A-Za-z0-9_-]{1,64}")
ENGINES = ("vllm", "sglang")
LOG_LEVELS = ("debug", "info", "warning", "error")
# The smallest time limit allowed. A smaller one can only be a mistake.
LEAST_S = 0.01


def _urls(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(url, str) for url in value):
        raise SettingError(f"{key} is {value!r}, expected a list of URLs")
    urls: list[str] = []
    for text in value:
        try:
            urls += _normal(text)
        except UrlError as error:
            raise SettingError(f"{key}: {error}") from None
    for url in urls:
        if urls.count(url) > 1:
            raise SettingError(f"{key} names {url} twice")
    return tuple(urls)


def _normal(text: str) -> tuple[str, ...]:
    """The normal forms of what one text stands for. Raises UrlError."""
    if text.startswith(DNS):
        return (DNS + _dns_url(text),)
    return (str(kubernetes_address(text)),) if text.startswith(KUBERNETES) else worker_urls(text)


def _dns_url(text: str) -> str:
    url = text.removeprefix(DNS)
    if not url.startswith("http://") or "#" in url:
        # No https: a certificate names a host, but the name resolves to bare addresses.
        raise UrlError(f"{text!r}: expected dns+http://NAME:PORT, with or without a path")
    return worker_urls(url)[0]


def _api_url(key: str, value: Any) -> str | None:
    if value is None:
        return None
    try:
        url = worker_url(value) if isinstance(value, str) and "#" not in value else ""
    except UrlError:
        url = ""
    if not url:
        raise SettingError(f"{key} is {value!r}, expected a URL such as https://10.0.0.1:6443")
    return url


def _origins(key: str, value: Any) -> tuple[str, ...]:
    """Origins in the form that browsers send: in lower case, and without the scheme's own port."""
    if not isinstance(value, list | tuple) or not all(isinstance(origin, str) for origin in value):
        raise SettingError(f"{key} is {value!r}, expected a list of origins")
    origins: list[str] = []
    for text in value:
        parts = ORIGIN.fullmatch(text.lower())
        if parts is None and text != "*":
            raise SettingError(
                f"{key}: {text!r} is no origin, expected SCHEME://HOST or SCHEME://HOST:PORT without a path, "
                "such as https://app.example, or * for all"
            )
        if parts is not None and parts["port"] == OWN_PORTS.get(parts["scheme"]):
            origins.append(f"{parts['scheme']}://{parts['host']}")
        else:
            origins.append(text.lower())
    return tuple(dict.fromkeys(origins))


def _nats_urls(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(url, str) for url in value):
        raise SettingError(f"{key} is not a list of URLs of NATS servers")
    for text in value:
        try:
            parts = urlsplit(text)
            valid = parts.scheme in ("nats", "tls") and parts.hostname and parts.port != 0
        except ValueError:
            valid = False
        if not valid or parts.path or parts.query or parts.fragment or not text.isprintable():
            # The URL may have a password, so it is not repeated.
            raise SettingError(f"{key} has an entry that is not nats://HOST:PORT or tls://HOST:PORT")
    return tuple(value)


def _fleet_name(key: str, value: Any) -> str:
    if not isinstance(value, str) or FLEET.fullmatch(value) is None:
        raise SettingError(f"{key} is {value!r}, expected up to 64 letters, digits, - and _")
    return value


def _geometries(key: str, value: Any) -> dict[str, tuple[int, int, int]]:
    """Model -> MoE layers, experts and top-k, with an empty name for those given alone."""
    if isinstance(value, str):
        value = {"": value}
    if value and isinstance(value, list) and all(isinstance(pair, tuple) for pair in value):  # flags
        value = dict(value)
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for text in value.values()):
        raise SettingError(f"{key} is {value!r}, expected LAYERSxEXPERTSxTOP_K, or a table: model = such a text")
    try:
        return {model: parse_geometry(text) for model, text in value.items()}
    except CountsError as error:
        raise SettingError(f"{key}: {error}") from None


def _calibrations(key: str, value: Any) -> dict[str, Path]:
    """Model -> file, with an empty name for a file that is given alone."""
    if isinstance(value, str | Path):
        value = {"": value}
    if value and isinstance(value, list) and all(isinstance(pair, tuple) for pair in value):  # flags
        value = dict(value)
    if not isinstance(value, Mapping) or not all(isinstance(path, str | Path) and str(path) for path in value.values()):
        raise SettingError(f"{key} is {value!r}, expected a file, or a table: model = file")
    return {model: Path(path) for model, path in value.items()}


@dataclass
class WorkerSettings:
    """The workers, and how the router watches them."""

    prefill: tuple[str, ...] = setting(
        (), "URL of a prefill worker, or an address of several: `dns+`, `k8s+`", parse=_urls, flag=True, metavar="URL",
        live=True, page="fleet.md#where-workers-come-from",
    )  # fmt: skip
    decode: tuple[str, ...] = setting(
        (), "URL of a decode worker, or an address of several", parse=_urls, flag=True, metavar="URL",
        live=True, page="fleet.md#where-workers-come-from",
    )  # fmt: skip
    worker: tuple[str, ...] = setting(
        (), "URL of an aggregated worker, which does both; or an address of several", parse=_urls, flag=True,
        metavar="URL", live=True, page="fleet.md#aggregated-workers",
    )  # fmt: skip
    engine: str = setting("vllm", "what the workers run", choices=ENGINES, flag=True, metavar="NAME", page="sglang.md")
    model: str | None = setting(
        None, "a model name that every worker must serve; others get no requests", live=True,
        shown="workers may serve different models", page="fleet.md#several-models",
    )  # fmt: skip
    max_inflight: int = setting(
        256,
        "most requests at a decode or aggregated worker (vLLM's `--max-num-seqs`); lower while requests wait inside it",
        least=1, flag=True, live=True, page="fleet.md#load-limits-per-worker",
    )  # fmt: skip
    worker_api_key_file: Path | None = setting(
        None, "file with the workers' API key; it replaces the client's `Authorization`", flag=True
    )
    worker_ca: Path | None = setting(
        None, "PEM file of the CAs that https workers are checked against", flag=True, shown="the system's"
    )
    connect_timeout_s: float = setting(2.0, "longest wait until a connection to a worker is made", least=LEAST_S)
    health_interval_s: float = setting(
        2.0, "time between two probes of a worker, varied at random by a fifth", least=LEAST_S,
        page="faults.md#probes-and-ejection",
    )  # fmt: skip
    health_timeout_s: float = setting(5.0, "longest wait for the answer to a probe", least=LEAST_S)
    load_interval_s: float = setting(2.0, "time between two readings of a worker's metrics", least=LEAST_S)
    dns_interval_s: float = setting(10.0, "time between two resolutions of a `dns+` name", least=LEAST_S)
    kubernetes_api: str | None = setting(
        None, "address of the Kubernetes API for `k8s+` addresses, such as that of `kubectl proxy`", parse=_api_url,
        shown="the cluster's that the router runs in", page="fleet.md#kubernetes",
    )  # fmt: skip
    kubernetes_account: Path | None = setting(
        None, "directory of a mounted service account: `token`, `ca.crt` and `namespace`",
        shown="/var/run/secrets/kubernetes.io/serviceaccount",
    )  # fmt: skip
    kubernetes_relist_s: float = setting(
        30.0, "time between two full lists of what is watched in Kubernetes, varied at random by a fifth", least=LEAST_S
    )
    drain_timeout_s: float = setting(300.0, "how long a worker that leaves may take to finish its requests", live=True)

    def urls(self, role: Role) -> tuple[str, ...]:
        """The URLs given for a role, as they are given."""
        return self.prefill if role == "prefill" else self.decode if role == "decode" else self.worker

    @property
    def endpoints(self) -> Endpoints:
        """The workers given by their own URLs."""
        return frozenset(
            Endpoint(url, role) for role in ROLES for url in self.urls(role) if not url.startswith((DNS, KUBERNETES))
        )

    @property
    def dns_names(self) -> list[tuple[str, Role]]:
        """The URLs whose hosts are resolved through DNS, without dns+, and their roles."""
        return [(url.removeprefix(DNS), role) for role in ROLES for url in self.urls(role) if url.startswith(DNS)]

    @property
    def kubernetes(self) -> list[tuple[KubernetesAddress, Role]]:
        """The addresses of pods, and their roles."""
        return [
            (kubernetes_address(url), role) for role in ROLES for url in self.urls(role) if url.startswith(KUBERNETES)
        ]


@dataclass(kw_only=True)
class PlacementSettings:
    """How the router chooses the workers of a request."""

    policy: str = setting(
        "jsq", f"how a decode or aggregated worker is chosen: {', '.join(POLICY_NAMES)}", flag=True, metavar="NAME",
        page="policies.md",
    )  # fmt: skip
    calibration: Mapping[str, Path] = setting(
        {}, "file that `eldr fit` made, for one model or for all that have no other; locality-band needs one",
        parse=_calibrations, flag=True, metavar="[MODEL=]FILE", page="fleet.md#several-models",
    )  # fmt: skip
    learn: str = setting(
        "online", "whether to learn from finished requests which experts prompts lead to", flag=True,
        choices=("off", "online"), page="prompt.md#learning-while-serving",
    )  # fmt: skip
    learned_dir: Path | None = setting(
        None, "directory in which what was learned is kept over restarts, in one file for each model", flag=True,
        shown="nothing is kept", page="prompt.md#learning-while-serving",
    )  # fmt: skip
    learn_costs: str = setting(
        "online", "whether to learn from the workers' metrics how long the steps of each take; only for policies with "
        "step times: expected-union and jsq-speed", flag=True, choices=("off", "online"),
        page="policies.md#unequal-workers",
    )  # fmt: skip
    seed: int = setting(0, "seed of random choices and ties", most=2**63 - 1, flag=True)
    prefix_window_bytes: int = setting(
        1024, "how much of a prompt decides its prefill worker", least=1, page="router.md#how-a-request-is-served"
    )
    options: PolicyOptions = group()

    def calibration_of(self, models: Iterable[str]) -> Path | None:
        """The calibration of a model with these names. None if there is none."""
        return next((self.calibration[name] for name in (*models, "") if name in self.calibration), None)


@dataclass
class ListenSettings:
    """Where the router listens, and who may use it."""

    host: str = setting("127.0.0.1", "address to listen on", flag=True)
    port: int = setting(8000, "port to listen on; 0 takes a free one", most=65535, flag=True)
    processes: int = setting(
        1, "how many processes serve as one router, about one for each core", least=1, most=256, flag=True,
        page="peers.md#many-processes-on-one-machine",
    )  # fmt: skip
    api_key_file: Path | None = setting(
        None, "file with the API keys that clients may use, one a line", flag=True, shown="no key needed",
        page="security.md#api-keys",
    )  # fmt: skip
    client_header: str | None = setting(
        None, "header that tells clients apart in the queue", shown="the API key", page="fleet.md#queueing"
    )
    allowed_origins: tuple[str, ...] = setting(
        (), "origin whose pages may use the API in a browser, such as https://app.example; * for all", parse=_origins,
        flag=True, metavar="ORIGIN", live=True, shown="none", page="security.md#browsers",
    )  # fmt: skip
    tls_cert: Path | None = setting(None, "certificate chain shown to clients, PEM", flag=True, shown="plain HTTP")
    tls_key: Path | None = setting(None, "private key of `tls_cert`, PEM", flag=True)
    admin_listen: str | None = setting(
        None, "address of the admin API, which needs `admin_key_file`", flag=True, metavar="HOST:PORT", shown="off",
        page="fleet.md#admin-api",
    )  # fmt: skip
    admin_key_file: Path | None = setting(
        None, "file with the key for recording and the admin API", flag=True, shown="neither can be used"
    )


@dataclass
class ClientLimits:
    """How much one client may use, and how much all of them together."""

    max_body_bytes: int = setting(
        32 * 1024 * 1024, "largest request body", least=1, page="security.md#what-a-client-can-take-up"
    )
    max_bodies_bytes: int = setting(
        1024 * 1024 * 1024, "most memory for the bodies of requests and answers, all together", least=1, live=True,
        page="security.md#memory-in-sum",
    )  # fmt: skip
    max_connections: int = setting(16384, "most client connections at once", least=1)
    head_timeout_s: float = setting(10.0, "longest time that the head of a request may take to arrive", least=LEAST_S)
    body_timeout_s: float = setting(
        60.0, "longest time that the body may take after the head; a large body gets more", least=LEAST_S
    )
    idle_timeout_s: float = setting(75.0, "how long a connection may wait for its next request", least=LEAST_S)
    stall_timeout_s: float = setting(120.0, "how long a client may leave an answer unread", least=LEAST_S)


@dataclass
class QueueLimits:
    """How many requests may run and wait, and for how long."""

    max_streams: int = setting(
        16384, "most requests that may run at once, over all workers", least=1, live=True, page="fleet.md#queueing"
    )
    max_queued: int = setting(1024, "most waiting requests, for each priority", live=True)
    queue_timeout_s: float = setting(60.0, "longest wait in the queue", least=LEAST_S, live=True)
    worker_wait_s: float = setting(
        10.0, "how long requests wait after the last worker of a role has gone; 0 refuses them at once", live=True,
        page="faults.md#a-role-without-a-worker",
    )  # fmt: skip


@dataclass
class Timeouts:
    """How long a request and each of its legs may take."""

    prefill_timeout_s: float = setting(300.0, "longest wait for a prefill worker's answer", least=LEAST_S, live=True)
    decode_first_byte_timeout_s: float = setting(
        120.0, "longest wait for the first event of a stream, from the decode request on", least=LEAST_S, live=True
    )
    decode_idle_timeout_s: float = setting(
        120.0, "longest silence of a decode worker within a stream", least=LEAST_S, live=True
    )
    decode_answer_timeout_s: float = setting(
        600.0, "longest wait for a decode worker's answer that is not streamed", least=LEAST_S, live=True
    )
    stream_keepalive_s: float = setting(
        0.0, "how long a client that waits for a stream may hear nothing before it gets a comment; 0 sends none",
        live=True, page="deploy.md#silent-streams",
    )  # fmt: skip
    request_timeout_s: float = setting(
        3600.0, "longest time for a whole request, with queue and retries; clients can shorten it", least=LEAST_S,
        live=True, page="faults.md#deadlines",
    )  # fmt: skip
    shutdown_delay_s: float = setting(
        0.0, "how long the router goes on accepting connections after SIGTERM, while `/ready` answers 503", live=True,
        page="fleet.md#shutdown-reload-and-handover",
    )  # fmt: skip
    grace_s: float = setting(
        30.0, "how long running requests may take to finish after SIGTERM and `shutdown_delay_s`", live=True,
        page="fleet.md#shutdown-reload-and-handover",
    )  # fmt: skip


@dataclass
class RetrySettings:
    """How often the router retries failed requests."""

    retries: int = setting(2, "most retries of one request; refused connections do not count", page="faults.md#retries")
    retry_ratio: float = setting(0.2, "most retries as a share of all requests, in the long run")
    retry_burst: int = setting(500, "retries that a burst of failures may add to that share")


@dataclass
class EjectionSettings:
    """When the router stops sending requests to a worker that fails them."""

    eject_failures: int = setting(
        5, "failures in a row that eject a worker", least=1, page="faults.md#probes-and-ejection"
    )
    eject_rate: float = setting(0.5, "share of failures, among a worker's latest requests, that ejects it")
    eject_base_s: float = setting(5.0, "duration of a first ejection; each further one doubles it", least=LEAST_S)
    eject_max_s: float = setting(300.0, "longest duration of an ejection", least=LEAST_S)
    eject_share: float = setting(
        0.5, "largest share of a role's workers to eject at once; 0 turns ejection off", most=1
    )


@dataclass
class ExpertSettings:
    """How the router learns which experts finished requests have used."""

    report_key_file: Path | None = setting(
        None, "file with the key with which eldr's connector may report experts", flag=True, shown="nobody may",
        page="vllm.md#reports-of-finished-requests",
    )  # fmt: skip
    routed_experts_share: float = setting(
        0.0, "share of whole answers of stock workers whose routed experts are read; above 0, clients get none",
        most=1, flag=True, metavar="SHARE", page="vllm.md#routed-experts-of-stock-workers",
    )  # fmt: skip
    expert_geometry: Mapping[str, tuple[int, int, int]] = setting(
        {}, "MoE layers x experts x top-k, such as 48x128x8, of one model or of all others", parse=_geometries,
        flag=True, metavar="[MODEL=]LxExK", shown="unknown", page="vllm.md#routed-experts-of-stock-workers",
    )  # fmt: skip

    @property
    def are_reported(self) -> bool:
        """Whether the experts of finished requests become known from anywhere."""
        return self.report_key_file is not None or self.routed_experts_share > 0


@dataclass
class PeerSettings:
    """Other replicas of this router, which send requests to the same workers."""

    peers: tuple[str, ...] = setting(
        (), "URL of a NATS server over which the replicas of a router decide as one, such as nats://10.0.0.1:4222",
        parse=_nats_urls, flag=True, metavar="URL", shown="this router is the only one", page="peers.md",
    )  # fmt: skip
    fleet: str = setting(
        "default", "name of the fleet, which the replicas have in common", parse=_fleet_name, flag=True, metavar="NAME",
        page="peers.md",
    )  # fmt: skip
    peers_credentials_file: Path | None = setting(
        None,
        "file with credentials of NATS (.creds)",
        flag=True,
        shown="what the URL has",
        page="peers.md#permissions-and-tls",
    )
    peers_ca: Path | None = setting(
        None, "PEM file of the CAs that tls:// servers of NATS are checked against", flag=True, shown="the system's",
        page="peers.md#permissions-and-tls",
    )  # fmt: skip


@dataclass
class ObserveSettings:
    """What the router logs and traces."""

    decision_log: Path | None = setting(
        None, "file to append every decision to, for `eldr decisions`; reopened on SIGHUP", flag=True,
        page="router.md#decision-log",
    )  # fmt: skip
    otel_endpoint: str | None = setting(
        None, "URL to send traces to, OTLP over HTTP, such as http://collector:4318/v1/traces", flag=True,
        metavar="URL", shown="off", page="observability.md#traces",
    )  # fmt: skip
    otel_sampling: float = setting(
        0.01, "share of requests to trace, among those without a trace context", most=1, flag=True, metavar="SHARE"
    )
    log_level: str = setting(
        "warning", "least severe messages to log; debug writes a line per request", choices=LOG_LEVELS, flag=True,
        live=True,
    )  # fmt: skip
