"""Learning from finished requests in simulated time."""

from __future__ import annotations

import numpy as np

from eldr.counts import ExpertCounts
from eldr.learning.learner import Learner, Taught
from eldr.policies.base import Policy
from eldr.replay.packed import PackedTrace

# How long a fit takes in the router's second process.
FIT_S = 1.0


class SimulatedLearning:
    """Takes a share of the finished requests as lessons, and hands the policy each model FIT_S seconds after it is due.

    share: of the finished requests, those that report their experts, drawn at random.
    """

    def __init__(self, policy: Policy, learner: Learner, trace: PackedTrace, share: float, seed: int) -> None:
        self._policy = policy
        self._learner = learner
        self._trace = trace
        self._share = share
        self._rng = np.random.default_rng([seed, 3])
        self._fitted: tuple[float, Taught] | None = None

    def finished(self, index: int) -> None:
        """A request of the trace has ended."""
        prompts = self._trace.prompts
        if prompts is not None and self._rng.random() < self._share:
            self._learner.take(prompts[index], self.report(index))

    def report(self, index: int) -> ExpertCounts:
        """What the worker of a finished request says of its decode rows."""
        return self._trace.decode_counts(index)

    def advance(self, now_s: float) -> None:
        """Call this before every choice. Between two choices a new model has no visible effect."""
        if self._fitted is not None:
            if now_s < self._fitted[0]:
                return
            learned = self._learner.taught(self._fitted[1])
            self._fitted = None
            if learned is not None:
                self._policy.learned(learned)
        task = self._learner.task()
        if task is not None:
            self._fitted = now_s + FIT_S, task.run()
