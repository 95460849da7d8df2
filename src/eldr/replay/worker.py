"""A simulated worker: the requests that wait and run, and the steps that it makes.

A worker makes one step after another. A step generates one token for every running request, and costs what the cost
model says for the true union of their experts.

An aggregated worker computes prompts too, in chunks, as vLLM does: a step has a budget of tokens. Every running request
takes one, and the prompts take the rest, first come, first served. A chunk activates the experts that so many tokens of
its prompt are expected to activate. Expectation is exact where it matters, since time is linear in experts, and it adds
no noise to the comparison of policies.

Between two changes of a worker's batch, all its steps are computed
at once, as a run: OR over the batch of [steps, words] bit sets, popcount, cumulative sum of step times.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr.cost import StepCost
from eldr.learning.step_counters import StepCounters
from eldr.policies.base import DecodeRequest
from eldr.replay.errors import ReplayError
from eldr.replay.packed import PackedTrace, request_rows, union_rows
from eldr.replay.prompts import PrefixCache
from eldr.replay.reading import Reading, unpacked

# At most this many steps are computed at once. It bounds memory, and the work that an arrival throws away.
MAX_RUN_STEPS = 256


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """The capacity of one decode worker.

    A request reserves room for its whole context when it is admitted, so nothing is ever preempted. Until then it
    waits, first come, first served.

    max_num_seqs: requests in a batch, at most.
    kv_tokens: tokens of context in the KV cache, at most. None for no limit.
    prefill_chunk: tokens that a step of an aggregated worker computes, decodes included. At least max_num_seqs, so that
        a prompt that has begun goes on in every step.
    """

    max_num_seqs: int = 256
    kv_tokens: int | None = None
    prefill_chunk: int = 2048


@dataclass(slots=True)
class Running:
    """A request at a worker.

    arrival: its number in the workload.
    arrived_s: when it arrived.
    request: the request as the policy sees it.
    trace_index: the index into the trace.
    row: the next row of the trace.
    end_row: one past the last row.
    context_tokens: the tokens of its context: of its prompt, as far as that was computed, and of the steps made.
    reserved_tokens: the tokens of KV cache that it reserves.
    prompt_left: the tokens of its prompt that this worker has yet to compute.
    admitted_s: when its first step here began.
    first_token_s: when its first token was made. A request whose prompt was computed elsewhere arrives with it.
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
    prompt_left: int = 0
    admitted_s: float = 0.0
    first_token_s: float = 0.0
    moe_at_start_s: float = 0.0


@dataclass(slots=True, eq=False)
class Run:
    """Steps of one batch.

    began_s: when the first step began.
    ends_s: float64 [S], the end of each step.
    active: uint64 [S, words], the experts that the running requests of each step activate.
    experts: float64 [S], the distinct experts of each step, summed over layers. Expected ones with a chunk.
    reads: float64 [S], the reads that each step waits for (`eldr.replay.reading`).
    planned: how many steps will be made before the batch changes.
    chunk: the prompts that share every step, with the tokens of each per step. A prompt ends with the last step or not
        at all.
    """

    began_s: float
    ends_s: NDArray[np.float64]
    active: NDArray[np.uint64]
    experts: NDArray[np.float64]
    reads: NDArray[np.float64]
    planned: int
    chunk: tuple[tuple[Running, int], ...] = ()

    @property
    def chunk_tokens(self) -> int:
        """The tokens of the chunk."""
        return sum([tokens for _, tokens in self.chunk])


