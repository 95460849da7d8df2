"""The HTTP address of an endpoint picker: whether it is well, its metrics, and the workers' reports of experts."""

from __future__ import annotations

from eldr.router.api.experts import PATH as REPORTS
from eldr.router.api.experts import ExpertReports
from eldr.router.api.metrics import RouterCollector
from eldr.router.fleet.workers import Fleet
from eldr.router.http.admin_key import AdminKey
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.message import Request
from eldr.router.http.server import ClientConnection
from eldr.router.observe.counters import Metrics

PATHS = (b"/health", b"/ready", b"/metrics")


class StatusApi:
    """Answers at that address. It is a handler of `ClientConnection`.

    reports: takes workers' reports of experts. None if nobody may report.
    closing: whether the process is stopping. /ready then says 503.
    running: always 0, because every answer is there at once.
    """

    running = 0

    def __init__(
        self,
        fleet: Fleet,
        metrics: Metrics,
        admin_key: AdminKey,
        collector: RouterCollector,
        reports: ExpertReports | None,
    ) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._admin_key = admin_key
        self._collector = collector
        self._reports = reports
        self.connections: set[ClientConnection] = set()
        self.closing = False

    def can_pick(self) -> bool:
        """Whether some model has workers for all legs that this process has workers for. There may be one for each."""
        for group in self._fleet.groups:
            legs = [leg for leg in group.legs if self._fleet.workers(leg)]
            if legs and all(group.whole.any_available(leg) for leg in legs):
                return True
        return False

    def answer_lines(self, headers: dict[bytes, bytes]) -> bytes:
        return b""

    def permit(self, method: bytes, path: bytes, headers: dict[bytes, bytes]) -> str:
        if path == REPORTS and self._reports is not None:
            return self._reports.permit(headers)
        return ""

    def refused(self, error: ApiError) -> None:
        self._metrics.requests["other", error.status] += 1

    async def end_all(self) -> None:
        """Nothing runs here."""

    def handle(self, request: Request, exchange: ClientExchange) -> None:
        path = request.path
        if path == REPORTS and self._reports is not None and request.method == b"POST":
            self._reports.handle(request, exchange)
        elif path not in PATHS:
            named = ", ".join(map(bytes.decode, PATHS))
            error = ApiError(404, f"Not Found: an endpoint picker answers a gateway over gRPC, and here {named}")
            self.refused(error)
            exchange.respond_error(error)
        elif request.method not in (b"GET", b"HEAD"):
            exchange.respond_error(ApiError(405, "Method Not Allowed: use GET"), b"allow: GET, HEAD\r\n")
        elif path == b"/metrics":
            named_too = self._admin_key.is_in(request.headers)
            body, content_type = self._collector.exposition(request.headers.get(b"accept", b""), named_too)
            exchange.respond(200, body, content_type.encode())
        elif path == b"/ready" and (self.closing or not self.can_pick()):
            exchange.respond_error(ApiError(503, "stopping" if self.closing else "no worker is available"))
        else:
            exchange.respond(200, b"{}")
