"""Goodput: the highest request rate at which a policy keeps p99 TPOT under a limit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from eldr.replay.errors import ReplayError
from eldr.replay.experiment import Cell, Laboratory

# The bisection ends at this relative width.
TOLERANCE = 0.01
FIRST_BATCH = 1.0
MAX_DOUBLINGS = 20


def goodput(
    laboratory: Laboratory,
    policy: str,
    workers: int,
    limit_ms: float,
    seeds: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[Cell, bool]:
    """Find the highest rate at which p99 TPOT, averaged over seeds, is at most `limit_ms`.

    Returns the cell at that rate, and whether the limit was reached. If the trace is too short to go beyond the limit,
    the rate is the highest that could be replayed.
    Raises ReplayError if even a nearly idle fleet exceeds the limit.
    """

    def cell_at(rate: float) -> Cell | None:
        """Return None if the trace has too few requests for this load."""
        batch = laboratory.batch_at(rate, workers)
        try:
            runs = [laboratory.run(policy, workers, rate, batch, seed, progress=progress) for seed in range(seeds)]
        except ReplayError:
            return None
        return Cell(policy, workers, rate, runs, laboratory.settings.sharing)

    def p99_ms(cell: Cell) -> float:
        return 1e3 * float(np.mean([np.percentile(run.tpot_s, 99) for run in cell.runs]))

    rate = laboratory.rate_for_batch(min(FIRST_BATCH, len(laboratory.split(0).serve) / workers / 4), workers) / 4
    best = cell_at(rate)
    if best is None or p99_ms(best) > limit_ms:
        raise ReplayError(
            f"{policy} exceeds a p99 TPOT of {limit_ms:g} ms even on a nearly idle fleet; raise the limit"
        )
    too_high: float | None = None
    bounded_by_trace = False
    for _ in range(MAX_DOUBLINGS):
        cell = cell_at(best.rate * 2)
        if cell is None or p99_ms(cell) > limit_ms:
            too_high, bounded_by_trace = best.rate * 2, cell is None
            break
        best = cell
    while too_high is not None and too_high / best.rate - 1 > TOLERANCE:
        cell = cell_at(float(np.sqrt(best.rate * too_high)))
        if cell is None or p99_ms(cell) > limit_ms:
            too_high, bounded_by_trace = float(np.sqrt(best.rate * too_high)), cell is None
        else:
            best = cell
    return best, not bounded_by_trace
