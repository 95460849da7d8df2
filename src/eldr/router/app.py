"""Puts the router together: endpoints, start, graceful end."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from eldr.errors import EldrError
from eldr.policies.base import Policy
from eldr.policies.logged import LoggedPolicy
from eldr.policies.refit import RefitSchedule
from eldr.router.api.admin import AdminApi
from eldr.router.api.keys import ADMIN, ApiKeys, is_admin
from eldr.router.api.metrics import RouterCollector
from eldr.router.api.models import ModelsFlow
from eldr.router.api.ui.state import UiState
from eldr.router.config.endpoint import ROLES
from eldr.router.config.settings import ConfigError, RouterConfig, host_and_port, read_key
from eldr.router.fleet.discovery.base import Source
from eldr.router.fleet.discovery.dns import DnsSource
from eldr.router.fleet.discovery.file import FileSource
from eldr.router.fleet.discovery.static import StaticSource
from eldr.router.fleet.membership import Membership
from eldr.router.fleet.outcomes import Outcomes
from eldr.router.fleet.sweep import sweep
from eldr.router.fleet.workers import Fleet
from eldr.router.http.errors import ApiError
from eldr.router.http.limits import ClientLimits, ConnectionWatch
from eldr.router.http.server import ClientConnection, Handler, Request
from eldr.router.http.tls import HANDSHAKE_TIMEOUT_S, ServerTls, worker_context
from eldr.router.observe import logs
from eldr.router.observe.counters import Metrics
from eldr.router.observe.decision_log import DecisionLog, log_header
from eldr.router.observe.tracing import Tracing
from eldr.router.placement.admission import Admission, Limits
from eldr.router.placement.decode import Placements
from eldr.router.placement.prefill import PrefillRing
from eldr.router.placement.refits import ZoneRefits
from eldr.router.request import openai
from eldr.router.request.attempts import RetryBudget
from eldr.router.request.flow import Flow
from eldr.router.request.intake import RETRY_AFTER_S
from eldr.router.request.services import Services

log = logging.getLogger("eldr.router")

BACKLOG = 4096
CLOSE_POLL_S = 0.02
# How long a stopping router leaves connections open on which nothing runs. A client may just be sending on one, and a
# request that meets a close is lost; so each gets to send one more, and is told then that the connection closes.
# Clients forget idle connections after some seconds themselves (httpx after 5).
IDLE_LINGER_S = 5.0
# For what was cut off to be told so.
END_S = 1.0
# What a new configuration changes at once; the workers besides.
LIVE_SETTINGS = frozenset((
    "model", "max_inflight", "max_streams", "max_queued", "queue_timeout_s", "worker_wait_s", "prefill_timeout_s",
    "decode_first_byte_timeout_s", "decode_idle_timeout_s", "decode_answer_timeout_s", "request_timeout_s",
    "drain_timeout_s", "grace_s", "log_level",
))  # fmt: skip
# What a client may take the router's own address for.
ADMIN_PATHS = frozenset((b"/ui", b"/admin/workers", b"/admin/drain"))
# What may be asked without an API key: load balancers probe it.
OPEN_PATHS = frozenset((b"/health", b"/ready"))
# What a 405 says of an endpoint of this method.
ALLOWED = {b"GET": b"GET, HEAD", b"POST": b"POST"}


class Router:
    """A running router. `start` it inside an event loop, `stop` it in the same.

    config_file: the file to watch, and how to read it again; None if there is none.
    inherited: sockets that listen already, for clients and for the admin API; what is missing is opened.
    """

    def __init__(
        self,
        config: RouterConfig,
        policy: Policy,
        config_file: tuple[Path, Callable[[], RouterConfig]] | None = None,
        inherited: Sequence[socket.socket] = (),
    ) -> None:
        self._config = config
        self._inherited = inherited
        self._file: FileSource | None = None
        self._config_file = config_file
        self.connections: set[ClientConnection] = set()
        self.closing = False
        self._flows: dict[asyncio.Task[None], Flow | ModelsFlow] = {}
        self._background: list[asyncio.Task[None]] = []
        self._server: asyncio.Server | None = None
        self._admin_server: asyncio.Server | None = None
        self._keys = None if config.api_key_file is None else ApiKeys(config.api_key_file)
        self._tls = (
            None if config.tls_cert is None or config.tls_key is None else ServerTls(config.tls_cert, config.tls_key)
        )
        self._limits = ClientLimits(
            config.max_body_bytes,
            config.max_connections,
            config.head_timeout_s,
            config.body_timeout_s,
            config.idle_timeout_s,
            config.stall_timeout_s,
        )
        fleet = Fleet()
        metrics = Metrics()
        self._decision_log: DecisionLog | None = None
        if config.decision_log is not None:
            self._decision_log = DecisionLog(config.decision_log, metrics)
            self._decision_log.write(log_header(config).to_wire())
            policy = LoggedPolicy(policy, self._decision_log.write)
        self._refits = _zone_refits(policy, config, metrics)
        admission = Admission(fleet, admission_limits(config))
        outcomes = Outcomes(fleet, admission, metrics, config)
        self.services = Services(
            config=config,
            fleet=fleet,
            pools={},
            ring=PrefillRing(fleet, config.prefix_window_bytes),
            admission=admission,
            placements=Placements(policy, fleet, metrics, config.seed),
            metrics=metrics,
            outcomes=outcomes,
            budget=RetryBudget(config.retry_ratio, config.retry_burst),
            throttle=logs.Throttle(),
            client_header=None if config.client_header is None else config.client_header.lower().encode(),
            tracing=None if config.otel_endpoint is None else Tracing(config.otel_endpoint, config.otel_sampling),
            admin_key=None if config.admin_key_file is None else read_key(config.admin_key_file),
        )
        self.membership = self._build_membership()
        self.admin = AdminApi(self.membership, lambda: self.services.admin_key, UiState(self.services))
        self._collector = RouterCollector(metrics, fleet, admission, self.services.placements.picture)
        self._routes = {
            openai.COMPLETIONS: (b"POST", self._completion),
            openai.CHAT: (b"POST", self._completion),
            b"/v1/models": (b"GET", self._models),
            b"/health": (b"GET", self._health),
            b"/ready": (b"GET", self._ready),
            b"/metrics": (b"GET", self._metrics),
        }

    # Start and end.

    async def start(self) -> None:
        """Take the workers into the fleet, probe each once, and listen.

        Raises EldrError if a port is taken or a worker can never be used as it is named.
        """
        try:
            await self.membership.follow(self._sources())
            loop = asyncio.get_running_loop()
            self._background = [
                loop.create_task(sweep(self.services.pools, self.services.outcomes)),
                loop.create_task(ConnectionWatch(self.connections).run()),
                loop.create_task(ConnectionWatch(self.admin.connections).run()),
            ]
            if self._refits is not None:
                self._background.append(loop.create_task(self._refits.run()))
            self._server = await self._listen(self, self._config.host, self._config.port, self._inherited[:1])
            if self._config.admin_listen is not None:
                host, port = host_and_port("admin_listen", self._config.admin_listen)
                self._admin_server = await self._listen(self.admin, host, port, self._inherited[1:2])
        except EldrError:
            await self.stop(0)
            raise

    async def _listen(
        self, handler: Handler, host: str, port: int, inherited: Sequence[socket.socket]
    ) -> asyncio.Server:
        tls = self._tls
        where: dict[str, Any] = {"sock": inherited[0]} if inherited else {"host": host, "port": port}
        try:
            return await asyncio.get_running_loop().create_server(
                lambda: cast(Any, ClientConnection(handler, self._limits)),
                **where,
                backlog=BACKLOG,
                ssl=None if tls is None else tls.context,
                ssl_handshake_timeout=None if tls is None else HANDSHAKE_TIMEOUT_S,
            )
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error}") from None

    def _sources(self) -> list[Source]:
        config = self._config
        named = [DnsSource(url, role, config.dns_interval_s) for url, role in config.dns_names]
        if self._config_file is None:
            return [StaticSource(config.endpoints), *named]
        path, load = self._config_file
        self._file = FileSource(path, config, load, self._reloaded)
        return [self._file, *named]

    @property
    def port(self) -> int:
        """The port it listens on, which the system chose if the configured one is 0."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def admin_port(self) -> int:
        """The port of the admin API."""
        assert self._admin_server is not None
        return int(self._admin_server.sockets[0].getsockname()[1])

    @property
    def running(self) -> int:
        """Requests that are being answered, those that wait for a worker included."""
        return len(self._flows)

    @property
    def sockets(self) -> list[socket.socket]:
        """The listening sockets, in the order of `inherited`."""
        servers = (self._server, self._admin_server)
        return [sock for server in servers if server is not None for sock in server.sockets[:1]]

    def reload(self) -> None:
        """Read keys, certificate and configuration file again; running requests go on. What cannot be used stays as
        it was, which the log says."""
        for read in (self.reload_secrets, self._reload_admin_key):
            try:
                read()
            except ConfigError as error:
                log.error("what was read before stays in use: %s", error)
        self.reopen_decision_log()
        if self._file is not None:
            self._file.look()

    def reload_secrets(self) -> None:
        """Read API keys, certificate and its key again; running requests go on. Raises ConfigError and keeps what it
        had of a file that cannot be used."""
        if self._keys is not None:
            self._keys.reload()
        if self._tls is not None:
            self._tls.reload()

    def _reload_admin_key(self) -> None:
        if self._config.admin_key_file is not None:
            self.services.admin_key = read_key(self._config.admin_key_file)

    def _reloaded(self, new: RouterConfig) -> None:
        """Take over of a new configuration what can change while the router runs; name what cannot."""
        config = self._config
        changed = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(new, f.name)]
        for name in changed:
            if name in LIVE_SETTINGS:
                setattr(config, name, getattr(new, name))
        fixed = [name for name in changed if name not in LIVE_SETTINGS and name not in ROLES]
        if new.dns_names != config.dns_names:
            fixed.append("dns+ names")
        if fixed:
            log.warning("only a new process takes over the new %s", ", ".join(fixed))
        log.setLevel(config.log_level.upper())
        self.services.admission.set_limits(admission_limits(config))
        self.membership.set_max_inflight(config.max_inflight)

    async def stop(self, grace_s: float) -> None:
        """Take no more requests, let those that run finish within `grace_s` seconds, cut off the rest."""
        self.closing = True
        for server in (self._server, self._admin_server):
            if server is not None:
                server.close()
        deadline_s = time.monotonic() + grace_s
        await self._finish(deadline_s)
        await asyncio.sleep(0)  # a task that never ran could tell its client nothing
        for flow in list(self._flows.values()):
            flow.end_now(ApiError(503, "the router stops", retry_after_s=RETRY_AFTER_S))
        if self._flows:
            await asyncio.wait(self._flows, timeout=END_S)
        for task in (*self._flows, *self._background):
            task.cancel()
        await asyncio.gather(*self._flows, *self._background, return_exceptions=True)
        await self.membership.close()
        for connection in list(self.connections):
            connection.close()
        while self.connections and time.monotonic() < deadline_s:  # the last bytes are on their way
            await asyncio.sleep(CLOSE_POLL_S)
        for connection in list(self.connections):
            connection.abort()
        for connection in list(self.admin.connections):
            connection.abort()
        for pool in self.services.pools.values():
            pool.close()
        if self._decision_log is not None:
            self._decision_log.close()
        if self.services.tracing is not None:
            await asyncio.to_thread(self.services.tracing.close)

    def reopen_decision_log(self) -> None:
        """Go on in a new file after the old one was renamed."""
        if self._decision_log is not None:
            self._decision_log.reopen()

    async def _finish(self, deadline_s: float) -> None:
        """Let running requests end, and clients with an open connection send one more."""
        idle_until_s = min(deadline_s, time.monotonic() + IDLE_LINGER_S)
        while (self._flows or self.connections) and (now_s := time.monotonic()) < deadline_s:
            if now_s >= idle_until_s:
                for connection in list(self.connections):
                    connection.close_if_idle()
            await asyncio.sleep(CLOSE_POLL_S)

    def _build_membership(self) -> Membership:
        config, services = self._config, self.services
        return Membership(
            config,
            services.fleet,
            services.pools,
            services.ring,
            services.outcomes,
            services.placements,
            services.went_down,
            None if config.worker_api_key_file is None else read_key(config.worker_api_key_file),
            worker_context(config.worker_ca),
        )

    # Requests.

    def permit(self, path: bytes, headers: dict[bytes, bytes]) -> str:
        if self._keys is None or path in OPEN_PATHS:
            return ""
        given = headers.get(b"authorization")
        client = self._keys.client(given)
        if client is None and is_admin(given, self.services.admin_key):
            client = ADMIN
        if client is None:
            raise ApiError(401, "an API key is needed, as Authorization: Bearer KEY")
        return client

    def handle(self, request: Request, connection: ClientConnection) -> None:
        route = self._routes.get(request.path)
        try:
            if route is None and request.path in ADMIN_PATHS:
                raise ApiError(404, f"{request.path.decode()} is served at the address of --admin-listen alone")
            if route is None:
                raise ApiError(404, "Not Found: the endpoints are " + ", ".join(map(bytes.decode, self._routes)))
            method, answer = route
            if request.method != method and (request.method, method) != (b"HEAD", b"GET"):
                raise ApiError(405, f"Method Not Allowed: use {method.decode()}")
        except ApiError as error:
            self.refused(error)
            connection.respond_error(error, b"" if route is None else b"allow: %b\r\n" % ALLOWED[route[0]])
            return
        answer(request, connection)

    def refused(self, error: ApiError) -> None:
        self.services.metrics.requests["other", error.status] += 1

    def _completion(self, request: Request, connection: ClientConnection) -> None:
        self._run(Flow(self.services, connection, request))

    def _models(self, request: Request, connection: ClientConnection) -> None:
        self._run(ModelsFlow(self.services, connection, request))

    def _run(self, flow: Flow | ModelsFlow) -> None:
        task = flow.start()
        if task is not None:
            self._flows[task] = flow
            task.add_done_callback(self._flows.pop)

    def _health(self, request: Request, connection: ClientConnection) -> None:
        connection.respond(200, b"{}")

    def _ready(self, request: Request, connection: ClientConnection) -> None:
        fleet = self.services.fleet
        if fleet.ready and not self.closing:
            connection.respond(200, b"{}")
            return
        missing = [role for role in ("prefill", "decode") if not fleet.any_available(role)]
        connection.respond_error(
            ApiError(503, f"no {' and no '.join(missing)} worker is available" if missing else "stopping")
        )

    def _metrics(self, request: Request, connection: ClientConnection) -> None:
        accept = request.headers.get(b"accept", b"").decode("latin-1")
        body, content_type = self._collector.exposition(accept)
        connection.respond(200, body, content_type.encode())


def admission_limits(config: RouterConfig) -> Limits:
    return Limits(config.max_streams, config.max_queued, config.queue_timeout_s, config.worker_wait_s)


def _zone_refits(policy: Policy, config: RouterConfig, metrics: Metrics) -> ZoneRefits | None:
    options = config.policy_options()
    if not options.refits:
        return None
    return ZoneRefits(policy, RefitSchedule(options.refit_interval_s, options.refit_window_s), metrics)


def build_policy(config: RouterConfig) -> Policy:
    """The configured policy with its calibration. Raises EldrError."""
    from eldr.calibration import load_calibration
    from eldr.policies import make_policy

    calibration = None if config.calibration is None else load_calibration(config.calibration)
    return make_policy(config.policy, config.policy_options(), calibration=calibration, seed=config.seed)
