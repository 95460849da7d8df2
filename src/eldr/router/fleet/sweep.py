"""The router's one periodic check for anything that has waited too long. It replaces timers per leg or per token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from eldr.router.fleet.outcomes import Outcomes
from eldr.router.fleet.workers import Worker
from eldr.router.http.pool import WorkerPool

PERIOD_S = 0.25


async def sweep(pools: Mapping[Worker, WorkerPool], outcomes: Outcomes) -> None:
    """Every PERIOD_S, forever: fail exchanges whose worker is late or silent, and end ejections that are over."""
    while True:
        await asyncio.sleep(PERIOD_S)
        now_s = time.monotonic()
        for pool in list(pools.values()):
            pool.check(now_s)
        outcomes.sweep(now_s)
