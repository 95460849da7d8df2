"""Learns the step times of one model's workers from what they count of their steps, and tells the policy.

Every router learns for itself: what it reads is the workers' own, and the same for all.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from eldr.cost import StepCost
from eldr.learning.step_costs import CostLearner
from eldr.learning.step_counters import StepCounters
from eldr.learning.step_reports import LEAST_GAPS, layers_of, report_of
from eldr.policies.options import PolicyOptions
from eldr.policies.worker_costs import LearnedCost
from eldr.router.fleet.workers import Worker
from eldr.router.placement.decode import Placements

# The policy is told at most this often, and not of changes by less than CHANGED of a part of the line.
TELL_S = 1.0
CHANGED = 0.01
# A worker's steps last at least this share of the time per token that the router itself sees in the worker's fastest
# streams. So it gains little by lying, since the streams of a crowded worker are slow. Those streams were sent a while
# ago, and it may have become faster.
SEEN = 0.5


class StepCosts:
    """What is learned of one group's workers.

    placements: tells the policy, which must price steps.
    options: those of the policy, with the step times that are believed at first.
    clock: seconds that never go back.

    known: URL -> what was learned last.
    """

    def __init__(
        self, placements: Placements, options: PolicyOptions, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._placements = placements
        self._configured = options.step_costs()
        self._chunk_tokens = options.prefill_chunk
        self._clock = clock
        self._learner = CostLearner()
        self._seen: dict[str, StepCounters] = {}
        self._told: dict[str, LearnedCost] = {}
        self._next_s = 0.0
        self.known: dict[str, LearnedCost] = {}

    def counted(self, worker: Worker, counters: StepCounters) -> None:
        """A listener of the fleet (`Fleet.on_steps`), for the workers of its group."""
        url = worker.url
        if not self._placements.knows(url):
            return
        seen = self._seen.get(url)
        since = None if seen is None else counters.since(seen)
        if since is not None and since.gaps < LEAST_GAPS:
            return
        self._seen[url] = counters
        if since is None:  # the first look, or it has restarted
            return
        expected = self._placements.expected_step(url)
        report = report_of(since, expected, worker.busy, self._chunk_tokens)
        now_s = self._clock()
        if report is not None:
            report = dataclasses.replace(report, step_s=max(report.step_s, SEEN * worker.least_tpot_s))
            self._learner.heard(url, self._configured.configured(url, layers_of(expected)), report, now_s)
        if now_s >= self._next_s:
            self._next_s = now_s + TELL_S
            self._tell(now_s)

    def left(self, url: str) -> None:
        """A worker has left, or its process has ended."""
        self._learner.forget(url)
        for of_worker in (self._seen, self._told, self.known):
            of_worker.pop(url, None)

    def _tell(self, now_s: float) -> None:
        self.known = self._learner.learned(now_s)
        for url, learned in self.known.items():
            told = self._told.get(url)
            if told is None or _differs(learned, told):
                self._told[url] = learned
                self._placements.cost_learned(url, learned)


def _differs(learned: LearnedCost, told: LearnedCost) -> bool:
    """Whether two lines are far enough apart that the policy has to know."""
    return abs(learned.relative - told.relative) > CHANGED * told.relative or any(
        abs(new - old) > CHANGED * old for new, old in zip(_parts(learned.cost), _parts(told.cost), strict=True)
    )


def _parts(cost: StepCost) -> tuple[float, float]:
    return cost.base_s, cost.per_expert_s
