"""Builds the router from its parts, starts it and stops it gracefully. The only file that sees all packages."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from eldr.errors import EldrError
from eldr.learning.kept import Kept, KeptError, load_kept
from eldr.learning.learner import Learner
from eldr.policies.base import Policy
from eldr.policies.learned import Learned
from eldr.policies.logged import LoggedPolicy
from eldr.policies.options import PolicyOptions
from eldr.policies.refit import RefitSchedule
from eldr.router.api.admin import AdminApi
from eldr.router.api.experts import ExpertReports
from eldr.router.api.keys import ApiKeys
from eldr.router.api.metrics import RouterCollector
from eldr.router.api.routes import ClientApi
from eldr.router.api.ui.state import UiState
from eldr.router.api.whole import Whole
from eldr.router.config.groups import PlacementSettings
from eldr.router.config.settings import ConfigError, RouterConfig, host_and_port, read_key
from eldr.router.experts.answers import ExpertAnswers
from eldr.router.experts.base import ExpertSink, MoeGeometry
from eldr.router.experts.expected import ExpectedReports
from eldr.router.experts.routed_experts import VllmRoutedExperts
from eldr.router.experts.sglang import SglangRoutedExperts
from eldr.router.experts.watch import ExpertSources
from eldr.router.fleet.discovery.base import Source
from eldr.router.fleet.discovery.dns import DnsSource
from eldr.router.fleet.discovery.file import FileSource
from eldr.router.fleet.discovery.static import StaticSource
from eldr.router.fleet.groups import ModelGroup
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
from eldr.router.observe.decision_log import DecisionLog, calibration_digests, log_header
from eldr.router.observe.tracing import Tracing
from eldr.router.peers.bus import Bus
from eldr.router.peers.nats import NatsBus
from eldr.router.peers.peers import Peers
from eldr.router.peers.siblings import Siblings
from eldr.router.placement.admission import Admission
from eldr.router.placement.lanes import Lanes, MakePolicy
from eldr.router.placement.learning import Learning
from eldr.router.placement.refits import ZoneRefits
from eldr.router.placement.sharing import Sharing
from eldr.router.protocols.base import LegProtocol
from eldr.router.protocols.sglang import Sglang
from eldr.router.protocols.vllm_nixl import VllmNixl
from eldr.router.request.attempts import Retries
from eldr.router.request.intake import Intake
from eldr.router.request.legs import Legs
from eldr.router.request.quotas import Quotas
from eldr.router.request.services import Services
from eldr.settings import adopt

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
        self._dns_names = config.workers.dns_names
        self._config_file = config_file
        self._file: FileSource | None = None
        self._background: list[asyncio.Task[None]] = []
        listen, observe = config.listen, config.observe
        metrics, fleet, memory = Metrics(), Fleet(), BodyMemory(config.clients)
        pools: dict[Worker, WorkerPool] = {}
        self._decision_log: DecisionLog | None = None
        if observe.decision_log is not None:
            self._decision_log = DecisionLog(observe.decision_log)
            make_policy = _logged(make_policy, config.placement, self._decision_log)
        self._keys = None if listen.api_key_file is None else ApiKeys(listen.api_key_file)
        self.admin_key = AdminKey(listen.admin_key_file)
        self._tls = (
            None if listen.tls_cert is None or listen.tls_key is None else ServerTls(listen.tls_cert, listen.tls_key)
        )

        self._lanes = Lanes(
            fleet,
            make_policy,
            lambda policy: _zone_refits(policy, config.placement.options, metrics),
            lambda group, policy: _learning(group, policy, config, metrics, siblings, self._lanes.sharing),
            metrics,
            config.placement.seed,
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
            metrics, fleet, admission, self._lanes, memory, self._decision_log, quotas, self.peers
        )
        whole = Whole(siblings)
        cors = Cors(listen.allowed_origins)
        reports = None if self._experts is None else ExpertReports(self._experts, self.report_key, whole)
        self.clients = ClientApi(self.services, self._keys, self.admin_key, cors, collector, reports, whole)
        self.admin = AdminApi(self.membership, self.admin_key, UiState(self.services, self.peers), whole)
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
            await self._listeners.open(self.clients, listen.host, listen.port)
            if listen.admin_listen is not None:
                await self._listeners.open(self.admin, *host_and_port("admin_listen", listen.admin_listen))
            if self._siblings is not None:
                self._siblings.ready()
        except EldrError:
            await self.stop(0)
            raise

    def _sources(self) -> list[Source]:
        config = self._config
        named = [DnsSource(url, role, config.workers.dns_interval_s) for url, role in config.workers.dns_names]
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
    def connections(self) -> set[ClientConnection]:
        """The open connections of clients."""
        return self.clients.connections

    @property
    def running(self) -> int:
        """How many requests are being answered."""
        return self.clients.running

    @property
    def closing(self) -> bool:
        """Whether the router is stopping. It may still accept connections for a while."""
        return self.clients.closing

    async def stop(self, grace_s: float, delay_s: float = 0.0) -> None:
        """Accept no more connections, let requests finish for up to `grace_s` seconds, and abort the rest.

        First serve everybody for `delay_s` seconds more, while `/ready` answers 503. Proxies and load balancers need
        that time to hear of the end. Meanwhile each answer closes its connection, so clients move on.
        """
        clients = self.clients
        clients.closing = True
        await asyncio.sleep(delay_s)
        self._listeners.close()
        deadline_s = time.monotonic() + grace_s
        await self._finish(deadline_s)
        await clients.end_all()
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
        for connection in list(clients.connections):
            connection.close()
        while clients.connections and time.monotonic() < deadline_s:  # the last bytes are still being sent
            await asyncio.sleep(CLOSE_POLL_S)
        for connection in (*clients.connections, *self.admin.connections):
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
                for connection in list(self.connections):
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
        if self._tls is not None:
            self._tls.reload()

    def reopen_decision_log(self) -> None:
        """Open the decision log's path anew, after its file was renamed."""
        if self._decision_log is not None:
            self._decision_log.reopen()

    def _reloaded(self, new: RouterConfig) -> None:
        """Adopt the live settings of a new configuration, and log which of the others need a new process."""
        config = self._config
        fixed = adopt(config, new)
        if new.workers.dns_names != self._dns_names:
            fixed.append("dns+ names")
        if fixed:
            log.warning("a change of these settings needs a new process: %s", ", ".join(fixed))
        log.setLevel(config.observe.log_level.upper())
        self.clients.cors.allow(config.listen.allowed_origins)
        self.services.admission.set_limits(config.queue)
        self.membership.set_max_inflight(config.workers.max_inflight)


