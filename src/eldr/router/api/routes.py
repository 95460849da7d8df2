"""The address for clients: which requests are allowed in, and who answers them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from eldr.router.api.experts import PATH as REPORTS
from eldr.router.api.experts import ExpertReports
from eldr.router.api.keys import ApiKeys
from eldr.router.api.metrics import RouterCollector
from eldr.router.api.models import LIST, ModelsFlow
from eldr.router.api.whole import Whole, all_metrics
from eldr.router.config.endpoint import ROLES
from eldr.router.http.admin_key import AdminKey
from eldr.router.http.cors import Cors
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.message import Request
from eldr.router.http.server import ClientConnection
from eldr.router.placement.admission import RETRY_AFTER_S
from eldr.router.protocols import openai
from eldr.router.protocols.base import ConcurrentLegs
from eldr.router.request.flow import Flow
from eldr.router.request.pair import PairFlow
from eldr.router.request.passthrough import ENDPOINTS, PassThrough
from eldr.router.request.services import Services

AnyFlow = Flow | ModelsFlow | PassThrough

# Paths of the admin API, which a client may ask for at this address by mistake.
ADMIN_PATHS = frozenset((b"/ui", b"/admin/workers", b"/admin/drain"))
# Paths that need no API key, because load balancers probe them.
OPEN_PATHS = frozenset((b"/health", b"/ready", b"/ping"))
# The name of a model follows.
MODEL = LIST + b"/"
# The Allow header of a 405, by the method of the endpoint.
ALLOWED = {b"GET": b"GET, HEAD", b"POST": b"POST"}
# Questions to the other processes.
METRICS, LOAD = b"metrics", b"load"
# How long clients that were cut off have to be told so.
END_S = 1.0


class ClientApi:
    """Answers clients. It is a handler of `ClientConnection`.

    keys: the API keys. None if everybody is allowed in.
    reports: takes workers' reports of experts. None if nobody may report.
    whole: all processes of this router.
    closing: whether the router is stopping. Requests are still answered, but /ready says 503.
    """

    def __init__(
        self,
        services: Services,
        keys: ApiKeys | None,
        admin_key: AdminKey,
        cors: Cors,
        collector: RouterCollector,
        reports: ExpertReports | None,
        whole: Whole,
    ) -> None:
        self._whole = whole
        if whole.siblings is not None:
            whole.siblings.answers[METRICS] = self._own_metrics
            whole.siblings.answers[LOAD] = lambda details: b"%d" % self.running
        self._services = services
        self._keys = keys
        self._admin_key = admin_key
        self.cors = cors
        self._collector = collector
        self._running: dict[asyncio.Task[None], AnyFlow] = {}
        self.connections: set[ClientConnection] = set()
        self.closing = False
        self._flow = PairFlow if isinstance(services.protocol, ConcurrentLegs) else Flow
        self._routes: dict[bytes, tuple[bytes, Callable[[Request, ClientExchange], None]]] = {
            **dict.fromkeys(openai.ENDPOINTS, (b"POST", self._completion)),
            LIST: (b"GET", self._models),
            b"/health": (b"GET", self._health),
            b"/ready": (b"GET", self._ready),
            b"/ping": (b"GET", self._health),
            b"/load": (b"GET", self._load),
            b"/metrics": (b"GET", self._metrics),
        }
        self._reports = reports
        if reports is not None:
            self._routes[REPORTS] = (b"POST", reports.handle)
        for path, endpoint in ENDPOINTS.items():
            self._routes[path] = (endpoint.method, self._pass_through)

    @property
    def running(self) -> int:
        """The number of requests that are being answered."""
        return len(self._running)

    def answer_lines(self, headers: dict[bytes, bytes]) -> bytes:
        return self.cors.answer_lines(headers)

    def permit(self, method: bytes, path: bytes, headers: dict[bytes, bytes]) -> str:
        if path in OPEN_PATHS or self.cors.is_preflight(method, headers):
            return ""
        if path == REPORTS and self._reports is not None:
            return self._reports.permit(headers)
        client = "" if self._keys is None else self._keys.client(headers)
        # Also if the router requires no keys: the keys of a client with a name go to no worker.
        if not client and self._admin_key.is_in(headers):
            client = "admin"
        if client is None:
            raise ApiError(401, "an API key is required, as Authorization: Bearer KEY or X-Api-Key: KEY")
        return client

    def handle(self, request: Request, exchange: ClientExchange) -> None:
        route = self._routes.get(request.path)
        if request.method == b"OPTIONS" and self.cors.is_preflight(request.method, request.headers):
            self._preflight(request, exchange)
            return
        if route is None and self._redirect(request, exchange):
            return
        if route is None and request.path.startswith(MODEL):
            route = self._routes[LIST]
        try:
            if route is None and request.path in ADMIN_PATHS:
                raise ApiError(404, f"{request.path.decode()} is only served at the address of --admin-listen")
            if route is None and request.path.startswith(openai.RESPONSES + b"/"):
                raise ApiError(404, "Not Found: responses are not stored, so they can be neither fetched nor cancelled")
            if route is None:
                raise ApiError(404, "Not Found: the endpoints are " + ", ".join(map(bytes.decode, self._routes)))
            method, answer = route
            if request.method != method and (request.method, method) != (b"HEAD", b"GET"):
                raise ApiError(405, f"Method Not Allowed: use {method.decode()}")
        except ApiError as error:
            self.refused(error)
            exchange.respond_error(error, b"" if route is None else b"allow: %b\r\n" % ALLOWED[route[0]])
            return
        answer(request, exchange)

    def _preflight(self, request: Request, exchange: ClientExchange) -> None:
        """Tell a browser whether the page that it shows may send a request, whatever its path."""
        if self.cors.allows(request.headers):
            exchange.respond(200, b"", extra=self.cors.granted(request.headers))
            return
        error = ApiError(403, "pages of this origin may not use the API (see --allowed-origins)")
        self.refused(error)
        exchange.respond_error(error)

    def _redirect(self, request: Request, exchange: ClientExchange) -> bool:
        """Send a client that put a slash behind a path to the path itself, as vLLM does. 307 keeps method and body."""
        path = request.path.rstrip(b"/")
        if path == request.path or path not in self._routes:
            return False
        self._services.metrics.requests["other", 307] += 1
        exchange.respond(307, b"", extra=b"location: %b%b\r\n" % (path, request.query))
        return True

    def refused(self, error: ApiError) -> None:
        self._services.metrics.requests["other", error.status] += 1

    async def end_all(self) -> None:
        """Tell the clients of running requests that the router is shutting down, and end what does not end itself."""
        await asyncio.sleep(0)  # a task that never ran could not tell its client
        for flow in list(self._running.values()):
            flow.end_now(ApiError(503, "the router is shutting down", retry_after_s=RETRY_AFTER_S))
        if self._running:
            await asyncio.wait(self._running, timeout=END_S)
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _completion(self, request: Request, exchange: ClientExchange) -> None:
        self._run(self._flow(self._services, exchange, request))

    def _models(self, request: Request, exchange: ClientExchange) -> None:
        self._run(ModelsFlow(self._services, exchange, request))

    def _pass_through(self, request: Request, exchange: ClientExchange) -> None:
        self._run(PassThrough(self._services, exchange, request))

    def _run(self, flow: AnyFlow) -> None:
        task = flow.start()
        if task is not None:
            self._running[task] = flow
            task.add_done_callback(self._running.pop)

    def _health(self, request: Request, exchange: ClientExchange) -> None:
        exchange.respond(200, b"{}")

    def _load(self, request: Request, exchange: ClientExchange) -> None:
        """Like vLLM's answer, but for all workers: the requests that the router is answering."""
        self._whole.gather(
            LOAD,
            b"",
            b"%d" % self.running,
            lambda loads: exchange.respond(200, b'{"server_load":%d}' % sum(map(int, loads))),
        )

    def _ready(self, request: Request, exchange: ClientExchange) -> None:
        fleet = self._services.fleet
        if fleet.ready and not self.closing:
            exchange.respond(200, b"{}")
            return
        needed = {group.whole.role(leg) for group in fleet.groups for leg in group.legs}
        missing = [role for role in ROLES if role in needed and not fleet.any_of_role_available(role)]
        if fleet.ready:
            why = "stopping"
        elif missing:
            why = f"no {' and no '.join(missing)} worker is available"
        else:
            why = "no model has both a prefill and a decode worker"
        exchange.respond_error(ApiError(503, why))

    def _metrics(self, request: Request, exchange: ClientExchange) -> None:
        named = self._admin_key.is_in(request.headers)
        accept = request.headers.get(b"accept", b"")
        body, content_type = self._collector.exposition(accept, named)
        siblings = self._whole.siblings
        if siblings is None:
            exchange.respond(200, body, content_type.encode())
            return
        details = b"%d" % named + accept
        self._whole.gather(
            METRICS,
            details,
            self._own_metrics(details),
            lambda texts: exchange.respond(200, all_metrics(texts), content_type.encode()),
        )

    def _own_metrics(self, details: bytes) -> bytes:
        """This process's metrics for `all_metrics`. details: whether clients are named, and the Accept header."""
        assert self._whole.siblings is not None
        body, _ = self._collector.exposition(details[1:], details[:1] == b"1")
        return b'process="%d"\n%b' % (self._whole.siblings.index, body)
