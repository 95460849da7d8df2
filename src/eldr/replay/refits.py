"""Background refits of a policy's zones in simulated time."""

from __future__ import annotations

from eldr.policies.base import Policy
from eldr.policies.refit import Refit, RefitSchedule

# How long a fit takes in the router's second process. Zones are then as old here as they are there.
FIT_S = 0.5


class SimulatedRefits:
    """Runs fits when the schedule says so, and hands each result to the policy FIT_S seconds later."""

    def __init__(self, policy: Policy, schedule: RefitSchedule) -> None:
        self._policy = policy
        self._schedule = schedule
        self._due_s = schedule.interval_s
        self._fitted: tuple[float, Refit] | None = None

    def advance(self, now_s: float) -> None:
        """Call this before every choice. Between two choices a refit has no visible effect."""
        self._apply(now_s)
        if now_s < self._due_s or self._fitted is not None:
            return
        self._due_s = now_s + self._schedule.interval_s
        task = self._policy.refit_task(self._schedule.newest(now_s, self._policy.signatures_seen))
        if task is not None:
            self._fitted = now_s + FIT_S, task.run()

    def _apply(self, now_s: float) -> None:
        if self._fitted is not None and now_s >= self._fitted[0]:
            self._policy.refitted(self._fitted[1])
            self._fitted = None
