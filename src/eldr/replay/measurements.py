"""Measurements of a run: of every arrival, and of the steps made in the measured window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr.replay.packed import PackedTrace
from eldr.replay.worker import Run
from eldr.replay.workload import Workload


@dataclass(frozen=True, slots=True, eq=False)
class RunResult:
    """The measurements of one run, over the requests that arrived in the measured window and the steps made in it.

    tpot_s: float64 [M], (last token - first token) / (tokens - 1) of each measured request. The first token is the one
        that prefill generated, so waiting at a decode worker counts. Waiting at an aggregated worker does not.
    ttft_s: float64 [M], from arrival to the first token. 0 if prefill generated that before.
    request_s: float64 [M], from arrival to the last token.
    moe_tpot_s: float64 [M], the same for the time of the MoE layers alone.
    wait_s: float64 [M], from arrival to the first step.
    arrival_s: float64 [M].
    request: int64 [M], the index into the trace.
    worker: int64 [M].
    prompt_tokens, cached_tokens: int64 [M], the length of its prompt, and how much of it the worker had. The latter is
        the whole prompt if prefill computed it before.
    active_experts_mean: distinct experts per step and layer.
    expert_reads_mean: reads that a step waits for, per layer (`eldr.replay.reading`).
    batch_mean: requests per step.
    steps, tokens: made in the measured window by all workers.
    replayed_tokens: made in the whole run.
    chunk_step_share, chunk_time_share: the share of these steps that computed prompts, and of their time.
    """

    tpot_s: NDArray[np.float64]
    ttft_s: NDArray[np.float64]
    request_s: NDArray[np.float64]
    moe_tpot_s: NDArray[np.float64]
    wait_s: NDArray[np.float64]
    arrival_s: NDArray[np.float64]
    request: NDArray[np.int64]
    worker: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    cached_tokens: NDArray[np.int64]
    active_experts_mean: float
    expert_reads_mean: float
    batch_mean: float
    steps: int
    tokens: int
    replayed_tokens: int
    chunk_step_share: float
    chunk_time_share: float


class ArrivalLog:
    """The course of each of n arrivals.

    arrived_s: float64 [n].
    request: int64 [n], the index into the trace.
    worker: int64 [n], the index of the worker.
    prompt_tokens, cached_tokens: int64 [n], the length of its prompt, and how much of it the worker had.
    first_token_s, finish_s: float64 [n], when it had its first token, and when it ended.
    wait_s: float64 [n], from arrival to the first step.
    moe_s: float64 [n], the time of the MoE layers in its steps.
    """

    def __init__(self, arrivals: int) -> None:
        self.arrived_s = np.full(arrivals, np.nan)
        self.request = np.full(arrivals, -1, dtype=np.int64)
        self.worker = np.full(arrivals, -1, dtype=np.int64)
        self.prompt_tokens = np.zeros(arrivals, dtype=np.int64)
        self.cached_tokens = np.zeros(arrivals, dtype=np.int64)
        self.first_token_s = np.full(arrivals, np.nan)
        self.finish_s = np.full(arrivals, np.nan)
        self.wait_s = np.zeros(arrivals)
        self.moe_s = np.zeros(arrivals)

    def placed(
        self, arrival: int, arrived_s: float, request: int, worker: int, prompt_tokens: int, cached_tokens: int
    ) -> None:
        """The arrival is this request of the trace and went to this worker."""
        self.arrived_s[arrival] = arrived_s
        self.request[arrival] = request
        self.worker[arrival] = worker
        self.prompt_tokens[arrival] = prompt_tokens
        self.cached_tokens[arrival] = cached_tokens

    def ended(self, arrival: int, finish_s: float, first_token_s: float, wait_s: float, moe_s: float) -> None:
        """The arrival's last token was made at `finish_s`."""
        self.first_token_s[arrival] = first_token_s
        self.finish_s[arrival] = finish_s
        self.wait_s[arrival] = wait_s
        self.moe_s[arrival] = moe_s


class Window:
    """Sums over the steps that end between the first measured arrival and the first one after the measured.

    steps, tokens: made in the window by all workers.
    experts, reads: the sums over these steps of their distinct experts and of their reads.
    chunk_steps: those of these steps that compute prompts.
    steps_s, chunk_steps_s: the time of these steps, and of those among them that compute prompts.
    replayed_tokens: made in the whole run.
    """

    def __init__(self, workload: Workload) -> None:
        self._measured = workload.measured
        self.steps = self.chunk_steps = self.tokens = self.replayed_tokens = 0
        self.experts = self.reads = self.steps_s = self.chunk_steps_s = 0.0
        self._from_s = self._until_s = np.inf

    def arrived(self, arrival: int, now_s: float) -> None:
        """Every run that ends before `now_s` has been added."""
        if arrival == self._measured.start:
            self._from_s = now_s
        elif arrival == self._measured.stop:
            self._until_s = now_s

    def add(self, run: Run, batch: int) -> None:
        """The planned steps of `run` have been made, by a batch of so many requests."""
        planned = run.planned
        ends_s = run.ends_s[:planned]
        self.replayed_tokens += planned * batch
        if ends_s[0] >= self._from_s and ends_s[-1] < self._until_s:
            first, last = 0, planned
        else:
            first, last = (int(at) for at in np.searchsorted(ends_s, (self._from_s, self._until_s)))
        self.steps += last - first
        self.tokens += (last - first) * batch
        self.chunk_steps += last - first if run.chunk else 0
        self.experts += float(run.experts[first:last].sum())
        self.reads += float(run.reads[first:last].sum())
        if first < last:
            took_s = float(ends_s[last - 1] - (ends_s[first - 1] if first else run.began_s))
            self.steps_s += took_s
            self.chunk_steps_s += took_s if run.chunk else 0.0


def result_of(workload: Workload, trace: PackedTrace, log: ArrivalLog, window: Window) -> RunResult:
    """The result of a run in which every measured arrival has ended."""
    part = slice(workload.measured.start, workload.measured.stop)
    request, arrival_s = log.request[part], log.arrived_s[part]
    steps = np.array([trace.steps(index) for index in request.tolist()], dtype=np.float64)
    finish_s, first_token_s = log.finish_s[part], log.first_token_s[part]
    made = max(window.steps, 1)
    return RunResult(
        tpot_s=(finish_s - first_token_s) / steps,
        ttft_s=first_token_s - arrival_s,
        request_s=finish_s - arrival_s,
        moe_tpot_s=log.moe_s[part] / steps,
        wait_s=log.wait_s[part],
        arrival_s=arrival_s,
        request=request,
        worker=log.worker[part],
        prompt_tokens=log.prompt_tokens[part],
        cached_tokens=log.cached_tokens[part],
        active_experts_mean=window.experts / made / trace.layers,
        expert_reads_mean=window.reads / made / trace.layers,
        batch_mean=window.tokens / made,
        steps=window.steps,
        tokens=window.tokens,
        replayed_tokens=window.replayed_tokens,
        chunk_step_share=window.chunk_steps / made,
        chunk_time_share=window.chunk_steps_s / window.steps_s if window.steps_s else 0.0,
    )
