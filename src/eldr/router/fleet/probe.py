"""Probes the workers: whether they are alive, which models they serve (lists.py), and how far off their clocks are."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime

from eldr.router.fleet.lists import ModelLists
from eldr.router.fleet.workers import Fleet, Worker
from eldr.router.http.client import Answer, ConnectError, ExchangeError, UpstreamError
from eldr.router.http.pool import WorkerPool

log = logging.getLogger("eldr.router")

# A worker that misses one probe may be busy. One that misses two is down. A refused connection means down at once.
FAILURES_TO_DOWN = 2
MODELS_EVERY_S = 10.0
# Without jitter, routers that start together would probe together.
JITTER = 0.2


class HealthProbe:
    """Watches one worker and keeps its state in the fleet up to date.

    changed: called when the worker goes up or down.
    check: raises UpstreamError for a worker that is alive but must not get requests.
    """

    def __init__(
        self,
        fleet: Fleet,
        worker: Worker,
        pool: WorkerPool,
        lists: ModelLists,
        *,
        interval_s: float,
        timeout_s: float,
        changed: Callable[[], None],
        check: Callable[[], Awaitable[None]],
    ) -> None:
        self._fleet = fleet
        self._worker = worker
        self._pool = pool
        self._lists = lists
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._changed = changed
        self._check = check
        self._failures = 0
        self._reported: bool | None = None
        self._models_at_s = float("-inf")

    async def run(self) -> None:
        while True:
            await self.probe()
            await asyncio.sleep(self._interval_s * random.uniform(1 - JITTER, 1 + JITTER))

    async def probe(self) -> None:
        """Run one round: /health, and /v1/models if it is due."""
        try:
            async with asyncio.timeout(self._timeout_s):
                self._note_clock(await self._get_health())
                if not self._worker.healthy or time.monotonic() - self._models_at_s > MODELS_EVERY_S:
                    self._note_clock(await self._lists.read(self._worker, self._timeout_s))
                    await self._check()
                    self._models_at_s = time.monotonic()
        except TimeoutError:
            self._failed(f"no answer within {self._timeout_s:g} s", FAILURES_TO_DOWN)
        except ConnectError as error:
            self._failed(str(error), 1)
        except UpstreamError as error:
            self._failed(str(error), FAILURES_TO_DOWN)
        else:
            self._failures = 0
            self._report(True, "")

    def _failed(self, reason: str, failures_to_down: int) -> None:
        self._failures += 1
        if self._failures >= failures_to_down or not self._worker.healthy:
            self._report(False, reason)

    def _report(self, healthy: bool, reason: str) -> None:
        worker = self._worker
        worker.problem = reason
        # A refused connection may have taken the worker out before the probe did.
        if worker.healthy != healthy or self._reported != healthy:
            self._fleet.set_healthy(worker, healthy)
            self._changed()
        if self._reported != healthy:
            self._reported = healthy
            if healthy:
                log.info("%s worker %s is up", worker.role, worker.url)
            else:
                log.warning("%s worker %s is down: %s", worker.role, worker.url, reason)

    async def _get_health(self) -> Answer:
        connection = await self._pool.connection()
        answer = Answer(ours=True)
        connection.start(answer, self._pool.request(b"GET", b"/health"), self._timeout_s)
        await connection.finish(answer)
        if answer.status != 200:
            raise ExchangeError(f"/health answered {answer.status}")
        return answer

    def _note_clock(self, answer: Answer) -> None:
        self._worker.clock_skew_s = _clock_skew_s(answer.headers.get(b"date"))


def _clock_skew_s(date: bytes | None) -> float | None:
    """Return a Date header minus our clock. Dates are cut to whole seconds, so half a second is added."""
    if date is None:
        return None
    try:
        return parsedate_to_datetime(date.decode("latin-1")).timestamp() + 0.5 - time.time()
    except ValueError:
        return None
