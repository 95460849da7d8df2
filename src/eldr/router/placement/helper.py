"""A second process for what would hold the interpreter for whole seconds, which every stream would feel.

It may fail or be killed. The next call then starts another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from eldr.lifeline import become_helper

# A computation that takes longer is abandoned, and its process is ended.
LIMIT_S = 300.0

Result = TypeVar("Result")


class Helper:
    """A process that computes one thing after another. It starts with the first."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    async def run(self, compute: Callable[[], Result]) -> Result:
        """Return what `compute` returns there. It must be picklable.

        Raises what it raises, TimeoutError, or BrokenProcessPool if the process ends.
        """
        if self._pool is None:
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by the new process; one core is enough
            # Do not fork: the router's threads and its event loop must not be copied.
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), become_helper, (os.getpid(),))
        try:
            return await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(self._pool, compute), LIMIT_S)
        except (BrokenProcessPool, TimeoutError):
            self.end()
            raise

    def end(self) -> None:
        """End the process, whatever it is doing."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        for process in list((pool._processes or {}).values()):
            with contextlib.suppress(OSError):
                process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
