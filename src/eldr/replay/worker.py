"""A simulated decode worker: the requests that wait and run, and the steps that it makes.

A worker makes one decode step after another. A step generates one token for every running request, and costs what the
cost model says for the true union of their experts. Between two changes of a worker's batch, all its steps are computed
at once, as a run: OR over the batch of [steps, words] bit sets, popcount, cumulative sum of step times.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr.cost import StepCost
from eldr.policies.base import DecodeRequest
from eldr.replay.errors import ReplayError
from eldr.replay.packed import PackedTrace, union_rows

# At most this many steps are computed at once. It bounds memory, and the work that an arrival throws away.
MAX_RUN_STEPS = 256


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """The capacity of one decode worker.

    A request reserves room for its whole context when it is admitted, so nothing is ever preempted. Until then it
    waits, first come, first served.

    max_num_seqs: requests in a batch, at most.
    kv_tokens: tokens of context in the KV cache, at most. None for no limit.
    """

    max_num_seqs: int = 256
    kv_tokens: int | None = None


@dataclass(slots=True)
class Running:
    """A request at a worker.

    arrival: its number in the workload.
    arrived_s: when it arrived.
    request: the request as the policy sees it.
    trace_index: the index into the trace.
    row: the next row of the trace.
    end_row: one past the last row.
    context_tokens: the tokens of its prompt and of the steps made.
    reserved_tokens: the tokens of KV cache that it reserves.
    admitted_s: when it joined the batch.
    moe_at_start_s: the worker's `moe_s` when it joined the batch.
    """

    arrival: int
    arrived_s: float
    request: DecodeRequest
    trace_index: int
    row: int
    end_row: int
    context_tokens: int
    reserved_tokens: int
    admitted_s: float = 0.0
    moe_at_start_s: float = 0.0


@dataclass(slots=True, eq=False)
class Run:
    """Steps of one batch.

    ends_s: float64 [S], the end of each step.
    experts: int64 [S], the active experts of each step, summed over layers.
    planned: how many steps will be made before the batch changes.
    """

    ends_s: NDArray[np.float64]
    experts: NDArray[np.int64]
    planned: int


class DecodeWorker:
    """One worker of the fleet. Times are those of the simulation.

    cost, moe_cost: the time of a step, and of its MoE layers alone.
    batch: the running requests.
    waiting: the other requests, in order of arrival.
    run: the current run while there is a batch.
    moe_s: the time that its MoE layers have taken since the start.
    """

    def __init__(self, index: int, cost: StepCost, moe_cost: StepCost, limits: WorkerLimits) -> None:
        self.index = index
        self.name = worker_name(index)
        self.cost = cost
        self.moe_cost = moe_cost
        self.batch: list[Running] = []
        self.waiting: deque[Running] = deque()
        self.run = Run(np.empty(0), np.empty(0, dtype=np.int64), 0)
        self.moe_s = 0.0
        self._limits = limits
        self._reserved_tokens = 0

    def add(self, entry: Running) -> None:
        """Let a request wait. Raises ReplayError if it needs more KV cache than the worker has."""
        kv_tokens = self._limits.kv_tokens
        if kv_tokens is not None and entry.reserved_tokens > kv_tokens:
            raise ReplayError(
                f"request {entry.trace_index} of the trace needs {entry.reserved_tokens} tokens of KV cache, but a "
                f"worker has only {kv_tokens}"
            )
        self.waiting.append(entry)

    def fits(self, entry: Running) -> bool:
        """Whether there is room for one more request in the batch."""
        limits = self._limits
        if len(self.batch) >= limits.max_num_seqs:
            return False
        return limits.kv_tokens is None or self._reserved_tokens + entry.reserved_tokens <= limits.kv_tokens

    def begin_run(self, trace: PackedTrace, now_s: float) -> float | None:
        """Admit the waiting requests that fit, and compute the steps until the next request ends.

        Returns when the run ends, or None if there is nothing to run.
        """
        while self.waiting and self.fits(self.waiting[0]):
            entry = self.waiting.popleft()
            entry.admitted_s = now_s
            entry.moe_at_start_s = self.moe_s
            self._reserved_tokens += entry.reserved_tokens
            self.batch.append(entry)
        batch = self.batch
        if not batch:
            return None
        steps = min(*[entry.end_row - entry.row for entry in batch], MAX_RUN_STEPS)
        experts = trace.active_experts(union_rows(trace.words, [entry.row for entry in batch], steps))
        context = sum([entry.context_tokens for entry in batch])
        context_tokens = context + len(batch) * np.arange(1, steps + 1, dtype=np.float64)
        step_s = self.cost.step_s(experts.astype(np.float64), len(batch), context_tokens)
        ends_s = now_s + np.cumsum(step_s)
        self.run = Run(ends_s, experts, steps)
        return float(ends_s[-1])

    def cut_run(self, now_s: float) -> float | None:
        """End the run after the current step, so that a waiting request can join.

        Returns when the run now ends, or None if it ends there anyway.
        """
        run = self.run
        steps = int(np.searchsorted(run.ends_s, now_s)) + 1
        if steps >= run.planned:
            return None
        run.planned = steps
        return float(run.ends_s[steps - 1])

    def complete_run(self) -> list[Running]:
        """Take the planned steps as made. Returns the requests that ended with the last one."""
        steps, batch, moe = self.run.planned, self.batch, self.moe_cost
        total = int(self.run.experts[:steps].sum())
        self.moe_s += steps * moe.step_s(0.0, len(batch), 0.0) + moe.per_expert_s * total
        still: list[Running] = []
        ended: list[Running] = []
        for entry in batch:
            entry.row += steps
            entry.context_tokens += steps
            if entry.row < entry.end_row:
                still.append(entry)
            else:
                self._reserved_tokens -= entry.reserved_tokens
                ended.append(entry)
        self.batch = still
        return ended

    def future_rows(self, now_s: float) -> list[tuple[int, int]]:
        """The (next row, end row) of every request here, waiting ones included."""
        made = int(np.searchsorted(self.run.ends_s[: self.run.planned], now_s))
        running = [(entry.row + made, entry.end_row) for entry in self.batch]
        return running + [(entry.row, entry.end_row) for entry in self.waiting]


def worker_name(index: int) -> str:
    return f"w{index}"
