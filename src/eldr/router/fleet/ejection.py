"""When a worker that fails requests is taken out of service, and how it comes back.

A circuit breaker per worker, as Envoy's outlier detection and Hystrix do it, in one place and without IO: time is an
argument, chance a seeded generator. A worker is

    IN      in service
    OUT     ejected until a time; each ejection lasts twice as long as the one before, up to a cap
    TRIAL   that time is over: the next request is its trial
    TRYING  the trial runs; it gets nothing else until that request succeeds (IN) or fails (OUT)

At most a share of the workers that answer their probes is out at once. Above it nobody else is ejected, and when
others go down so that the share is exceeded, those that were ejected first come back at once: a fleet in which
everything fails is tried as a whole, as with Envoy's panic threshold, for then the fault may not be the workers'.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum


class Standing(Enum):
    IN = "in"
    OUT = "out"
    TRIAL = "trial"
    TRYING = "trying"


@dataclass(frozen=True, slots=True, kw_only=True)
class EjectionRules:
    """consecutive: failures in a row that eject.
    rate, rate_requests: share of failures that ejects, once so many requests ended in the last one to two windows.
    base_s, max_s: duration of the first ejection and of the longest; each is varied by `jitter` either way.
    share: the largest share of a role's workers that may be out, rounded down.
    """

    consecutive: int = 5
    rate: float = 0.5
    rate_requests: int = 20
    window_s: float = 10.0
    base_s: float = 5.0
    max_s: float = 300.0
    jitter: float = 0.2
    share: float = 0.5


class _Record:
    """One worker: its outcomes in this window and the one before, and its ejections in a row."""

    __slots__ = ("before", "ejections", "failures", "in_a_row", "returned_s", "since_s", "standing", "total", "until_s")

    def __init__(self) -> None:
        self.standing = Standing.IN
        self.in_a_row = 0
        self.ejections = 0
        self.until_s = 0.0
        self.returned_s = -math.inf
        self.clear()

    def clear(self) -> None:
        self.since_s = -math.inf
        self.total = self.failures = 0
        self.before = (0, 0)

    def count(self, failed: int, now_s: float, window_s: float) -> None:
        age_s = now_s - self.since_s
        if age_s >= window_s:
            self.before = (self.total, self.failures) if age_s < 2 * window_s else (0, 0)
            self.total = self.failures = 0
            self.since_s = now_s
        self.total += 1
        self.failures += failed


class Ejections:
    """The workers of one role, by their id. `now_s` is monotonic and never goes back."""

    def __init__(self, rules: EjectionRules, seed: int = 0) -> None:
        self._rules = rules
        self._random = random.Random(seed)
        self._records: dict[str, _Record] = {}
        self._not_in: dict[str, None] = {}  # in the order in which they were ejected

    def standing(self, worker: str) -> Standing:
        record = self._records.get(worker)
        return Standing.IN if record is None else record.standing

    @property
    def not_in(self) -> Collection[str]:
        """Workers that are not IN, the one ejected first in front."""
        return self._not_in.keys()

    def forget(self, worker: str) -> None:
        self._records.pop(worker, None)
        self._not_in.pop(worker, None)

    def succeeded(self, worker: str, now_s: float) -> bool:
        """A request got what it wanted there. True if that was its trial: it is IN again."""
        record = self._record(worker)
        record.in_a_row = 0
        record.count(0, now_s, self._rules.window_s)
        if record.standing is not Standing.TRYING:
            return False
        self._return(worker, record, now_s)
        return True

    def failed(self, worker: str, now_s: float, up: Collection[str]) -> str | None:
        """A request failed there by the worker's fault. Why that ejects it ("consecutive", "rate", "trial"), or None.

        up: the workers that answer their probes, ejected ones among them.
        """
        record = self._record(worker)
        record.in_a_row += 1
        record.count(1, now_s, self._rules.window_s)
        if record.standing is Standing.TRYING:
            reason: str | None = "trial"
        elif record.standing is Standing.IN:
            reason = self._verdict(record)
            if reason is not None and self._out_of(up) + 1 > self._most(up):
                return None
        else:
            return None  # a request from before the ejection
        if reason is not None:
            self._eject(worker, record, now_s)
        return reason

    def began(self, worker: str) -> bool:
        """A request goes there. True if it is the worker's trial."""
        record = self._records.get(worker)
        if record is None or record.standing is not Standing.TRIAL:
            return False
        record.standing = Standing.TRYING
        return True

    def ended(self, worker: str) -> bool:
        """A request that went there is over. True if a trial ended that way without a verdict: the next one is it."""
        record = self._records.get(worker)
        if record is None or record.standing is not Standing.TRYING:
            return False
        record.standing = Standing.TRIAL
        return True

    def due(self, now_s: float) -> list[str]:
        """Those whose ejection is over; they are on TRIAL from now on."""
        over = [
            worker
            for worker in self._not_in
            if (record := self._records[worker]).standing is Standing.OUT and now_s >= record.until_s
        ]
        for worker in over:
            self._records[worker].standing = Standing.TRIAL
        return over

    def relieve(self, now_s: float, up: Collection[str]) -> list[str]:
        """Take back into service, oldest ejection first, those that exceed the share of the workers that are up."""
        excess = self._out_of(up) - self._most(up)
        back = [worker for worker in self._not_in if worker in up][: max(0, excess)]
        for worker in back:
            self._return(worker, self._records[worker], now_s)
        return back

    def _record(self, worker: str) -> _Record:
        record = self._records.get(worker)
        if record is None:
            record = self._records[worker] = _Record()
        return record

    def _verdict(self, record: _Record) -> str | None:
        rules = self._rules
        if record.in_a_row >= rules.consecutive:
            return "consecutive"
        total, failures = record.total + record.before[0], record.failures + record.before[1]
        return "rate" if total >= rules.rate_requests and failures >= rules.rate * total else None

    def _out_of(self, up: Collection[str]) -> int:
        return sum(worker in up for worker in self._not_in)

    def _most(self, up: Collection[str]) -> int:
        return math.floor(self._rules.share * len(up))

    def _eject(self, worker: str, record: _Record, now_s: float) -> None:
        rules = self._rules
        if record.standing is Standing.IN and now_s - record.returned_s > rules.max_s:
            record.ejections = 0  # it has done well for long enough
        duration_s = min(rules.base_s * 2.0 ** min(record.ejections, 64), rules.max_s)
        record.until_s = now_s + duration_s * self._random.uniform(1 - rules.jitter, 1 + rules.jitter)
        record.ejections += 1
        record.standing = Standing.OUT
        self._not_in[worker] = None

    def _return(self, worker: str, record: _Record, now_s: float) -> None:
        record.standing = Standing.IN
        record.in_a_row = 0
        record.returned_s = now_s
        record.clear()
        del self._not_in[worker]
