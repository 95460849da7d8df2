"""A simulated decode worker: the requests that wait and run, and the steps that it makes.

A worker makes one decode step after the other. A step takes every running request one token further, and the cost model
gives its time for the true union of their experts. Between two changes of a worker's batch all its steps are
computed in one go, a run: OR over the batch of [steps, words] bit sets, popcount, cumulative sum of step times.
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

# Steps computed at once: bounds the memory of a run, and the work that an arrival throws away.
MAX_RUN_STEPS = 256


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What one decode worker can hold.

    max_num_seqs: requests in a batch. kv_tokens: tokens of context in its KV cache, None for no limit. A request
    reserves the room of its whole context when it is admitted, so that nothing is ever preempted; until then it
    waits, first come first served.
    """

    max_num_seqs: int = 256
    kv_tokens: int | None = None


@dataclass(slots=True)
class Running:
    """A request at a worker.

    arrival: its number in the workload. trace_index: which request of the trace it is. row: next row of the trace.
    end_row: one past its last. context_tokens: of its prompt and of the steps made. reserved_tokens: of KV cache.
    admitted_s: when it came into the batch. moe_at_start_s: the worker's `moe_s` then.
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
    """Steps of one batch. ends_s: float64 [S], when each of them ends. experts: int64 [S], active experts of each.
    planned: how many of them will be made before the batch changes."""

    ends_s: NDArray[np.float64]
    experts: NDArray[np.int64]
    planned: int


class DecodeWorker:
    """One worker of the fleet. Times are those of the simulation.

    cost: of its steps. batch: the running requests. waiting: the others, in order of arrival. run: the
    steps under way while there is a batch. moe_s: time that its MoE layers have taken since the start.
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
                f"request {entry.trace_index} of the trace needs {entry.reserved_tokens} tokens of KV cache, a worker "
                f"has {kv_tokens}"
            )
        self.waiting.append(entry)

    def fits(self, entry: Running) -> bool:
        """Whether there is room for one more request in the batch."""
        limits = self._limits
        if len(self.batch) >= limits.max_num_seqs:
            return False
        return limits.kv_tokens is None or self._reserved_tokens + entry.reserved_tokens <= limits.kv_tokens

    def begin_run(self, trace: PackedTrace, now_s: float) -> float | None:
        """Admit what waits and fits, and compute the steps until the next request ends.

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
        """End the run after the step under way, so that a waiting request can join.

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
        """(next row, end row) of every request that is here, waiting ones included."""
        made = int(np.searchsorted(self.run.ends_s[: self.run.planned], now_s))
        running = [(entry.row + made, entry.end_row) for entry in self.batch]
        return running + [(entry.row, entry.end_row) for entry in self.waiting]


def worker_name(index: int) -> str:
    return f"w{index}"
