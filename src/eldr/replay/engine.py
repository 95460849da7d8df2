"""The simulation: a fleet of workers behind one or more routers, each worker stepping its batch.

The workers compute whole runs of steps (`eldr.replay.worker`). An arrival cuts the run of its worker at the next step
boundary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from eldr.policies.base import DecodeRequest
from eldr.replay.clock import Clock
from eldr.replay.fleet import FleetSpec, SimulatedFleet
from eldr.replay.measurements import ArrivalLog, RunResult, Window, result_of
from eldr.replay.packed import PackedTrace
from eldr.replay.replicas import Replica, Replicas
from eldr.replay.worker import DecodeWorker, Running
from eldr.replay.workload import Draws, Workload

# Arrivals between two reports of progress.
PROGRESS_ARRIVALS = 64


class Engine:
    """Runs one policy once, in one or more routers. Make a new engine for every run.

    clock, fleet: their state at the current arrival.
    """

    def __init__(
        self,
        trace: PackedTrace,
        workload: Workload,
        fleet: FleetSpec,
        routers: Replicas,
    ) -> None:
        self.clock = Clock()
        self.fleet = SimulatedFleet(fleet, routers)
        for router in routers.routers:
            if router.costs is not None:
                router.costs.attach(self.fleet)
        self._trace = trace
        self._routers = routers
        self._workload = workload
        self._draws = Draws(workload)
        self._log = ArrivalLog(len(workload.request))
        self._window = Window(workload)
        self._in_flight = 0

    def run(self, progress: Callable[[int], None] | None = None) -> RunResult:
        """Replay every arrival until it ends.

        progress: called now and then with the number of requests that arrived since the last call.
        Raises ReplayError if more requests would be in flight than the trace has.
        """
        told, arrivals = 0, len(self._workload.request)
        for arrival in range(arrivals):
            self._wait_for(arrival)
            self._routers.advance(self.clock.now_s)
            if arrival in self._workload.fleet_changes:
                self.fleet.change(self._workload.fleet_changes[arrival])
            for name, factor in self._workload.slowdowns.get(arrival, {}).items():
                self._slow(name, factor)
            self._arrive(arrival)
            if progress is not None and arrival - told >= PROGRESS_ARRIVALS:
                progress(arrival - told)
                told = arrival
        self._advance(np.inf)
        if progress is not None:
            progress(arrivals - told)
        return result_of(self._workload, self._trace, self._log, self._window)

    def _wait_for(self, arrival: int) -> None:
        """Handle every run that ends before this arrival, which comes at its time or as soon as others have ended."""
        times, most = self._workload.arrival_s, self._workload.in_flight
        if times is not None:
            self._advance(float(times[arrival]))
            return
        while self._in_flight >= most:
            index = self.clock.next_end(np.inf)
            assert index is not None, "requests in flight end"
            self._handle(index)

    def _advance(self, until_s: float) -> None:
        """Handle every run that ends at or before `until_s`."""
        while (index := self.clock.next_end(until_s)) is not None:
            self._handle(index)

    def _handle(self, index: int) -> None:
        """The run of this worker has ended."""
        worker = self.fleet.workers[index]
        self._window.add(worker.run, len(worker.batch))
        computed, ended = worker.complete_run()
        for entry in computed:
            self._routers.prompt_computed(self._router(entry.arrival), entry.request, worker.name, self.clock.now_s)
        for entry in ended:
            self._end(entry, worker)
        end_s = worker.begin_run(self._trace, self.clock.now_s)
        if end_s is not None:
            self.clock.plan(index, end_s)

    def _slow(self, name: str, factor: float) -> None:
        """From the next step on, let a worker take so many times as long as at first. Unknown workers are ignored."""
        worker = self.fleet.by_name.get(name)
        if worker is not None:
            worker.slow(factor)
            end_s = None if worker.idle else worker.cut_run(self.clock.now_s)
            if end_s is not None:
                self.clock.plan(worker.index, end_s)

    def _router(self, arrival: int) -> Replica:
        """The router that this arrival goes to."""
        of_arrivals, routers = self._workload.router, self._routers.routers
        return routers[0 if of_arrivals is None else of_arrivals[arrival]]

    def _arrive(self, arrival: int) -> None:
        trace, aggregated = self._trace, self._workload.aggregated
        router = self._router(arrival)
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
        if router.learning is not None:
            router.learning.look_at(request, index)
        name = router.policy.choose(request, router.in_flight).worker
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
        self._in_flight += 1
        self._window.arrived(arrival, self.clock.now_s)
        self._log.placed(arrival, self.clock.now_s, index, worker.index, prompt.tokens, prompt.tokens - uncached)
        self.fleet.started(router, request, name, self.clock.now_s)
        end_s = None
        if worker.idle:
            end_s = worker.begin_run(trace, self.clock.now_s)
        elif len(worker.waiting) == 1 and worker.fits(entry):
            end_s = worker.cut_run(self.clock.now_s)
        if end_s is not None:
            self.clock.plan(worker.index, end_s)

    def _end(self, entry: Running, worker: DecodeWorker) -> None:
        """Log and release a finished request."""
        self._in_flight -= 1
        moe_s = worker.moe_s - entry.moe_at_start_s
        wait_s = entry.admitted_s - entry.arrived_s
        self._log.ended(entry.arrival, self.clock.now_s, entry.first_token_s, wait_s, moe_s)
        entry.request.generated_tokens = self._trace.steps(entry.trace_index) + 1
        self._draws.release(entry.trace_index)
        router = self._router(entry.arrival)
        self.fleet.finished(router, entry.request, worker.name, self.clock.now_s)
        if router.learning is not None and entry.arrival >= self._workload.measured.start:
            router.learning.finished(entry.trace_index)
