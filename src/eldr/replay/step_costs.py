"""Step times learned in simulated time, from what a router would read of its workers now and then.

Every interval each worker is looked at. The mean of its steps since the last look comes from its counters, as from an
engine's metrics. The time is off by noise that differs at each look.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from eldr.learning.step_costs import CostLearner
from eldr.learning.step_counters import StepCounters
from eldr.learning.step_reports import LEAST_GAPS, layers_of, report_of
from eldr.policies.base import Policy
from eldr.policies.options import PolicyOptions

if TYPE_CHECKING:
    from eldr.replay.fleet import SimulatedFleet

# The default of `load_interval_s`.
INTERVAL_S = 2.0
# Standard deviation of the logarithm of a reported time.
NOISE = 0.03


class SimulatedCosts:
    """Looks at the workers of a fleet, and tells a policy what it learns of their step times.

    options: those of the policy, with the step times that are believed at first.
    """

    def __init__(self, policy: Policy, options: PolicyOptions, seed: int) -> None:
        self._policy = policy
        self._configured = options.step_costs()
        self._chunk_tokens = options.prefill_chunk
        self._rng = np.random.default_rng([seed, 5])
        self._learner = CostLearner()
        self._fleet: SimulatedFleet | None = None
        self._seen: dict[str, StepCounters] = {}
        self._next_s = INTERVAL_S

    def attach(self, fleet: SimulatedFleet) -> None:
        """Look at the workers of this fleet."""
        self._fleet = fleet

    def advance(self, now_s: float) -> None:
        """Call this before every choice."""
        while self._next_s <= now_s:
            self._look(self._next_s)
            self._next_s += INTERVAL_S

    def _look(self, now_s: float) -> None:
        fleet = self._fleet
        if fleet is None:
            return
        for name, running in fleet.in_flight.items():
            counters = fleet.by_name[name].counters
            counted = counters.since(self._seen.get(name, StepCounters()))
            if counted is None or counted.gaps < LEAST_GAPS:
                continue
            self._seen[name] = counters
            expected = self._policy.expected_step(name)
            report = report_of(counted, expected, running, self._chunk_tokens)
            if report is not None:
                report = dataclasses.replace(report, step_s=report.step_s * math.exp(self._rng.normal(0, NOISE)))
                self._learner.heard(name, self._configured.configured(name, layers_of(expected)), report, now_s)
        for name, learned in self._learner.learned(now_s).items():
            if name in fleet.in_flight:
                self._policy.cost_learned(name, learned)
