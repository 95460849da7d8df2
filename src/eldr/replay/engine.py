"""The simulation: a fleet of workers under one policy, each worker stepping its batch.

The workers compute whole runs of steps (`eldr.replay.worker`). An arrival cuts the run of its worker at the next step
boundary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from eldr.policies.base import DecodeRequest, Policy
from eldr.policies.refit import RefitSchedule
from eldr.replay.clock import Clock
from eldr.replay.fleet import FleetSpec, SimulatedFleet
from eldr.replay.learning import SimulatedLearning
from eldr.replay.measurements import ArrivalLog, RunResult, Window, result_of
from eldr.replay.packed import PackedTrace
from eldr.replay.refits import SimulatedRefits
from eldr.replay.worker import DecodeWorker, Running
from eldr.replay.workload import Draws, Workload

# Arrivals between two reports of progress.
PROGRESS_ARRIVALS = 64


class Engine:
    """Runs one policy once. Make a new engine for every run.

    clock, fleet: their state at the current arrival.
    """

    def __init__(
        self,
        trace: PackedTrace,
        workload: Workload,
        fleet: FleetSpec,
        policy: Policy,
        refits: RefitSchedule | None = None,
        learning: SimulatedLearning | None = None,
    ) -> None:
        self.clock = Clock()
        self.fleet = SimulatedFleet(fleet, policy)
        self._trace = trace
        self._policy = policy
        self._refits = None if refits is None else SimulatedRefits(policy, refits)
        self._learning = learning
        self._workload = workload
        self._draws = Draws(workload)
        self._log = ArrivalLog(len(workload.arrival_s))
        self._window = Window(workload)

    def run(self, progress: Callable[[int], None] | None = None) -> RunResult:
        """Replay every arrival until it ends.

        progress: called now and then with the number of requests that arrived since the last call.
        Raises ReplayError if more requests would be in flight than the trace has.
        """
        told = 0
        for arrival, now_s in enumerate(self._workload.arrival_s.tolist()):
            self._advance(now_s)
            if self._refits is not None:
                self._refits.advance(now_s)
            if self._learning is not None:
                self._learning.advance(now_s)
            if arrival in self._workload.fleet_changes:
                self.fleet.change(self._workload.fleet_changes[arrival])
            self._arrive(arrival)
            if progress is not None and arrival - told >= PROGRESS_ARRIVALS:
                progress(arrival - told)
                told = arrival
        self._advance(np.inf)
        if progress is not None:
            progress(len(self._workload.arrival_s) - told)
        return result_of(self._workload, self._trace, self._log, self._window)

    def _advance(self, until_s: float) -> None:
        """Handle every run that ends at or before `until_s`."""
        while (index := self.clock.next_end(until_s)) is not None:
            worker = self.fleet.workers[index]
            self._window.add(worker.run, len(worker.batch))
            computed, ended = worker.complete_run()
            for entry in computed:
                self._policy.prompt_computed(entry.request, worker.name)
            for entry in ended:
                self._end(entry, worker)
            end_s = worker.begin_run(self._trace, self.clock.now_s)
            if end_s is not None:
                self.clock.plan(index, end_s)

    def _arrive(self, arrival: int) -> None:
        trace, aggregated = self._trace, self._workload.aggregated
        index = self._draws.draw(arrival)
        prompt = self._workload.prompt(arrival, trace.prompt_tokens[index])
        request = DecodeRequest(
            request_id=f"{arrival}.{index}",
            prompt_tokens=prompt.tokens,
            counts=trace.counts[index] if self._workload.with_counts else None,
            label=trace.label[index],
            max_tokens=self._workload.max_tokens,
            words=None if trace.prompts is None else trace.prompts[index],
            computes_prompt=aggregated,
            cached_tokens=self.fleet.cached_tokens(prompt) if aggregated and prompt.blocks else None,
        )
        if self._learning is not None:
            self._learning.look_at(request, index)
        name = self._policy.choose(request, self.fleet.in_flight).worker
        worker = self.fleet.by_name[name]
        uncached = request.uncached_tokens(name) if aggregated else 0
        worker.cache.keep(prompt)
        entry = Running(
            arrival=arrival,
            arrived_s=self.clock.now_s,
            request=request,
            trace_index=index,
            row=trace.first_row[index],
            end_row=trace.end_row[index],
            context_tokens=prompt.tokens - uncached,
            reserved_tokens=prompt.tokens + trace.steps(index),
            prompt_left=uncached,
            first_token_s=self.clock.now_s,
        )
        worker.add(entry)
        self._log.placed(arrival, index, worker.index, prompt.tokens, prompt.tokens - uncached)
        self.fleet.started(request, name)
        end_s = None
        if worker.idle:
            end_s = worker.begin_run(trace, self.clock.now_s)
        elif len(worker.waiting) == 1 and worker.fits(entry):
            end_s = worker.cut_run(self.clock.now_s)
        if end_s is not None:
            self.clock.plan(worker.index, end_s)

    def _end(self, entry: Running, worker: DecodeWorker) -> None:
        """Log and release a finished request."""
        moe_s = worker.moe_s - entry.moe_at_start_s
        wait_s = entry.admitted_s - entry.arrived_s
        self._log.ended(entry.arrival, self.clock.now_s, entry.first_token_s, wait_s, moe_s)
        entry.request.generated_tokens = self._trace.steps(entry.trace_index) + 1
        self._draws.release(entry.trace_index)
        self.fleet.finished(entry.request, worker.name)
        if self._learning is not None and entry.arrival >= self._workload.measured.start:
            self._learning.finished(entry.trace_index)
