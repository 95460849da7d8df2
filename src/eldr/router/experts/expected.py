"""The requests whose experts may be reported, and the checks that every report passes before anybody believes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from eldr.counts import CountsError, ExpertCounts
from eldr.router.experts.base import ExpertSink, MoeGeometry
from eldr.router.observe.counters import Metrics

# A report comes within seconds of a request's end. Of more requests than this, the oldest are forgotten.
MOST_EXPECTED: Final = 32768
UNSTATED_ROWS: Final = 2**31 - 1


class Expected:
    """One attempt whose report would be taken. request_id: empty if two attempts have the same name."""

    __slots__ = ("geometry", "most_rows", "request_id")

    def __init__(self, request_id: str, geometry: MoeGeometry | None, most_rows: int) -> None:
        self.request_id = request_id
        self.geometry = geometry
        self.most_rows = most_rows


class ExpectedReports:
    """Knows the attempts by the names of their decode legs, which workers see as X-Request-Id.

    sink: who learns. None if nobody does; reports are then checked and counted.
    geometries: by model, what its MoE layers must be. An empty name stands for all others.
    """

    def __init__(self, sink: ExpertSink | None, geometries: Mapping[str, MoeGeometry], metrics: Metrics) -> None:
        self._sink = sink
        self._geometries = geometries
        self._metrics = metrics
        self._expected: dict[str, Expected] = {}

    def geometry(self, model: str | None) -> MoeGeometry | None:
        """The MoE layers of `model`, if they are configured."""
        return self._geometries.get(model or "") or self._geometries.get("")

    def expect(self, leg_name: str, request_id: str, model: str | None, max_tokens: int | None) -> None:
        """An attempt starts. A client may use an id twice at once; nobody can tell these apart, so neither counts."""
        if leg_name in self._expected:
            self._expected[leg_name].request_id = ""
            return
        if len(self._expected) >= MOST_EXPECTED:
            del self._expected[next(iter(self._expected))]
        most_rows = UNSTATED_ROWS if max_tokens is None else max_tokens
        self._expected[leg_name] = Expected(request_id, self.geometry(model), most_rows)

    def forget(self, leg_name: str) -> None:
        """The attempt has failed. What its worker may report is not the request's answer."""
        self._expected.pop(leg_name, None)

    def knows(self, leg_name: str) -> bool:
        return leg_name in self._expected

    def take(self, source: str, leg_name: str, decode: ExpertCounts) -> None:
        """Check a report and pass it on. Raises CountsError, and counts it as refused, if it cannot be used.

        source: a metric label.
        """
        try:
            self._take(leg_name, decode)
        except CountsError as error:
            self.refused(source, error.reason)
            raise
        self._metrics.expert_reports[source, "accepted"] += 1

    def refused(self, source: str, reason: str) -> None:
        """Count a report that could not be used."""
        self._metrics.expert_reports[source, reason] += 1

    def _take(self, leg_name: str, decode: ExpertCounts) -> None:
        expected = self._expected.pop(leg_name, None)
        if expected is None:
            raise CountsError("unknown_request", f"no request of this router is called {leg_name!r}, or not any more")
        if not expected.request_id:
            raise CountsError("ambiguous", f"two requests are called {leg_name!r}")
        decode.check()
        found = MoeGeometry(decode.layers, decode.experts, decode.top_k)
        if expected.geometry is not None and found != expected.geometry:
            raise CountsError("geometry", f"the report is of {found}, expected {expected.geometry}")
        if decode.prompt_tokens > expected.most_rows:
            raise CountsError("inconsistent", f"{decode.prompt_tokens} rows for at most {expected.most_rows} tokens")
        if self._sink is not None:
            self._sink.report(expected.request_id, decode)
