"""The simulation: a fleet of decode workers under one policy, each worker stepping its batch.

Every worker makes one decode step after another. A step generates one token for every running request, and costs what
the cost model says for the true union of their experts. Between two changes of a worker's batch, all its steps are
computed at once: OR over the batch of [steps, words] bit sets, popcount, cumulative sum of step times. An arrival cuts
such a run at the next step boundary.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from eldr.cost import StepCost
from eldr.policies.base import DecodeRequest, Policy
from eldr.policies.refit import RefitSchedule
from eldr.replay.errors import ReplayError
from eldr.replay.packed import PackedTrace
from eldr.replay.refits import SimulatedRefits
from eldr.replay.workload import Draws, Workload

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


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """The decode workers of a replay.

    costs: the cost model of each worker. Hardware may differ.
    moe_costs: the cost of the MoE layers alone, accounted in addition to the step time.
    limits: the limits that all workers share.
    """

    costs: tuple[StepCost, ...]
    moe_costs: tuple[StepCost, ...]
    limits: WorkerLimits = WorkerLimits()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(worker_name(index) for index in range(len(self.costs)))


def worker_name(index: int) -> str:
    return f"w{index}"


@dataclass(slots=True)
class _Running:
    """A request at a worker.

    row: the next row of the trace.
    end_row: one past the last row.
    """

    arrival: int
    request: DecodeRequest
    trace_index: int
    row: int
    end_row: int
    reserved_tokens: int
    moe_at_start_s: float = 0.0
    started_s: float = 0.0


@dataclass(slots=True)
class _Worker:
    index: int
    cost: StepCost
    moe_cost: StepCost
    batch: list[_Running] = field(default_factory=list)
    waiting: deque[_Running] = field(default_factory=deque)
    reserved_tokens: int = 0
    moe_s: float = 0.0  # time its MoE layers have taken since the start
    # The current run: the end of each step, and how many steps will be made before the batch changes.
    ends_s: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    experts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    planned: int = 0
    version: int = 0  # of the run; an event of an older version is void


@dataclass(frozen=True, slots=True, eq=False)
class RunResult:
    """The measurements of one run, over the requests that arrived in the measured window and the steps made in it.

    tpot_s: float64 [M], (last token - first token) / (tokens - 1) of each measured request. The first token is the one
        that prefill generated, so waiting at the decode worker counts.
    moe_tpot_s: float64 [M], the same for the time of the MoE layers alone.
    wait_s: float64 [M], from arrival to the first step.
    arrival_s: float64 [M].
    request: int64 [M], the index into the trace.
    worker: int64 [M].
    active_experts_mean: distinct experts per step and layer.
    batch_mean: requests per step.
    steps, tokens: made in the measured window by all workers.
    replayed_tokens: made in the whole run.
    """

    tpot_s: NDArray[np.float64]
    moe_tpot_s: NDArray[np.float64]
    wait_s: NDArray[np.float64]
    arrival_s: NDArray[np.float64]
    request: NDArray[np.int64]
    worker: NDArray[np.int64]
    active_experts_mean: float
    batch_mean: float
    steps: int
    tokens: int
    replayed_tokens: int


class Engine:
    """Runs one policy once. Make a new engine for every run."""

    def __init__(
        self,
        trace: PackedTrace,
        workload: Workload,
        fleet: FleetSpec,
        policy: Policy,
        refits: RefitSchedule | None = None,
    ) -> None:
        self.trace = trace
        self.policy = policy
        self._refits = None if refits is None else SimulatedRefits(policy, refits)
        self.workers = [
            _Worker(index, cost, moe_cost)
            for index, (cost, moe_cost) in enumerate(zip(fleet.costs, fleet.moe_costs, strict=True))
        ]
        self._names = list(fleet.names)
        self._draining: dict[str, int] = {}  # worker -> requests it still has
        self._index_of = {name: index for index, name in enumerate(self._names)}
        self._limits = fleet.limits
        self._workload = workload
        self._draws = Draws(workload)
        self._in_flight = dict.fromkeys(self._names, 0)
        self._events: list[tuple[float, int, int]] = []
        arrivals = len(workload.arrival_s)
        self._finish_s = np.full(arrivals, np.nan)
        self._moe_s = np.zeros(arrivals)
        self._wait_s = np.zeros(arrivals)
        self._worker_of = np.full(arrivals, -1, dtype=np.int64)
        self._request_of = np.full(arrivals, -1, dtype=np.int64)
        measured = workload.measured
        last = len(workload.arrival_s)
        self._from_s = float(workload.arrival_s[measured.start])
        self._until_s = float(workload.arrival_s[measured.stop]) if measured.stop < last else np.inf
        self._now_s = 0.0
        self._window_experts = self._window_steps = self._window_tokens = self._tokens = 0

    def run(self, progress: Callable[[int], None] | None = None) -> RunResult:
        """Replay every arrival until it ends.

        progress: called now and then with the number of requests that arrived since the last call.
        Raises ReplayError if more requests would be in flight than the trace has.
        """
        for name in self._names:
            self.policy.joined(name)
        told = 0
        for arrival, now_s in enumerate(self._workload.arrival_s.tolist()):
            self._advance(now_s)
            if self._refits is not None:
                self._refits.advance(now_s)
            if arrival in self._workload.fleet_changes:
                self._change_fleet(self._workload.fleet_changes[arrival])
            self._arrive(arrival, now_s)
            if progress is not None and arrival - told >= 64:
                progress(arrival - told)
                told = arrival
        self._advance(np.inf)
        if progress is not None:
            progress(len(self._workload.arrival_s) - told)
        return self._result()

    def _advance(self, until_s: float) -> None:
        """Handle every run that ends at or before `until_s`."""
        events = self._events
        while events and events[0][0] <= until_s:
            now_s, index, version = heapq.heappop(events)
            worker = self.workers[index]
            if version == worker.version:
                self._complete_run(worker, now_s)
                self._begin_run(worker, now_s)

    def _change_fleet(self, workers: int) -> None:
        """Let workers join, with the first worker's cost, or drain the workers that have been there longest."""
        for _ in range(workers):
            name = f"w{len(self.workers)}"
            first = self.workers[0]
            self._index_of[name] = len(self.workers)
            self._names.append(name)
            self.workers.append(_Worker(len(self.workers), first.cost, first.moe_cost))
            self._in_flight[name] = 0
            self.policy.joined(name)
        if -workers >= len(self._in_flight):
            raise ReplayError(f"{-workers} workers cannot leave a fleet of {len(self._in_flight)}")
        for name in list(self._in_flight)[: max(0, -workers)]:
            self._draining[name] = self._in_flight.pop(name)
            self._leave_if_idle(name)

    def _leave_if_idle(self, name: str) -> None:
        if self._draining.get(name) == 0:
            del self._draining[name]
            self.policy.left(name)

    def _arrive(self, arrival: int, now_s: float) -> None:
        trace = self.trace
        self._now_s = now_s
        index = self._draws.draw(arrival)
        counts = trace.counts[index] if self._workload.with_counts else None
        request = DecodeRequest(
            request_id=f"{arrival}.{index}",
            prompt_tokens=trace.prompt_tokens[index],
            counts=counts,
            label=trace.label[index],
            max_tokens=self._workload.max_tokens,
        )
        name = self.policy.choose(request, self._in_flight).worker
        worker = self.workers[self._index_of[name]]
        reserved = trace.prompt_tokens[index] + trace.steps(index)
        kv_tokens = self._limits.kv_tokens
        if kv_tokens is not None and reserved > kv_tokens:
            raise ReplayError(
                f"request {index} of the trace needs {reserved} tokens of KV cache, but a worker has only {kv_tokens}"
            )
        self._worker_of[arrival] = worker.index
        self._request_of[arrival] = index
        self._in_flight[name] += 1
        self.policy.started(request, name)
        entry = _Running(arrival, request, index, trace.first_row[index], trace.end_row[index], reserved)
        entry.started_s = now_s
        worker.waiting.append(entry)
        if not worker.batch:
            self._begin_run(worker, now_s)
        elif len(worker.waiting) == 1 and self._fits(worker, entry):
            self._cut_run(worker, now_s)

    def future_rows(self, index: int) -> list[tuple[int, int]]:
        """The (next row, end row) of every request at a worker, waiting ones included, at the current arrival."""
        worker = self.workers[index]
        made = int(np.searchsorted(worker.ends_s[: worker.planned], self._now_s)) if worker.batch else 0
        running = [(entry.row + made, entry.end_row) for entry in worker.batch]
        return running + [(entry.row, entry.end_row) for entry in worker.waiting]

    def _fits(self, worker: _Worker, entry: _Running) -> bool:
        limits = self._limits
        if len(worker.batch) >= limits.max_num_seqs:
            return False
        return limits.kv_tokens is None or worker.reserved_tokens + entry.reserved_tokens <= limits.kv_tokens

    def _cut_run(self, worker: _Worker, now_s: float) -> None:
        """End the run after the current step, so that a waiting request can join."""
        steps = int(np.searchsorted(worker.ends_s, now_s)) + 1
        if steps < worker.planned:
            self._plan(worker, steps)

    def _plan(self, worker: _Worker, steps: int) -> None:
        worker.planned = steps
        worker.version += 1
        heapq.heappush(self._events, (float(worker.ends_s[steps - 1]), worker.index, worker.version))

    def _begin_run(self, worker: _Worker, now_s: float) -> None:
        """Admit the waiting requests that fit, and compute the steps until the next request ends."""
        while worker.waiting and self._fits(worker, worker.waiting[0]):
            entry = worker.waiting.popleft()
            self._wait_s[entry.arrival] = now_s - entry.started_s
            entry.moe_at_start_s = worker.moe_s
            worker.reserved_tokens += entry.reserved_tokens
            worker.batch.append(entry)
        batch = worker.batch
        if not batch:
            return
        steps = min(min(entry.end_row - entry.row for entry in batch), MAX_RUN_STEPS)
        union = union_rows(self.trace.words, [entry.row for entry in batch], steps)
        worker.experts = self.trace.active_experts(union)
        context = sum(
            self.trace.prompt_tokens[entry.trace_index] + entry.row - self.trace.first_row[entry.trace_index]
            for entry in batch
        )
        context_tokens = context + len(batch) * np.arange(1, steps + 1, dtype=np.float64)
        experts = worker.experts.astype(np.float64)
        worker.ends_s = now_s + np.cumsum(worker.cost.step_s(experts, len(batch), context_tokens))
        self._plan(worker, steps)

    def _complete_run(self, worker: _Worker, now_s: float) -> None:
        """Account for the planned steps and release finished requests."""
        steps, batch = worker.planned, worker.batch
        self._account(worker, steps)
        total = int(worker.experts[:steps].sum())
        moe = worker.moe_cost
        worker.moe_s += steps * moe.step_s(0.0, len(batch), 0.0) + moe.per_expert_s * total
        still: list[_Running] = []
        for entry in batch:
            entry.row += steps
            if entry.row < entry.end_row:
                still.append(entry)
                continue
            self._finish_s[entry.arrival] = now_s
            self._moe_s[entry.arrival] = worker.moe_s - entry.moe_at_start_s
            worker.reserved_tokens -= entry.reserved_tokens
            name = self._names[worker.index]
            load = self._draining if name in self._draining else self._in_flight
            load[name] -= 1
            self._draws.release(entry.trace_index)
            self.policy.finished(entry.request, name)
            self._leave_if_idle(name)
        worker.batch = still

    def _account(self, worker: _Worker, steps: int) -> None:
        """Add the steps that end within the measured window to its sums."""
        ends_s = worker.ends_s[:steps]
        size = len(worker.batch)
        self._tokens += steps * size
        if ends_s[0] >= self._from_s and ends_s[-1] < self._until_s:
            first, last = 0, steps
        else:
            first, last = (int(at) for at in np.searchsorted(ends_s, (self._from_s, self._until_s)))
        self._window_steps += last - first
        self._window_tokens += (last - first) * size
        self._window_experts += int(worker.experts[first:last].sum())

    def _result(self) -> RunResult:
        part = slice(self._workload.measured.start, self._workload.measured.stop)
        request = self._request_of[part]
        steps = np.array([self.trace.steps(index) for index in request.tolist()], dtype=np.float64)
        made = max(self._window_steps, 1)
        return RunResult(
            tpot_s=(self._finish_s[part] - self._workload.arrival_s[part]) / steps,
            moe_tpot_s=self._moe_s[part] / steps,
            wait_s=self._wait_s[part],
            arrival_s=self._workload.arrival_s[part],
            request=request,
            worker=self._worker_of[part],
            active_experts_mean=self._window_experts / made / self.trace.layers,
            batch_mean=self._window_tokens / made,
            steps=self._window_steps,
            tokens=self._window_tokens,
            replayed_tokens=self._tokens,
        )


def union_rows(words: NDArray[np.uint64], rows: list[int], steps: int) -> NDArray[np.uint64]:
    """The experts of each step as bit sets, uint64 [steps, words]. Step s is the union over the rows `row + s`."""
    union = words[rows[0] : rows[0] + steps]
    if len(rows) > 1:
        union = union | words[rows[1] : rows[1] + steps]
        for row in rows[2:]:
            np.bitwise_or(union, words[row : row + steps], out=union)
    return union
