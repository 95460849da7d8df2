"""POST /eldr/experts: where workers with eldr's connector report the experts of finished requests."""

from __future__ import annotations

import asyncio
from collections import Counter

import orjson

from eldr.router.experts.connector_reports import MAX_REPORTS, read_batch, take_reports
from eldr.router.experts.watch import ExpertSources
from eldr.router.http.admin_key import AdminKey
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.message import Request

PATH = b"/eldr/experts"
# Reports that are checked in one turn of the event loop. Each takes some 30 us, and streams wait meanwhile.
AT_ONCE = 8


class ExpertReports:
    """Checks the key of reports and takes them, a few in each turn of the event loop.

    key: without its file, nobody may report.
    """

    def __init__(self, sources: ExpertSources, key: AdminKey) -> None:
        self._sources = sources
        self._key = key

    def permit(self, headers: dict[bytes, bytes]) -> str:
        """Return the name of a client that may report. Raises ApiError 401 before its body is read."""
        if not self._sources.reports or not self._key.is_in(headers):
            raise ApiError(401, "reports need their own key, as Authorization: Bearer KEY (see --report-key-file)")
        return "reports"

    def handle(self, request: Request, exchange: ClientExchange) -> None:
        try:
            reports = read_batch(request.body)
        except ApiError as error:
            exchange.respond_error(error)
            return
        assert len(reports) <= MAX_REPORTS
        self._next(reports, 0, Counter(), exchange)

    def _next(self, reports: list[object], start: int, outcomes: Counter[str], exchange: ClientExchange) -> None:
        end = start + AT_ONCE
        take_reports(reports[start:end], self._sources.expected, outcomes)
        if end < len(reports):
            asyncio.get_running_loop().call_soon(self._next, reports, end, outcomes, exchange)
            return
        accepted = outcomes.pop("accepted", 0)
        exchange.respond(200, orjson.dumps({"accepted": accepted, "refused": dict(outcomes)}))
