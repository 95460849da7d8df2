"""The inputs of every experiment: a trace, how often to repeat, and how much load the trace can carry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eldr.errors import EldrError
from eldr.replay.experiment import BASELINES, Cell, Laboratory, Settings
from eldr.replay.output import as_object
from eldr.trace import Trace, read_trace

# A flat object of numbers and strings: one row of a table, or one point of a plot.
Row = dict[str, Any]
Part = dict[str, Any]

# The share of the served requests that may be in flight. Above it few requests are left to draw from, and policies
# would no longer see the same ones.
MOST_IN_FLIGHT = 0.8
MAIN_BATCH = 7.0
MAIN_WORKERS = (16, 8, 4, 2)
POLICIES = ("locality-band", "expected-union", "expected-union-own")


class EvaluationError(EldrError):
    """Raised when a trace does not allow an experiment, or a results file cannot be used. The message says why."""


@dataclass
class Bench:
    """One trace under evaluation, and how to run it.

    path: the trace file.
    seeds: paired repetitions of the main comparison. Other experiments use `fewer_seeds`.
    requests: measured requests per run.
    torch_python: an interpreter with PyTorch, for the measurements that need it.
    """

    path: Path
    seeds: int = 10
    requests: int = 2000
    torch_python: Path | None = None

    @cached_property
    def trace(self) -> Trace:
        return read_trace(self.path)

    @property
    def fewer_seeds(self) -> int:
        return max(2, self.seeds // 2)

    @cached_property
    def laboratory(self) -> Laboratory:
        """Half of the requests calibrate, the other half are served. The cost scope is "step"."""
        return Laboratory(self.trace, Settings(requests=self.requests))

    @cached_property
    def capacity(self) -> int:
        """The number of requests that may be in flight."""
        return int(MOST_IN_FLIGHT * len(self.laboratory.split(0).serve))

    @cached_property
    def workers(self) -> int:
        """Decode workers of the main comparison: as many as the trace can keep at MAIN_BATCH."""
        for workers in MAIN_WORKERS:
            if workers * MAIN_BATCH <= self.capacity:
                return workers
        raise EvaluationError(
            f"{self.path}: {self.trace.requests} requests are too few to keep two workers at batch {MAIN_BATCH:g}; "
            "record a longer trace"
        )

    def batches(self, workers: int, wanted: Sequence[float]) -> list[float]:
        """Return those of the wanted mean batches that the trace can sustain on `workers` workers."""
        return [batch for batch in wanted if batch * workers <= self.capacity]


@dataclass(frozen=True, slots=True)
class Experiment:
    """One experiment of the evaluation.

    name: its name.
    parts: splits the experiment into independent, JSON-serialisable pieces of work.
    run: computes the rows of one part.
    once: whether one run serves all traces, because the experiment does not use them.
    """

    name: str
    parts: Callable[[Bench], list[Part]]
    run: Callable[[Bench, Part], list[Row]]
    once: bool = False


def compare_at(
    laboratory: Laboratory, policies: Sequence[str], workers: int, batch: float, seeds: int, **columns: Any
) -> list[Row]:
    """Run the four load balancers and `policies` at the rate that gives jsq this mean batch. Returns rows."""
    rate = laboratory.rate_for_batch(batch, workers)
    cells = [run_cell(laboratory, name, workers, rate, batch, seeds) for name in dict.fromkeys((*BASELINES, *policies))]
    scope = laboratory.settings.options.cost_scope
    return [{"batch_target": batch, **columns, **as_object(cell, cells, scope)} for cell in cells]


def run_cell(laboratory: Laboratory, name: str, workers: int, rate: float, batch: float, seeds: int) -> Cell:
    """Run one policy with all seeds."""
    return Cell(name, workers, rate, [laboratory.run(name, workers, rate, batch, seed) for seed in range(seeds)])
