"""What a background refit of zones costs the router's event loop. Run: python benchmarks/refit.py

A ticker wakes every millisecond and notes how late it is, with nothing else on the loop, with refits in a process of
their own (as the router has them), and with refits in a thread. 48 x 128 experts, 16 workers, 2048 signatures.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time

import numpy as np

from eldr.policies.base import Policy
from eldr.policies.refit import CAPACITY, Refit, RefitSchedule, RefitTask, SignatureWindow
from eldr.router.observe.counters import Metrics
from eldr.router.placement.refits import ZoneRefits

DIMENSION = 48 * 128
WORKERS = 16
INTERVAL_S = 0.2
TICK_S = 0.001
ROUND_S = 10.0


class Fitted(Policy):
    """A policy that is only ever refitted."""

    name = "fitted"

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        kinds = rng.uniform(0, 1, (WORKERS, DIMENSION)) ** 4
        self._window = SignatureWindow(DIMENSION)
        for number in range(CAPACITY):
            signature = (kinds[number % WORKERS] + rng.uniform(0, 0.3, DIMENSION)).astype(np.float32)
            self._window.add(signature / np.linalg.norm(signature))
        self._centroids = (kinds / np.linalg.norm(kinds, axis=1, keepdims=True)).astype(np.float32)
        self.loop_cpu_ms: list[float] = []

    def choose(self, request: object, in_flight: object) -> object:  # type: ignore[override]
        raise NotImplementedError

    @property
    def signatures_seen(self) -> int:
        return self._window.seen

    def refit_task(self, newest: int) -> RefitTask:
        begun_s = time.thread_time()
        codes = self._window.newest(CAPACITY)
        self.loop_cpu_ms.append(1e3 * (time.thread_time() - begun_s))
        return RefitTask(tuple(map(str, range(WORKERS))), self._centroids, codes, seed=0)

    def refitted(self, refit: Refit) -> None:
        begun_s = time.thread_time()
        self._centroids = refit.centroids.astype(np.float32)
        self.loop_cpu_ms[-1] += 1e3 * (time.thread_time() - begun_s)


class InThread(ZoneRefits):
    """The same without a process."""

    async def _fit(self, task: RefitTask) -> Refit:
        return await asyncio.to_thread(task.run)


async def lateness_ms(refits: ZoneRefits | None) -> list[float]:
    """How late each tick of a round was."""
    task = None if refits is None else asyncio.create_task(refits.run())
    await asyncio.sleep(3 if refits else 0)  # the process starts
    late: list[float] = []
    until_s = time.monotonic() + ROUND_S
    while time.monotonic() < until_s:
        begun_s = time.monotonic()
        await asyncio.sleep(TICK_S)
        late.append(1e3 * (time.monotonic() - begun_s - TICK_S))
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    return late


def show(name: str, late: list[float], metrics: Metrics | None = None) -> None:
    late = sorted(late)
    shares = ", ".join(f"p{share:g} {late[int(len(late) * share / 100)]:.2f}" for share in (50, 99, 99.9))
    fits = "" if metrics is None else f"; {metrics.refits['applied']} refits, the last {metrics.refit_duration_s:.2f} s"
    print(f"{name:12s} late by {shares}, most {late[-1]:.2f} ms{fits}", file=sys.stdout, flush=True)


def main() -> None:
    policy = Fitted()
    for _ in range(2):
        show("nothing", asyncio.run(lateness_ms(None)))
        for name, kind in (("in a process", ZoneRefits), ("in a thread", InThread)):
            metrics = Metrics()
            show(name, asyncio.run(lateness_ms(kind(policy, RefitSchedule(INTERVAL_S, 10), metrics))), metrics)
    print(f"CPU time on the loop: {statistics.median(policy.loop_cpu_ms):.2f} ms a refit")


if __name__ == "__main__":
    main()
