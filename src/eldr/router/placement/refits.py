"""Background refits of the policy's zones, computed in a process of their own and adopted on the event loop.

K-means holds the interpreter for whole seconds at 48 x 128 experts, which every stream would feel. A separate process
does not, and it may fail or be killed. The zones then stay as they are, and the next refit starts another process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from eldr.lifeline import become_helper
from eldr.policies.base import Policy
from eldr.policies.refit import Refit, RefitSchedule, RefitTask
from eldr.router.observe.counters import Metrics
from eldr.router.observe.logs import Throttle

log = logging.getLogger("eldr.router")

# A fit that takes longer is abandoned, and its process is ended.
FIT_TIMEOUT_S = 300.0


class ZoneRefits:
    """Refits a policy's zones again and again until it is cancelled."""

    def __init__(self, policy: Policy, schedule: RefitSchedule, metrics: Metrics) -> None:
        self._policy = policy
        self._schedule = schedule
        self._metrics = metrics
        self._pool: ProcessPoolExecutor | None = None
        self._throttle = Throttle()

    async def run(self) -> None:
        try:
            while True:
                await asyncio.sleep(self._schedule.interval_s)
                await self._refit()
        finally:
            self._end_process()

    async def _refit(self) -> None:
        begun_s = time.monotonic()
        try:
            task = self._policy.refit_task(self._schedule.newest(begun_s, self._policy.signatures_seen))
            if task is None:
                return
            refit = await asyncio.wait_for(self._fit(task), FIT_TIMEOUT_S)
            self._policy.refitted(refit)
        except Exception as error:
            self._metrics.refits["failed"] += 1
            if isinstance(error, BrokenProcessPool | TimeoutError):
                self._end_process()
            if self._throttle.due("refit"):
                log.error("zones could not be refitted and stay as they are: %s", error or type(error).__name__)
            return
        metrics = self._metrics
        metrics.refits["applied"] += 1
        metrics.last_refit_s = time.monotonic()
        metrics.refit_duration_s = metrics.last_refit_s - begun_s
        metrics.refit_shift = refit.shift
        metrics.zones_moved += refit.moved

    async def _fit(self, task: RefitTask) -> Refit:
        if self._pool is None:
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by the new process; one core is enough
            # Do not fork: the router's threads and its event loop must not be copied.
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), become_helper, (os.getpid(),))
        return await asyncio.get_running_loop().run_in_executor(self._pool, task.run)

    def _end_process(self) -> None:
        """End the process, whatever it is doing."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        for process in list((pool._processes or {}).values()):
            with contextlib.suppress(OSError):
                process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
