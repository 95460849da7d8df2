"""Background refits of the policy's zones, computed in a process of their own and adopted on the event loop.

If a refit fails, the zones stay as they are.
"""

from __future__ import annotations

import asyncio
import logging
import time

from eldr.policies.base import Policy
from eldr.policies.refit import RefitSchedule
from eldr.router.observe.counters import Metrics
from eldr.router.observe.logs import Throttle
from eldr.router.placement.helper import Helper

log = logging.getLogger("eldr.router")


class ZoneRefits:
    """Refits a policy's zones again and again until it is cancelled."""

    def __init__(self, policy: Policy, schedule: RefitSchedule, metrics: Metrics) -> None:
        self._policy = policy
        self._schedule = schedule
        self._metrics = metrics
        self._helper = Helper()
        self._throttle = Throttle()

    async def run(self) -> None:
        try:
            while True:
                await asyncio.sleep(self._schedule.interval_s)
                await self._refit()
        finally:
            self._helper.end()

    async def _refit(self) -> None:
        begun_s = time.monotonic()
        try:
            task = self._policy.refit_task(self._schedule.newest(begun_s, self._policy.signatures_seen))
            if task is None:
                return
            refit = await self._helper.run(task.run)
            self._policy.refitted(refit)
        except Exception as error:
            self._metrics.refits["failed"] += 1
            if self._throttle.due("refit"):
                log.error("zones could not be refitted and stay as they are: %s", error or type(error).__name__)
            return
        metrics = self._metrics
        metrics.refits["applied"] += 1
        metrics.last_refit_s = time.monotonic()
        metrics.refit_duration_s = metrics.last_refit_s - begun_s
        metrics.refit_shift = refit.shift
        metrics.zones_moved += refit.moved
