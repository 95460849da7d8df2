"""Lets policies take turns, round by round, with the same requests for all of them in a round.

What else the machine does then hurts all policies alike, and the change of TPOT from one policy to another is a change
within a round. The policies' routers run through all rounds, so that none of them begins again from nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from eldr.demo.engine_metrics import read_active_experts
from eldr.demo.measure import ActiveExperts, PolicyRun, Round
from eldr.demo.router_log import read_placements
from eldr.errors import EldrError
from eldr.load.client import Target, run_closed
from eldr.load.outcome import Outcome
from eldr.load.request import Request

# Enough for every decode worker to meet the prefill worker, and for every router to meet all of them.
WARM_UP_REQUESTS = 24
# No further round begins if it would probably end later than this after the warm-up began, but there are MIN_ROUNDS.
ROUNDS_TIME_S = 150.0
MIN_ROUNDS = 3
POLL_S = 1.0
# Shortly after the last token, the workers count their last step and the router logs its last request.
SETTLE_S = 0.5


def split(requests: Sequence[Request], size: int) -> list[Sequence[Request]]:
    """The requests of each round: WARM_UP_REQUESTS for the warm-up, then `size` each."""
    starts = range(WARM_UP_REQUESTS, len(requests), size)
    return [requests[:WARM_UP_REQUESTS], *(requests[start : start + size] for start in starts)]


async def run_rounds(
    rounds: Sequence[Sequence[Request]],
    take: Callable[[int, Sequence[Request]], Awaitable[None]],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run the warm-up, which is round 0, and the rounds after it, as many as there is time for.

    take: lets all policies take their turn in a round. clock: in seconds.
    """
    began_s = clock()
    longest_s = 0.0
    for number, requests in enumerate(rounds):
        started_s = clock()
        if number > MIN_ROUNDS and started_s - began_s + longest_s > ROUNDS_TIME_S:
            break
        await take(number, requests)
        if number:
            longest_s = max(longest_s, clock() - started_s)


class PolicyTurn:
    """A policy that takes its turn in every round.

    policy: its name.
    target: its router, or what it has in place of one.
    workers: URLs of the decode workers. router_log: at level debug.
    in_flight: how many requests are in flight at a time.
    run: what is measured.
    """

    def __init__(self, policy: str, target: Target, workers: Sequence[str], router_log: Path, in_flight: int) -> None:
        self.run = PolicyRun(policy)
        self._target = target
        self._workers = workers
        self._router_log = router_log
        self._in_flight = in_flight

    async def take(self, number: int, requests: Sequence[Request], advance: Callable[[], None]) -> None:
        """Send the requests of a round, the warm-up if it is round 0, and add what is measured to the run.

        advance: called after each request.
        """
        turn = Round(measured=number > 0)
        self.run.rounds.append(turn)

        def heard(outcome: Outcome) -> None:
            turn.outcomes.append(outcome)
            advance()

        # Earlier counts do not belong to the round.
        before = await read_active_experts(self._workers)
        poll = asyncio.create_task(self._follow(turn, before))
        started_s = time.monotonic()
        try:
            # With a name of its own, each turn starts with an empty prefix cache.
            target = dataclasses.replace(self._target, run=f"{self._target.run}-{number}")
            await run_closed(target, requests, self._in_flight, heard)
        finally:
            poll.cancel()
        turn.duration_s = time.monotonic() - started_s
        await asyncio.sleep(SETTLE_S)
        await self._update(turn, before)

    async def _update(self, turn: Round, before: dict[str, ActiveExperts]) -> None:
        now = await read_active_experts(self._workers)
        turn.active = {url: now[url] - before[url] for url in self._workers}
        self.run.served_by = read_placements(self._router_log)

    async def _follow(self, turn: Round, before: dict[str, ActiveExperts]) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            with contextlib.suppress(EldrError):  # a worker may be too busy; only the last reading counts
                await self._update(turn, before)
