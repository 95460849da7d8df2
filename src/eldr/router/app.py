"""Puts the router together: its parts, its start and its graceful end. The one file that sees all packages."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from eldr.errors import EldrError
from eldr.policies.base import Policy
from eldr.policies.logged import LoggedPolicy
from eldr.policies.options import PolicyOptions
from eldr.policies.refit import RefitSchedule
from eldr.router.api.admin import AdminApi
from eldr.router.api.keys import ApiKeys
from eldr.router.api.metrics import RouterCollector
from eldr.router.api.routes import ClientApi
from eldr.router.api.ui.state import UiState
from eldr.router.config.settings import ConfigError, RouterConfig, host_and_port, read_key
from eldr.router.fleet.discovery.base import Source
from eldr.router.fleet.discovery.dns import DnsSource
from eldr.router.fleet.discovery.file import FileSource
from eldr.router.fleet.discovery.static import StaticSource
from eldr.router.fleet.membership import Membership
from eldr.router.fleet.outcomes import Outcomes
from eldr.router.fleet.sweep import sweep
from eldr.router.fleet.workers import Fleet, Worker
from eldr.router.http.admin_key import AdminKey
from eldr.router.http.limits import ConnectionWatch
from eldr.router.http.listeners import Listeners
from eldr.router.http.pool import WorkerPool
from eldr.router.http.server import ClientConnection
from eldr.router.http.tls import ServerTls, worker_context
from eldr.router.observe.counters import Metrics
from eldr.router.observe.decision_log import DecisionLog, log_header
from eldr.router.observe.tracing import Tracing
from eldr.router.placement.admission import Admission
from eldr.router.placement.decode import Placements
from eldr.router.placement.prefill import PrefillRing
from eldr.router.placement.refits import ZoneRefits
from eldr.router.protocols.vllm_nixl import VllmNixl
from eldr.router.request.attempts import Retries
from eldr.router.request.intake import Intake
from eldr.router.request.legs import Legs
from eldr.router.request.services import Services
from eldr.settings import adopt

log = logging.getLogger("eldr.router")

CLOSE_POLL_S = 0.02
# How long a stopping router leaves connections open on which nothing runs. A client may just be sending on one, and a
# request that meets a close is lost; so each gets to send one more, and is told then that the connection closes.
# Clients forget idle connections after some seconds themselves (httpx after 5).
IDLE_LINGER_S = 5.0


class Router:
    """A running router. `start` it inside an event loop, `stop` it in the same.

    config_file: the file to watch, and how to read it again; None if there is none.
    inherited: sockets that listen already, for clients and for the admin API; what is missing is opened.

    It holds every part that has a beginning, an end or something to read again, which is why there are so many.
    """

    def __init__(
        self,
        config: RouterConfig,
        policy: Policy,
        config_file: tuple[Path, Callable[[], RouterConfig]] | None = None,
        inherited: Sequence[socket.socket] = (),
    ) -> None:
        self._config = config
        self._dns_names = config.workers.dns_names
        self._config_file = config_file
        self._file: FileSource | None = None
        self._background: list[asyncio.Task[None]] = []
        listen, observe = config.listen, config.observe
        metrics, fleet = Metrics(), Fleet()
        pools: dict[Worker, WorkerPool] = {}
        self._decision_log: DecisionLog | None = None
        if observe.decision_log is not None:
            self._decision_log = DecisionLog(observe.decision_log)
            self._decision_log.write(log_header(config.placement).to_wire())
            policy = LoggedPolicy(policy, self._decision_log.write)
        self._refits = _zone_refits(policy, config.placement.options, metrics)
        self._keys = None if listen.api_key_file is None else ApiKeys(listen.api_key_file)
        self.admin_key = AdminKey(listen.admin_key_file)
        self._tls = (
            None if listen.tls_cert is None or listen.tls_key is None else ServerTls(listen.tls_cert, listen.tls_key)
        )

        ring = PrefillRing(fleet)
        placements = Placements(policy, fleet, metrics, config.placement.seed)
        self._outcomes = Outcomes(fleet, metrics, config.ejection)
        admission = Admission(fleet, config.queue)
        # In this order: the queue looks when the others have.
        for part in (ring, placements, self._outcomes, admission):
            fleet.on_change(part.fleet_changed)

        protocol = VllmNixl()
        legs = Legs(fleet, pools, self._outcomes, protocol, metrics)
        retries = Retries(config.retry, self._outcomes, metrics)
        tracing = None if observe.otel_endpoint is None else Tracing(observe.otel_endpoint, observe.otel_sampling)
        intake = Intake(config, fleet, admission, protocol, self.admin_key, tracing)
        self.services = Services(config, intake, admission, ring, placements, protocol, legs, retries, fleet, metrics)
        self.membership = Membership(
            config.workers,
            fleet,
            pools,
            lambda worker: legs.leave(worker, int(retries.budget.left)),
            None if config.workers.worker_api_key_file is None else read_key(config.workers.worker_api_key_file),
            worker_context(config.workers.worker_ca),
        )
        collector = RouterCollector(metrics, fleet, admission, placements.picture, self._decision_log)
        self.clients = ClientApi(self.services, self._keys, self.admin_key, collector)
        self.admin = AdminApi(self.membership, self.admin_key, UiState(self.services))
        self._listeners = Listeners(config.clients, self._tls, inherited)

    # Start and end.

    async def start(self) -> None:
        """Take the workers into the fleet, probe each once, and listen.

        Raises EldrError if a port is taken or a worker can never be used as it is named.
        """
        listen = self._config.listen
        try:
            await self.membership.follow(self._sources())
            loop = asyncio.get_running_loop()
            self._background = [
                loop.create_task(sweep(self.services.legs.pools, self._outcomes)),
                loop.create_task(ConnectionWatch(self.clients.connections).run()),
                loop.create_task(ConnectionWatch(self.admin.connections).run()),
            ]
            if self._refits is not None:
                self._background.append(loop.create_task(self._refits.run()))
            await self._listeners.open(self.clients, listen.host, listen.port)
            if listen.admin_listen is not None:
                await self._listeners.open(self.admin, *host_and_port("admin_listen", listen.admin_listen))
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
        """The port it listens on, which the system chose if the configured one is 0."""
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
        """Requests that are being answered."""
        return self.clients.running

    @property
    def closing(self) -> bool:
        """Whether it takes no more requests."""
        return self.clients.closing

    async def stop(self, grace_s: float) -> None:
        """Take no more requests, let those that run finish within `grace_s` seconds, cut off the rest."""
        clients = self.clients
        clients.closing = True
        self._listeners.close()
        deadline_s = time.monotonic() + grace_s
        await self._finish(deadline_s)
        await clients.end_all()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.membership.close()
        for connection in list(clients.connections):
            connection.close()
        while clients.connections and time.monotonic() < deadline_s:  # the last bytes are on their way
            await asyncio.sleep(CLOSE_POLL_S)
        for connection in (*clients.connections, *self.admin.connections):
            connection.abort()
        for pool in self.services.legs.pools.values():
            pool.close()
        if self._decision_log is not None:
            self._decision_log.close()
        if self.services.intake.tracing is not None:
            await asyncio.to_thread(self.services.intake.tracing.close)

    async def _finish(self, deadline_s: float) -> None:
        """Let running requests end, and clients with an open connection send one more."""
        idle_until_s = min(deadline_s, time.monotonic() + IDLE_LINGER_S)
        while (self.running or self.connections) and (now_s := time.monotonic()) < deadline_s:
            if now_s >= idle_until_s:
                for connection in list(self.connections):
                    connection.close_if_idle()
            await asyncio.sleep(CLOSE_POLL_S)

    # While it runs.

    def reload(self) -> None:
        """Read keys, certificate and configuration file again; running requests go on. What cannot be used stays as
        it was, which the log says."""
        for read in (self.reload_secrets, self.admin_key.reload):
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

    def reopen_decision_log(self) -> None:
        """Go on in a new file after the old one was renamed."""
        if self._decision_log is not None:
            self._decision_log.reopen()

    def _reloaded(self, new: RouterConfig) -> None:
        """Take over of a new configuration what can change while the router runs; name what cannot."""
        config = self._config
        fixed = adopt(config, new)
        if new.workers.dns_names != self._dns_names:
            fixed.append("dns+ names")
        if fixed:
            log.warning("only a new process takes over the new %s", ", ".join(fixed))
        log.setLevel(config.observe.log_level.upper())
        self.services.admission.set_limits(config.queue)
        self.membership.set_max_inflight(config.workers.max_inflight)


def _zone_refits(policy: Policy, options: PolicyOptions, metrics: Metrics) -> ZoneRefits | None:
    if not options.refits:
        return None
    return ZoneRefits(policy, RefitSchedule(options.refit_interval_s, options.refit_window_s), metrics)


def build_policy(config: RouterConfig) -> Policy:
    """The configured policy with its calibration. Raises EldrError."""
    from eldr.calibration import load_calibration
    from eldr.policies import make_policy

    placement = config.placement
    calibration = None if placement.calibration is None else load_calibration(placement.calibration)
    return make_policy(placement.policy, placement.options, calibration=calibration, seed=placement.seed)