class DecodeWorker:
    """One worker of the fleet. Times are those of the simulation.

    cost, moe_cost: the time of a step, and of its MoE layers alone.
    reading: the expert weights that its steps wait for.
    counters: what it counts of its steps, as an engine does.
    batch: the running requests.
    computing: the requests whose prompts have begun, in order of arrival.
    waiting: the other requests, in order of arrival.
    cache: the prompts that it has kept.
    run: the current run while it is not idle.
    moe_s: the time that its MoE layers have taken since the start.
    """

    def __init__(self, index: int, cost: StepCost, moe_cost: StepCost, reading: Reading, limits: WorkerLimits) -> None:
        self.index = index
        self.name = worker_name(index)
        self.cost = cost
        self.moe_cost = moe_cost
        self.reading = reading
        self.counters = StepCounters()
        self._costs = self._first_costs = (cost, moe_cost)
        self._layers = 0
        self.batch: list[Running] = []
        self.computing: list[Running] = []
        self.waiting: deque[Running] = deque()
        self.cache = PrefixCache(limits.kv_tokens)
        self.run = Run(0.0, np.empty(0), np.empty((0, 0), dtype=np.uint64), np.empty(0), np.empty(0), 0)
        self.moe_s = 0.0
        self._limits = limits
        self._reserved_tokens = 0

    def slow(self, factor: float) -> None:
        """From the next run on, take so many times as long for a step as at first."""
        self._costs = (self._first_costs[0].times(factor), self._first_costs[1].times(factor))

    @property
    def idle(self) -> bool:
        """Whether it makes no steps."""
        return not self.batch and not self.computing

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
        """Whether there is room for one more request."""
        limits = self._limits
        if len(self.batch) + len(self.computing) >= limits.max_num_seqs:
            return False
        return limits.kv_tokens is None or self._reserved_tokens + entry.reserved_tokens <= limits.kv_tokens

    def begin_run(self, trace: PackedTrace, now_s: float) -> float | None:
        """Admit the waiting requests that fit, and compute the steps until the next request or prompt ends.

        Returns when the run ends, or None if there is nothing to run.
        """
        self.cost, self.moe_cost = self._costs
        self._layers = trace.layers
        chunk = self._admit(now_s)
        batch = self.batch
        if not batch and not chunk:
            return None
        # As long as the first prompt takes the whole budget, all steps are alike.
        alike = [entry.prompt_left // tokens for entry, tokens in chunk]
        steps = min([*[entry.end_row - entry.row for entry in batch], *alike, MAX_RUN_STEPS])
        rows = [entry.row for entry in batch]
        union = union_rows(trace.words, rows, steps)
        nth = np.arange(1, steps + 1, dtype=np.float64)
        context_tokens = sum([entry.context_tokens for entry in batch]) + len(batch) * nth
        computed = 0
        if chunk:
            untouched = np.ones(trace.layers * trace.experts)
            for entry, tokens in chunk:
                untouched *= trace.untouched(entry.trace_index, tokens)
                context_tokens += entry.context_tokens + tokens * nth
                computed += tokens
            expected = 1 - (1 - unpacked(union, len(untouched))) * untouched
            experts, reads = expected.sum(axis=1), self.reading.of_expected(expected)
        else:
            experts = np.bitwise_count(union).sum(axis=1, dtype=np.float64)
            reads = self.reading.of_requests(union, request_rows(trace.words, rows, steps))
        ends_s = now_s + np.cumsum(self.cost.step_s(reads, len(batch) + computed, context_tokens))
        self.run = Run(now_s, ends_s, union, experts, reads, steps, chunk)
        return float(ends_s[-1])

    def _admit(self, now_s: float) -> tuple[tuple[Running, int], ...]:
        """Admit the waiting requests that fit. Returns the prompts that the next step computes, and how far."""
        chunk: list[tuple[Running, int]] = []
        budget = self._limits.prefill_chunk - len(self.batch)
        for entry in self.computing:
            chunk.append((entry, min(entry.prompt_left, budget)))
            budget -= chunk[-1][1]
        waiting = self.waiting
        while waiting and self.fits(waiting[0]) and (budget > 0 or not waiting[0].prompt_left):
            entry = waiting.popleft()
            entry.admitted_s = now_s
            self._reserved_tokens += entry.reserved_tokens
            if entry.prompt_left:
                self.computing.append(entry)
                chunk.append((entry, min(entry.prompt_left, budget)))
                budget -= chunk[-1][1]
            else:
                self._begin_decode(entry)
        return tuple(chunk)

    def _begin_decode(self, entry: Running) -> None:
        entry.moe_at_start_s = self.moe_s
        self.batch.append(entry)

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

    def complete_run(self) -> tuple[list[Running], list[Running]]:
        """Take the planned steps as made.

        Returns the requests whose prompts ended with the last one, and the requests that ended with it.
        """
        run, batch, moe = self.run, self.batch, self.moe_cost
        steps = run.planned
        self.reading.made(run.active[:steps])
        self._count(steps)
        total = float(run.reads[:steps].sum())
        self.moe_s += steps * moe.step_s(0.0, len(batch) + run.chunk_tokens, 0.0) + moe.per_expert_s * total
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
        computed: list[Running] = []
        for entry, tokens in run.chunk:
            entry.prompt_left -= steps * tokens
            entry.context_tokens += steps * tokens
            if not entry.prompt_left:
                computed.append(entry)
                entry.first_token_s = float(run.ends_s[steps - 1])
                self._begin_decode(entry)
        if computed:
            self.computing = [entry for entry in self.computing if entry.prompt_left]
        return computed, ended

    def _count(self, steps: int) -> None:
        """Count the first steps of the run. Those with a chunk do not count as decode steps with known experts."""
        run, counted, batch = self.run, self.counters, len(self.batch)
        decodes = 0 if run.chunk else steps
        self.counters = StepCounters(
            gaps=counted.gaps + steps * batch,
            gaps_s=counted.gaps_s + batch * (float(run.ends_s[steps - 1]) - run.began_s),
            steps=counted.steps + steps,
            experts=counted.experts + float(run.experts[:decodes].sum()),
            expert_steps=counted.expert_steps + decodes * self._layers,
            prompt_tokens=counted.prompt_tokens + steps * run.chunk_tokens,
            prompts=counted.prompts + sum([entry.prompt_left == steps * tokens for entry, tokens in run.chunk]),
        )

    def future_rows(self, now_s: float) -> list[tuple[int, int]]:
        """The (next row, end row) of every request here, waiting ones included."""
        made = int(np.searchsorted(self.run.ends_s[: self.run.planned], now_s))
        running = [(entry.row + made, entry.end_row) for entry in self.batch]
        return running + [(entry.row, entry.end_row) for entry in (*self.computing, *self.waiting)]


def worker_name(index: int) -> str:
    return f"w{index}"
