"""Admission: requests wait here until the decode workers that serve their model have room for them.

They wait before their prefill, because a hand-off's lease must not run out in a queue. Each name of a model is a line
of its own, so that no request waits for workers that it cannot use. Higher priorities go first. Within one priority
clients take turns (`fair_queue`), and each client's requests for a model go first come, first served.

Aggregated workers are decode workers here, since they run the only leg that their requests have.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable
from typing import cast

from eldr.router.config.endpoint import LegName, Role
from eldr.router.config.groups import QueueLimits
from eldr.router.fleet.groups import ModelGroup, Served, Urls, model_not_found
from eldr.router.fleet.workers import Worker
from eldr.router.http.errors import ApiError
from eldr.router.placement.fair_queue import FairQueue, QueueFullError
from eldr.router.placement.room import Need, spare
from eldr.router.placement.sharing import Sharing

PRIORITIES = ("high", "normal", "low")
RETRY_AFTER_S = 2
MAX_RETRY_AFTER_S = 60
NOWHERE: Urls = frozenset()
# A slot that has been free for so long, although other replicas wait and have the better right to it, is out of their
# reach. They hear of it within some 10 ms.
UNUSED_S = 0.1


class NoWorkerError(ApiError):
    """There is no worker of a role, or none that serves `model`, and waiting longer is pointless."""

    def __init__(self, role: Role, model: str = "") -> None:
        serving = f" that serves `{model}`" if model else ""
        super().__init__(503, f"no {role} worker{serving} is available", retry_after_s=RETRY_AFTER_S)


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

    __slots__ = ("claim", "over", "refusal", "served", "since_s", "timer")

    def __init__(self, claim: Claim, served: Served, timer: asyncio.TimerHandle | None = None) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.refusal: ApiError | None = None
        self.claim = claim
        self.served = served
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
    """Admits requests as long as the decode workers that serve their model have free slots, and queues the others.

    sharing: tells other replicas of promised slots. None if there are none.
    admitted: requests past the queue. queued: requests in it.
    refusals: requests that got no turn, by reason: full, displaced (by a client with fewer waiting) or timeout.
    """

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._queues: list[FairQueue[_Turn]] = [FairQueue(limits.max_queued) for _ in PRIORITIES]
        self._placing: list[tuple[ModelGroup, asyncio.Future[None]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._last_wait_s = 0.0
        self._unused: dict[ModelGroup, int] = {}  # slots that nobody with a better right has taken
        self.sharing: Sharing | None = None
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

    async def enter(self, claim: Claim, served: Served) -> None:
        """Wait for a slot at a decode worker that serves `served`. A cancelled wait leaves the queue.

        Raises NoWorkerError if there has been no such worker for `worker_wait_s`, ApiError 404 if none serves the model
        any more, 429 if the queue is full, and 503 if the wait was too long.
        """
        # What waits has no room, or it would not wait. So nobody is overtaken here who could start.
        if self._has_room(served):
            served.requests += 1
            self._admit(served)
            return
        if self._is_pointless(served):
            raise self._why_pointless(served)
        served.requests += 1
        try:
            await self._wait(claim, served)
        except BaseException:
            served.requests -= 1
            raise

    async def _wait(self, claim: Claim, served: Served) -> None:
        turn = self._queue_up(claim, served)
        try:
            await turn.over
        except asyncio.CancelledError:
            if turn.over.done() and not turn.over.cancelled() and turn.refusal is None:
                self._return(served)  # the slot arrived at the same moment
            else:
                self._drop(turn, None)
            raise
        if turn.refusal is not None:
            raise turn.take_refusal()

    def leave(self, served: Served) -> None:
        """Return the slot that `enter` gave."""
        served.requests -= 1
        self._return(served)

    def _admit(self, served: Served) -> None:
        self.admitted += 1
        if self._unused and served.group in self._unused:
            self._unused[served.group] -= 1
        served.promise()
        if self.sharing is not None:
            self.sharing.admission_changed()

    def _return(self, served: Served) -> None:
        self.admitted -= 1
        served.release()
        if self.sharing is not None:
            self.sharing.admission_changed()
        self._start_waiting()

    def changed(self) -> None:
        """Check the queue again, after the fleet or the limits changed."""
        for queue in self._queues:
            self._refuse_pointless(queue)
        self._start_waiting()

    def room_grew(self, groups: Collection[ModelGroup]) -> None:
        """Admit what has room now, after requests of other replicas ended or need no slot any more.

        groups: where that was. It costs next to nothing while they are full, however many requests wait.
        """
        free = [group for group in groups if group.free > 0]
        if free:
            self._wake(free)
            # With `narrow`, there may be slots that cannot be promised to those who have no worker yet.
            if any(group.narrow or group.room > 0 for group in free):
                self._admit_queued()

    def _start_waiting(self) -> None:
        """Admit what has room, after a request ended or the fleet changed."""
        self._wake(None)
        self._admit_queued()

    def _wake(self, groups: Collection[ModelGroup] | None) -> None:
        """Let the admitted requests of these groups, or of all, look again whether a worker is eligible."""
        if not self._placing:
            return
        placing, self._placing = self._placing, []
        for group, waiter in placing:
            if groups is not None and group not in groups:
                self._placing.append((group, waiter))
            elif not waiter.done():
                waiter.set_result(None)

    def _admit_queued(self) -> None:
        if not self.queued:
            return
        for queue in self._queues:
            while len(queue) and (turn := queue.pop(self._may_start())) is not None:
                self.queued -= 1
                if not turn.over.done():
                    self._last_wait_s = time.monotonic() - turn.since_s
                    self._admit(turn.served)
                    turn.end(None)

    def fleet_changed(self, worker: Worker) -> None:
        """A listener of the fleet."""
        self.changed()

    # Room.

    def _has_room(self, served: Served) -> bool:
        """Whether one more request for it can start. Every slot that is promised to another stays free for that one."""
        if self.admitted >= self._limits.max_streams:
            return False
        group = served.group
        if served.decode is None and not group.narrow:
            return group.room > 0 and self._may_use_more(group)
        workers = served.decode
        found = _spare(served, 0) if self._may_use_more(group) else set()
        return bool(found) if workers is None else not found.isdisjoint(workers)

    def _may_use_more(self, group: ModelGroup) -> bool:
        """Whether no other replica has the better right to a free slot: one that waits, and runs less than its part.

        Without this rule, a replica with a queue would keep every slot that it once got. The parts of all that wait are
        together no less than what runs and what is free, so as long as there is room, one of them may use it. If it
        cannot reach that slot, which nobody else knows, others may use it after a while.
        """
        waiting = group.waiting_elsewhere
        if not waiting or self._unused.get(group, 0) > 0:
            return True
        slots = used = 0
        for worker in group.workers["decode"].values():
            if worker.available:
                used += worker.in_flight
                slots += max(worker.max_inflight, worker.busy)
        if used + group.promised < math.ceil(slots / (waiting + 1)):
            return True
        if group.least_room is None and group.room > 0:
            group.least_room = group.room
            asyncio.get_running_loop().call_later(UNUSED_S, self._use_unused, group)
        return False

    def _use_unused(self, group: ModelGroup) -> None:
        """Admit requests to slots that stayed free all the time, whoever has the better right to them."""
        unused, group.least_room = group.least_room, None
        self._unused[group] = unused or 0
        self._admit_queued()
        del self._unused[group]

    def waits_for_slots(self, group: ModelGroup) -> bool:
        """Whether requests wait that any worker of this group could take."""
        if not self.queued or self.admitted >= self._limits.max_streams:
            return False
        for queue in self._queues:
            for line in queue.lines:
                served = cast(Served, line)
                if served.group is group and served.decode is None:
                    return True
        return False

    def _may_start(self) -> Callable[[Hashable], bool]:
        """Return a function that tells whether a line has room. It holds until the next request is admitted."""
        known: dict[Hashable, bool] = {}

        def may_start(line: Hashable) -> bool:
            served = cast(Served, line)
            key: Hashable = (served.group, served.decode)
            if key not in known:
                known[key] = self._has_room(served)
            return known[key]

        return may_start

    def usable(self, served: Served) -> Collection[str] | None:
        """Return the decode workers that an admitted request may take: those that serve it, and that others can spare.

        None if it may take any of the group.
        """
        narrow = served.group.narrow
        if not narrow or (len(narrow) == 1 and served in narrow):
            return served.decode
        found = _spare(served, 1)
        if served.decode is not None:
            found &= served.decode
        # After limits have dropped, more may be promised than there is. Then whoever comes first takes what there is.
        return found or served.decode

    # Workers that are away.

    def patience_s(self, served: Served, leg: LegName) -> float:
        """How much longer to wait for a worker that runs `leg`. Infinite while one is available.

        A worker that restarts is back within seconds. If all of them stay away, requests are refused at once.
        """
        gone_s = served.gone_for_s(leg)
        return math.inf if gone_s is None else self._limits.worker_wait_s - gone_s

    def _is_pointless(self, served: Served) -> bool:
        """Whether a request need not wait for a decode worker.

        If the worker may return, schedules another check for when that time is over.
        """
        if _is_gone(served):
            return True
        left_s = self.patience_s(served, "decode")
        if 0 < left_s < math.inf:
            self._look_in(left_s)
        return left_s <= 0

    def _why_pointless(self, served: Served) -> ApiError:
        """A new error for each request: raised, it knows the frames that it passed."""
        if _is_gone(served) and served.name:
            return model_not_found(served.name)
        return _no_worker(served, "decode")

    def _look_in(self, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            if self._timer.when() <= loop.time() + delay_s:
                return
            self._timer.cancel()
        self._timer = loop.call_later(delay_s, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self.changed()

    def _refuse_pointless(self, queue: FairQueue[_Turn]) -> None:
        """End the requests of a queue whose workers stay away."""
        for line in list(queue.lines):
            served = cast(Served, line)
            if self._is_pointless(served):
                for turn in queue.take(line):
                    self.queued -= 1
                    turn.end(self._why_pointless(served))

    async def until_changed(self, served: Served, leg: LegName, limit_s: float = math.inf) -> bool:
        """Wait, after admission, until a worker that runs `leg` may have become eligible.

        Returns False after `limit_s` seconds.

        Raises NoWorkerError if there has been none for too long.
        """
        patience_s = self.patience_s(served, leg)
        if patience_s <= 0:
            raise _no_worker(served, leg)
        if limit_s <= 0:
            return False
        waiter = asyncio.get_running_loop().create_future()
        self._placing.append((served.group, waiter))
        try:
            async with asyncio.timeout(min(limit_s, patience_s)):
                await waiter
        except TimeoutError:
            return patience_s <= limit_s
        return True

    def _queue_up(self, claim: Claim, served: Served) -> _Turn:
        turn = _Turn(claim, served)
        try:
            displaced = self._queues[claim.priority].push(turn, claim.client, claim.cost, served)
        except QueueFullError:
            self.refusals["full"] += 1
            raise self._full() from None
        self.queued += 1
        if self.sharing is not None:
            self.sharing.admission_changed()
        if displaced is not None:
            self.queued -= 1
            self.refusals["displaced"] += 1
            displaced.end(self._full())
        turn.timer = asyncio.get_running_loop().call_later(self._limits.queue_timeout_s, self._too_late, turn)
        return turn

    def _too_late(self, turn: _Turn) -> None:
        self.refusals["timeout"] += 1
        why = f"no {turn.served.role('decode')} worker had room within {self._limits.queue_timeout_s:g} s"
        self._drop(turn, ApiError(503, why, retry_after_s=self._after_s()))

    def _drop(self, turn: _Turn, refusal: ApiError | None) -> None:
        self.queued -= self._queues[turn.claim.priority].remove(turn, turn.claim.client, turn.served)
        turn.end(refusal)
        if self.sharing is not None:
            self.sharing.admission_changed()

    def _full(self) -> ApiError:
        return ApiError(429, "too many requests are waiting; try again later", retry_after_s=self._after_s())

    def _after_s(self) -> int:
        """The Retry-After in seconds: how long the last request to get its turn has waited."""
        return min(max(1, math.ceil(self._last_wait_s)), MAX_RETRY_AFTER_S)


def _is_gone(served: Served) -> bool:
    """Whether no decode worker serves it any more."""
    return served.decode is not None and not served.decode


def _no_worker(served: Served, leg: LegName) -> NoWorkerError:
    """The error for a leg that no worker runs. It names the model if there are workers for others of its group."""
    return NoWorkerError(served.role(leg), served.name if served.group.whole.any_available(leg) else "")


def _spare(served: Served, placing: int) -> set[str]:
    """The workers of its group that can take one more request. placing: requests for it not to reckon with."""
    group = served.group
    free = {url: group.workers["decode"][url].free for url in group.eligible}
    narrow: dict[Urls, int] = {}  # a thousand adapters are on a few combinations of workers
    wide = group.promised + group.promised_elsewhere  # others may need fewer workers, but nobody knows which
    for each in group.narrow:
        wide -= each.promised
        workers = each.decode or NOWHERE
        narrow[workers] = narrow.get(workers, 0) + each.promised - placing * (each is served)
    needs: list[Need] = [*narrow.items(), (free, wide - placing * (served not in group.narrow))]
    return spare(needs, free)
