"""Ejection: when a worker that fails requests is taken out of service, and how it comes back.

This is a circuit breaker per worker, like Envoy's outlier detection and Hystrix, in one place and without IO. Time is
an argument, and random choices come from a seeded generator. A worker is

    IN      in service
    OUT     ejected until a certain time; each ejection lasts twice as long as the one before, up to a cap
    TRIAL   that time is over; its next request is its trial
    TRYING  the trial is running; it gets no other request until that one succeeds (IN) or fails (OUT)

Only a limited share of the workers that answer their probes may be out at once. At that share no other worker is
ejected. If other workers go down and the share is exceeded, those ejected first come back at once. A fleet in which
everything fails is therefore tried as a whole, as with Envoy's panic threshold, because the workers may not be at
fault.
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
    """The rules of ejection.

    consecutive: failures in a row that eject a worker.
    rate: the share of failures that ejects a worker.
    rate_requests: requests that must have ended in the last one to two windows before `rate` applies.
    window_s: the length of a window.
    base_s, max_s: the duration of the first ejection, and of the longest.
    jitter: each duration varies by this share either way.
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
    """One worker's outcomes in this window and the one before, and its ejections in a row."""

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
    """The ejection state of the workers of one role, by their id. `now_s` is monotonic and must not go back."""

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
        """Workers that are not IN, in the order in which they were ejected."""
        return self._not_in.keys()

    def forget(self, worker: str) -> None:
        self._records.pop(worker, None)
        self._not_in.pop(worker, None)

    def succeeded(self, worker: str, now_s: float) -> bool:
        """A request succeeded there. Returns True if it was the worker's trial, which puts it back IN."""
        record = self._record(worker)
        record.in_a_row = 0
        record.count(0, now_s, self._rules.window_s)
        if record.standing is not Standing.TRYING:
            return False
        self._return(worker, record, now_s)
        return True

    def failed(self, worker: str, now_s: float, up: Collection[str]) -> str | None:
        """A request failed there through the worker's fault.

        Returns the reason if that ejects the worker ("consecutive", "rate" or "trial"), or None.

        up: the workers that answer their probes, including ejected ones.
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
        """A request starts there. Returns True if it is the worker's trial."""
        record = self._records.get(worker)
        if record is None or record.standing is not Standing.TRIAL:
            return False
        record.standing = Standing.TRYING
        return True

    def ended(self, worker: str) -> bool:
        """A request that went there is over.

        Returns True if it was a trial without a verdict: the next request is the trial.
        """
        record = self._records.get(worker)
        if record is None or record.standing is not Standing.TRYING:
            return False
        record.standing = Standing.TRIAL
        return True

    def due(self, now_s: float) -> list[str]:
        """Put workers whose ejection is over on TRIAL, and return them."""
        over = [
            worker
            for worker in self._not_in
            if (record := self._records[worker]).standing is Standing.OUT and now_s >= record.until_s
        ]
        for worker in over:
            self._records[worker].standing = Standing.TRIAL
        return over

    def relieve(self, now_s: float, up: Collection[str]) -> list[str]:
        """Put workers back into service, oldest ejection first, until no more than the allowed share is out."""
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
            record.ejections = 0  # it has been healthy for long enough
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
