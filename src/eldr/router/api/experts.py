"""POST /eldr/experts: where workers with eldr's connector report the experts of finished requests."""

from __future__ import annotations

import asyncio
from collections import Counter

import orjson

from eldr.router.api.whole import Whole
from eldr.router.experts.connector_reports import MAX_REPORTS, is_known, read_batch, take_reports
from eldr.router.experts.watch import ExpertSources
from eldr.router.http.admin_key import AdminKey
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.message import Request

PATH = b"/eldr/experts"
# Reports that are checked in one turn of the event loop. Each takes some 30 us, and streams wait meanwhile.
AT_ONCE = 8
# A question to the other processes: whose reports these are. And the answer of one to which none belongs.
REPORTS = b"reports"
NOTHING = b'{"outcomes":{},"taken":[]}'


class ExpertReports:
    """Checks the key of reports and takes them, a few in each turn of the event loop.

    key: without its file, nobody may report.
    whole: all processes of this router. A worker reports to any of them.
    """

    def __init__(self, sources: ExpertSources, key: AdminKey, whole: Whole) -> None:
        self._sources = sources
        self._key = key
        self._whole = whole
        if whole.siblings is not None:
            whole.siblings.answers[REPORTS] = self._of_another_process

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
        if self._whole.siblings is None:
            self._next(reports, 0, Counter(), exchange)
            return
        strange = [report for report in reports if not is_known(report, self._sources.expected)]

        def finish(answers: list[bytes]) -> None:
            outcomes: Counter[str] = Counter()
            taken: set[int] = set()
            for answer in map(orjson.loads, answers):
                outcomes.update(answer["outcomes"])
                taken.update(answer["taken"])
            left = [report for index, report in enumerate(strange) if index not in taken]
            own = [report for report in reports if is_known(report, self._sources.expected)]
            self._next([*own, *left], 0, outcomes, exchange)

        self._whole.gather(REPORTS, orjson.dumps(strange), NOTHING, finish)

    async def _of_another_process(self, reports: bytes) -> bytes:
        """Take those that are of this process's requests. Returns the outcomes, and which were taken."""
        outcomes: Counter[str] = Counter()
        taken: list[int] = []
        for index, report in enumerate(orjson.loads(reports)):
            if is_known(report, self._sources.expected):
                if taken and len(taken) % AT_ONCE == 0:
                    await asyncio.sleep(0)
                take_reports([report], self._sources.expected, outcomes)
                taken.append(index)
        return orjson.dumps({"outcomes": outcomes, "taken": taken})

    def _next(self, reports: list[object], start: int, outcomes: Counter[str], exchange: ClientExchange) -> None:
        end = start + AT_ONCE
        take_reports(reports[start:end], self._sources.expected, outcomes)
        if end < len(reports):
            asyncio.get_running_loop().call_soon(self._next, reports, end, outcomes, exchange)
            return
        accepted = outcomes.pop("accepted", 0)
        exchange.respond(200, orjson.dumps({"accepted": accepted, "refused": dict(outcomes)}))