def _zone_refits(policy: Policy, options: PolicyOptions, metrics: Metrics) -> ZoneRefits | None:
    if not options.refits:
        return None
    return ZoneRefits(policy, RefitSchedule(options.refit_interval_s, options.refit_window_s), metrics)


def _learning(
    group: ModelGroup,
    policy: Policy,
    config: RouterConfig,
    metrics: Metrics,
    siblings: Siblings | None,
    sharing: Sharing | None,
) -> Learning | None:
    """What learns from a group's requests, beginning with what was kept or fitted before.

    Of several processes, the first keeps what it learns.
    """
    placement, reports = config.placement, config.experts.are_reported
    words, counts = policy.wants_words(False), policy.corrects_counts and reports
    if placement.learn == "off" or not (words or counts):
        return None
    kept, file = Kept(policy.prompts, policy.predictor), None
    if placement.learned_dir is not None:
        file = placement.learned_dir / _file_name(min(group.bases, default=""))
        if os.path.exists(file):  # noqa: PTH110 - Path.exists raises where the folder may not be read
            try:
                found = load_kept(file)
                kept = Kept(found.prompts or kept.prompts, found.activation or kept.activation)
                policy.learned(Learned.of(found.prompts, found.activation))
            except KeptError as error:
                log.error("what was learned before is not used: %s", error)
    if siblings is not None and siblings.index:
        file = None
    learner = Learner(kept.prompts, kept.activation, words=words, counts=counts, seed=placement.seed)
    tell = None if sharing is None else lambda lesson: sharing.learned(group.name, lesson)
    return Learning(policy, learner, metrics, file, reports, tell)


def _file_name(model: str) -> str:
    """A file name for what was learned about a model, whose own name a worker may have made up."""
    readable = re.sub("[^A-Za-z0-9._-]", "_", model)[:100]
    return f"{readable}-{zlib.crc32(model.encode('utf-8', 'surrogatepass')):08x}.npz"


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


def _logged(make_policy: MakePolicy, placement: PlacementSettings, decision_log: DecisionLog) -> MakePolicy:
    """Make policies whose events are logged, each after a header of its own."""
    digests = calibration_digests(placement)

    def make(group: ModelGroup) -> Policy:
        policy, write = make_policy(group), decision_log.run()
        write(log_header(placement, digests, policy.name, group.bases).to_wire())
        return LoggedPolicy(policy, write)

    return make


def policy_maker(config: RouterConfig) -> MakePolicy:
    """Return what makes the configured policy for each group of workers, with the calibration of its model.

    Raises EldrError for a policy that cannot be made, or a calibration that cannot be read.
    """
    from eldr.calibration import Calibration, load_calibration
    from eldr.policies import PolicyError, make_policy

    placement = config.placement
    calibrations = {path: load_calibration(path) for path in placement.calibration.values()}

    def make(calibration: Calibration | None) -> Policy:
        return make_policy(placement.policy, placement.options, calibration=calibration, seed=placement.seed)

    def make_for(group: ModelGroup) -> Policy:
        path = placement.calibration_of(sorted(group.bases))
        try:
            return make(None if path is None else calibrations[path])
        except PolicyError as error:
            # A model that is placed by load is better than one that is not served.
            log.error("the requests for %s are placed by jsq: %s", group.name or "a model", error)
            return make_policy("jsq", seed=placement.seed)

    for calibration in calibrations.values() or (None,):
        make(calibration)
    return make_for
