"""Admission: requests wait here until the decode workers have room for them.

They wait before their prefill, because a hand-off's lease must not run out in a queue. Higher priorities go first.
Within one priority clients take turns (`fair_queue`), and each client's requests go first come, first served.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict

from eldr.router.config.endpoint import Role
from eldr.router.config.groups import QueueLimits
from eldr.router.fleet.workers import Fleet, Worker
from eldr.router.http.errors import ApiError
from eldr.router.placement.fair_queue import FairQueue, QueueFullError

PRIORITIES = ("high", "normal", "low")
RETRY_AFTER_S = 2
MAX_RETRY_AFTER_S = 60


class NoWorkerError(ApiError):
    """There is no worker of a role, and waiting longer is pointless."""

    def __init__(self, role: Role) -> None:
        super().__init__(503, f"no {role} worker is available", retry_after_s=RETRY_AFTER_S)


class Claim:
    """What a request's turn depends on.

    client: identifies the client.
    priority: an index into PRIORITIES.
    cost: in tokens.
    """

    __slots__ = ("client", "cost", "priority")

    def __init__(self, client: bytes, priority: int, cost: int) -> None:
        self.client = client
        self.priority = priority
        self.cost = cost


class _Turn:
    """One waiting request.

    over: resolves when it may start, or when `refusal` says why it may not.
    """

    __slots__ = ("claim", "over", "refusal", "since_s", "timer")

    def __init__(self, claim: Claim, timer: asyncio.TimerHandle | None = None) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.refusal: ApiError | None = None
        self.claim = claim
        self.since_s = time.monotonic()
        self.timer = timer

    def end(self, refusal: ApiError | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if not self.over.done():
            self.refusal = refusal
            self.over.set_result(None)

    def take_refusal(self) -> ApiError:
        """Return the refusal, to be raised. Kept here it would be a cycle with the frames that know this turn."""
        refusal, self.refusal = self.refusal, None
        assert refusal is not None
        return refusal


class Admission:
    """Admits requests as long as the decode workers have free slots, and queues the others.

    refusals: requests that got no turn, by reason: full, displaced (by a client with fewer waiting) or timeout.
    """

    def __init__(self, fleet: Fleet, limits: QueueLimits) -> None:
        self._fleet = fleet
        self._limits = limits
        self._queues: list[FairQueue[_Turn]] = [FairQueue(limits.max_queued) for _ in PRIORITIES]
        self._placing: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._last_wait_s = 0.0
        self.queued = 0
        self.admitted = 0
        self.refusals: defaultdict[str, int] = defaultdict(int)

    @property
    def queued_by_priority(self) -> dict[str, int]:
        return {name: len(queue) for name, queue in zip(PRIORITIES, self._queues, strict=True)}

    def set_limits(self, limits: QueueLimits) -> None:
        """Use other limits from now on. Requests that already wait stay in the queue."""
        self._limits = limits
        for queue in self._queues:
            queue.limit = limits.max_queued
        self.changed()

    async def enter(self, claim: Claim) -> None:
        """Wait for a slot. A cancelled wait leaves the queue.

        Raises NoWorkerError if there has been no decode worker for `worker_wait_s`, ApiError 429 if the queue is full,
        and 503 if the wait was too long.
        """
        slots = self._slots()
        if slots == 0 and not self._worker_may_return():
            raise NoWorkerError("decode")
        if not self.queued and self.admitted < slots:
            self.admitted += 1
            return
        turn = self._queue_up(claim)
        try:
            await turn.over
        except asyncio.CancelledError:
            if turn.over.done() and not turn.over.cancelled() and turn.refusal is None:
                self.leave()  # the slot arrived at the same moment
            else:
                self._drop(turn, None)
            raise
        if turn.refusal is not None:
            raise turn.take_refusal()

    def leave(self) -> None:
        """Return the slot."""
        self.admitted -= 1
        self.changed()

    def changed(self) -> None:
        """Check the queue again, after a request ended or the fleet changed."""
        if self._placing:
            placing, self._placing = self._placing, []
            for waiter in placing:
                if not waiter.done():
                    waiter.set_result(None)
        if not self.queued:
            return
        slots = self._slots()
        if slots == 0 and self._worker_may_return():
            return
        while self.queued and (slots == 0 or self.admitted < slots):
            turn = self._pop()
            if slots == 0:
                turn.end(NoWorkerError("decode"))
            elif not turn.over.done():
                self._last_wait_s = time.monotonic() - turn.since_s
                self.admitted += 1
                turn.end(None)

    def fleet_changed(self, worker: Worker) -> None:
        """A listener of the fleet."""
        self.changed()

    def patience_s(self, role: Role) -> float:
        """How much longer to wait for a worker of `role`. Infinite while one is available.

        A worker that restarts is back within seconds. If a role stays away, its requests are refused at once.
        """
        gone_s = self._fleet.gone_for_s(role)
        return math.inf if gone_s is None else self._limits.worker_wait_s - gone_s

    def _worker_may_return(self) -> bool:
        """Whether to keep the queue although there is no decode worker.

        Schedules another check for when that time is over.
        """
        # Workers without a single slot do not count.
        left_s = min(self.patience_s("decode"), self._limits.worker_wait_s)
        if left_s > 0 and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._look_again)
        return left_s > 0

    def _look_again(self) -> None:
        self._timer = None
        self.changed()

    async def until_changed(self, role: Role, limit_s: float = math.inf) -> bool:
        """Wait, after admission, until a worker of `role` may have become eligible.

        Returns False after `limit_s` seconds.

        Raises NoWorkerError if there has been none for too long.
        """
        patience_s = self.patience_s(role)
        if patience_s <= 0:
            raise NoWorkerError(role)
        if limit_s <= 0:
            return False
        waiter = asyncio.get_running_loop().create_future()
        self._placing.append(waiter)
        try:
            async with asyncio.timeout(min(limit_s, patience_s)):
                await waiter
        except TimeoutError:
            return patience_s <= limit_s
        return True

    def _slots(self) -> int:
        return min(self._fleet.decode_slots, self._limits.max_streams)

    def _queue_up(self, claim: Claim) -> _Turn:
        turn = _Turn(claim)
        try:
            displaced = self._queues[claim.priority].push(turn, claim.client, claim.cost)
        except QueueFullError:
            self.refusals["full"] += 1
            raise self._full() from None
        self.queued += 1
        if displaced is not None:
            self.queued -= 1
            self.refusals["displaced"] += 1
            displaced.end(self._full())
        turn.timer = asyncio.get_running_loop().call_later(self._limits.queue_timeout_s, self._too_late, turn)
        return turn

    def _pop(self) -> _Turn:
        """Remove and return the next request to start. There must be one."""
        self.queued -= 1
        for queue in self._queues:
            turn = queue.pop()
            if turn is not None:
                return turn
        raise AssertionError("turns were counted that do not wait")

    def _too_late(self, turn: _Turn) -> None:
        self.refusals["timeout"] += 1
        wait_s = self._limits.queue_timeout_s
        self._drop(turn, ApiError(503, f"no decode worker had room within {wait_s:g} s", retry_after_s=self._after_s()))

    def _drop(self, turn: _Turn, refusal: ApiError | None) -> None:
        self.queued -= self._queues[turn.claim.priority].remove(turn, turn.claim.client)
        turn.end(refusal)

    def _full(self) -> ApiError:
        return ApiError(429, "too many requests are waiting; try again later", retry_after_s=self._after_s())

    def _after_s(self) -> int:
        """The Retry-After in seconds: how long the last request to get its turn has waited."""
        return min(max(1, math.ceil(self._last_wait_s)), MAX_RETRY_AFTER_S)
