"""Builds the router from its parts, starts it and stops it gracefully. The only file that sees all packages."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from eldr.errors import EldrError
from eldr.router.api.admin import AdminApi
from eldr.router.api.experts import ExpertReports
from eldr.router.api.keys import ApiKeys
from eldr.router.api.metrics import RouterCollector
from eldr.router.api.routes import ClientApi
from eldr.router.api.status import StatusApi
from eldr.router.api.ui.state import UiState
from eldr.router.api.whole import Whole
from eldr.router.config.picker import PickerConfig
from eldr.router.config.settings import ConfigError, RouterConfig, host_and_port, read_key
from eldr.router.experts.answers import ExpertAnswers
from eldr.router.experts.base import ExpertSink, MoeGeometry
from eldr.router.experts.expected import ExpectedReports
from eldr.router.experts.routed_experts import VllmRoutedExperts
from eldr.router.experts.sglang import SglangRoutedExperts
from eldr.router.experts.watch import ExpertSources
from eldr.router.fleet.discovery.base import Source
from eldr.router.fleet.discovery.file import FileSource
from eldr.router.fleet.discovery.named import named_sources
from eldr.router.fleet.discovery.static import StaticSource
from eldr.router.fleet.lists import ModelLists
from eldr.router.fleet.membership import Membership
from eldr.router.fleet.outcomes import Outcomes
from eldr.router.fleet.sweep import sweep
from eldr.router.fleet.workers import Fleet, Worker
from eldr.router.http.admin_key import AdminKey
from eldr.router.http.body_memory import BodyMemory
from eldr.router.http.cors import Cors
from eldr.router.http.limits import ConnectionWatch
from eldr.router.http.listeners import Listeners
from eldr.router.http.pool import WorkerPool
from eldr.router.http.server import ClientConnection
from eldr.router.http.tls import ServerTls, worker_context
from eldr.router.observe.counters import Metrics
from eldr.router.observe.decision_log import DecisionLog
from eldr.router.observe.tracing import Tracing
from eldr.router.peers.bus import Bus
from eldr.router.peers.nats import NatsBus
from eldr.router.peers.peers import Peers
from eldr.router.peers.siblings import Siblings
from eldr.router.placement.admission import Admission
from eldr.router.placement.lanes import MakePolicy
from eldr.router.placement.making import logged, make_lanes
from eldr.router.protocols.base import LegProtocol
from eldr.router.protocols.sglang import Sglang
from eldr.router.protocols.vllm_nixl import VllmNixl
from eldr.router.request.attempts import Retries
from eldr.router.request.intake import Intake
from eldr.router.request.legs import Legs
from eldr.router.request.quotas import Quotas
from eldr.router.request.services import Services
from eldr.settings import adopt

if TYPE_CHECKING:
    from eldr.router.picker.http2 import Http2Connection
    from eldr.router.picker.server import Picker

log = logging.getLogger("eldr.router")

CLOSE_POLL_S = 0.02
# How long a stopping router keeps idle connections open. A client may be sending on one at that moment, and a request
# that crosses the close is lost. So each client may send one more request, and its answer says that the connection
# closes. Clients drop idle connections themselves after some seconds (httpx after 5).
IDLE_LINGER_S = 5.0


class Router:
    """A router. Call `start` inside an event loop, and `stop` in the same one.

    make_policy: makes the policy of each group of workers.
    config_file: the file to watch, and a function that reads it again. None if there is no file.
    inherited: sockets that already listen, for clients and then for the admin API. Missing ones are opened.
    expert_sink: who learns from the experts of finished requests. None for the policies.
    bus: carries what replicas tell each other. None for the configured one, if there is one.
    siblings: the other processes of this router on this machine. None if there are none.

    It has many attributes because it holds every part that must be started, stopped or reloaded.
    """

    def __init__(
        self,
        config: RouterConfig,
        make_policy: MakePolicy,
        config_file: tuple[Path, Callable[[], RouterConfig]] | None = None,
        inherited: Sequence[socket.socket] = (),
        expert_sink: ExpertSink | None = None,
        bus: Bus | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        self._config = config
        self._named = config.workers.dns_names, config.workers.kubernetes
        self._config_file = config_file
        self._file: FileSource | None = None
        self._background: list[asyncio.Task[None]] = []
        listen, observe = config.listen, config.observe
        metrics, fleet, memory = Metrics(), Fleet(), BodyMemory(config.clients)
        pools: dict[Worker, WorkerPool] = {}
        self._decision_log: DecisionLog | None = None
        if observe.decision_log is not None:
            self._decision_log = DecisionLog(observe.decision_log)
            make_policy = logged(make_policy, config.placement, self._decision_log)
        self._keys = None if listen.api_key_file is None else ApiKeys(listen.api_key_file)
        self.admin_key = AdminKey(listen.admin_key_file)
        self._tls = self._grpc_tls = None
        if listen.tls_cert is not None and listen.tls_key is not None:
            self._tls = ServerTls(listen.tls_cert, listen.tls_key)
            self._grpc_tls = ServerTls(listen.tls_cert, listen.tls_key, "h2")

        self._lanes = make_lanes(
            config.placement,
            fleet,
            make_policy,
            metrics,
            reports=config.experts.are_reported,
            keeps=siblings is None or not siblings.index,
        )
        self._outcomes = Outcomes(fleet, metrics, config.ejection)
        lists = ModelLists(config.workers, fleet, pools)
        admission = Admission(config.queue)
        if bus is None and config.peers.peers:
            peers = config.peers
            bus = NatsBus(peers.peers, peers.fleet, peers.peers_credentials_file, peers.peers_ca)
        self._siblings = siblings
        if bus is None and siblings is not None:
            bus = siblings.bus
        self.peers = None if bus is None else Peers(bus, fleet, self._lanes, admission)
        fleet.on_change(self._lanes.fleet_changed)
        fleet.on_steps(self._lanes.counted)
        if self.peers is not None:
            fleet.on_change(self.peers.elsewhere.fleet_changed)
        # The queue comes last: the requests that it admits need the other parts up to date.
        for part in (self._outcomes, lists, admission):
            fleet.on_change(part.fleet_changed)

        self._experts = _expert_sources(config, expert_sink or self._lanes, metrics)
        self.report_key = AdminKey(config.experts.report_key_file)
        quotas = Quotas()
        if self._keys is not None:
            quotas.adopt(self._keys.limits)
        protocol: LegProtocol = Sglang() if config.workers.engine == "sglang" else VllmNixl()
        legs = Legs(fleet, pools, self._outcomes, protocol, metrics)
        retries = Retries(config.retry, lists, self._outcomes, metrics)
        tracing = None if observe.otel_endpoint is None else Tracing(observe.otel_endpoint, observe.otel_sampling)
        intake = Intake(config, fleet, protocol, self.admin_key, tracing)
        self.services = Services(
            config,
            quotas,
            intake,
            lists,
            admission,
            self._lanes,
            protocol,
            legs,
            retries,
            self._outcomes,
            fleet,
            metrics,
            self._experts,
        )
        self.membership = Membership(
            config.workers,
            fleet,
            pools,
            lists,
            lambda worker: legs.leave(worker, int(retries.budget.left)),
            None if config.workers.worker_api_key_file is None else read_key(config.workers.worker_api_key_file),
            worker_context(config.workers.worker_ca),
            memory,
        )
        collector = RouterCollector(
            metrics, fleet, admission, self._lanes, memory, self._decision_log, quotas, self.peers, config
        )
        whole = Whole(siblings)
        reports = None if self._experts is None else ExpertReports(self._experts, self.report_key, whole)
        self.clients: ClientApi | StatusApi
        self.picker: Picker | None = None
        if isinstance(config, PickerConfig):
            from eldr.router.picker.server import Picker  # its packages are an extra of their own

            self.clients = StatusApi(fleet, metrics, self.admin_key, collector, reports)
            self.picker = Picker(self.services, config.picker, config.clients, memory, self.clients.can_pick)
            fleet.on_change(self.picker.fleet_changed)
        else:
            cors = Cors(listen.allowed_origins)
            self.clients = ClientApi(self.services, self._keys, self.admin_key, cors, collector, reports, whole)
        ui, behind_gateway = UiState(self.services, self.peers), self.picker is not None
        self.admin = AdminApi(self.membership, self.admin_key, ui, whole, behind_gateway)
        self._listeners = Listeners(config.clients, memory, self._tls, inherited)

    # Starting and stopping.

    async def start(self) -> None:
        """Add the workers to the fleet, probe each one once, and listen.

        Raises EldrError if the router cannot listen, or if a worker can never be used under the address given.
        """
        listen = self._config.listen
        try:
            if self._siblings is not None:
                await self._siblings.start()
            if self.peers is not None:
                await self.peers.start()
            await self.membership.follow(self._sources())
            loop = asyncio.get_running_loop()
            self._background = [
                loop.create_task(sweep(self.services.legs.pools, self._outcomes)),
                loop.create_task(ConnectionWatch(self.clients.connections).run()),
                loop.create_task(ConnectionWatch(self.admin.connections).run()),
            ]
            if self.picker is not None:
                self._background.append(loop.create_task(ConnectionWatch(self.picker.connections).run()))
            await self._listeners.open(self.clients, listen.host, listen.port)
            if listen.admin_listen is not None:
                await self._listeners.open(self.admin, *host_and_port("admin_listen", listen.admin_listen))
            picker = self.picker
            if picker is not None and isinstance(self._config, PickerConfig):
                where = host_and_port("grpc_listen", self._config.picker.grpc_listen)
                await self._listeners.open_for(lambda: cast(Any, picker.connection()), *where, self._grpc_tls)
            if self._siblings is not None:
                self._siblings.ready()
        except EldrError:
            await self.stop(0)
            raise

    def _sources(self) -> list[Source]:
        config = self._config
        named = named_sources(config.workers, self.services.metrics)
        if self._config_file is None:
            return [StaticSource(config.workers.endpoints), *named]
        path, load = self._config_file
        self._file = FileSource(path, config, load, self._reloaded)
        return [self._file, *named]

    @property
    def port(self) -> int:
        """The port that the router listens on. The system chose it if the configured one is 0."""
        return self._listeners.port(0)

    @property
    def admin_port(self) -> int:
        """The port of the admin API."""
        return self._listeners.port(1)

    @property
    def sockets(self) -> list[socket.socket]:
        """The listening sockets, in the order of `inherited`."""
        return self._listeners.sockets

    @property
    def grpc_port(self) -> int:
        """The port at which Envoy asks an endpoint picker."""
        return self._listeners.port(len(self._listeners.sockets) - 1)

    @property
    def connections(self) -> set[ClientConnection]:
        """The open connections of clients."""
        return self.clients.connections

    @property
    def running(self) -> int:
        """How many requests are being answered or, by an endpoint picker, wait for their workers."""
        return self.clients.running + (0 if self.picker is None else self.picker.running)

    def _open_connections(self) -> list[ClientConnection | Http2Connection]:
        return [*self.clients.connections, *(() if self.picker is None else self.picker.connections)]

    @property
    def closing(self) -> bool:
        """Whether the router is stopping. It may still accept connections for a while."""
        return self.clients.closing

    async def stop(self, grace_s: float, delay_s: float = 0.0) -> None:
        """Accept no more connections, let requests finish for up to `grace_s` seconds, and abort the rest.

        First serve everybody for `delay_s` seconds more, while `/ready` answers 503. Proxies and load balancers need
        that time to hear of the end. Meanwhile each answer closes its connection, so clients move on.
        """
        clients, picker = self.clients, self.picker
        clients.closing = True
        if picker is not None:
            picker.closing = True
        await asyncio.sleep(delay_s)
        self._listeners.close()
        if picker is not None:
            picker.drain()
        deadline_s = time.monotonic() + grace_s
        await self._finish(deadline_s)
        await clients.end_all()
        if picker is not None:
            await picker.end_all()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self.peers is not None:
            await self.peers.close()
        if self._siblings is not None:
            self._siblings.close()
        await self.membership.close()
        await self.services.lists.close()
        await self._lanes.close()
        for connection in self._open_connections():
            connection.close()
        while self._open_connections() and time.monotonic() < deadline_s:  # the last bytes are still being sent
            await asyncio.sleep(CLOSE_POLL_S)
        for connection in (*self._open_connections(), *self.admin.connections):
            connection.abort()
        for pool in self.services.legs.pools.values():
            pool.close()
        if self._decision_log is not None:
            self._decision_log.close()
        if self._experts is not None:
            self._experts.close()
        if self.services.intake.tracing is not None:
            await asyncio.to_thread(self.services.intake.tracing.close)

    async def _finish(self, deadline_s: float) -> None:
        """Wait for running requests, and let each client with an open connection send one more."""
        idle_until_s = min(deadline_s, time.monotonic() + IDLE_LINGER_S)
        while (self.running or self.connections) and (now_s := time.monotonic()) < deadline_s:
            if now_s >= idle_until_s:
                for connection in self._open_connections():
                    connection.close_if_idle()
            await asyncio.sleep(CLOSE_POLL_S)

    # Reloading.

    def reload(self) -> None:
        """Read keys, certificate and configuration file again, without disturbing running requests.

        Keeps the current version of anything that cannot be used, and logs the error.
        """
        for read in (self.reload_secrets, self.admin_key.reload, self.report_key.reload):
            try:
                read()
            except ConfigError as error:
                log.error("reload failed, the previous version stays in use: %s", error)
        self.reopen_decision_log()
        if self._file is not None:
            self._file.look()

    def reload_secrets(self) -> None:
        """Read the API keys, the certificate and its key again, without disturbing running requests.

        If a file cannot be used, raises ConfigError and keeps what it held before.
        """
        if self._keys is not None:
            self._keys.reload()
            self.services.quotas.adopt(self._keys.limits)
        for tls in (self._tls, self._grpc_tls):
            if tls is not None:
                tls.reload()

    def reopen_decision_log(self) -> None:
        """Open the decision log's path anew, after its file was renamed."""
        if self._decision_log is not None:
            self._decision_log.reopen()

    def _reloaded(self, new: RouterConfig) -> None:
        """Adopt the live settings of a new configuration, and log which of the others need a new process."""
        config = self._config
        fixed = adopt(config, new)
        if (new.workers.dns_names, new.workers.kubernetes) != self._named:
            fixed.append("dns+ and k8s+ addresses")
        if fixed:
            log.warning("a change of these settings needs a new process: %s", ", ".join(fixed))
        log.setLevel(config.observe.log_level.upper())
        if isinstance(self.clients, ClientApi):
            self.clients.cors.allow(config.listen.allowed_origins)
        self.services.admission.set_limits(config.queue)
        self.membership.set_max_inflight(config.workers.max_inflight)


def _expert_sources(config: RouterConfig, sink: ExpertSink | None, metrics: Metrics) -> ExpertSources | None:
    """Return the sources of finished requests' experts that are configured. None if there is none."""
    experts = config.experts
    reports, share = experts.report_key_file is not None, experts.routed_experts_share
    if not experts.are_reported:
        return None
    geometries = {model: MoeGeometry(*geometry) for model, geometry in experts.expert_geometry.items()}
    expected = ExpectedReports(sink, geometries, metrics)
    engine = SglangRoutedExperts() if config.workers.engine == "sglang" else VllmRoutedExperts()
    answers = ExpertAnswers(engine, share, expected) if share else None
    return ExpertSources(expected, reports, answers)
