"""Runs the demo from start to end: the model, a fleet, calibration, the policies in turns, a verdict.

`eldr.demo.rounds` says how the policies take turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from eldr.calibration import Calibration, fit_calibration
from eldr.demo.gateway import Gateway, running_gateway
from eldr.demo.load import make_requests
from eldr.demo.model import write_model
from eldr.demo.outputs import TopTwo, check_outputs, top_two_gaps
from eldr.demo.padded import ExpertBytes, available_bytes, expert_bytes, inner_size_for, pad_experts
from eldr.demo.processes import MODEL_NAME, Workers, running_router, running_workers
from eldr.demo.prompts import make_prompts, mix_kinds
from eldr.demo.report import write_report
from eldr.demo.result import DemoResult
from eldr.demo.rounds import MIN_ROUNDS, WARM_UP_REQUESTS, PolicyTurn, run_rounds, split
from eldr.demo.step_cost import StepLine, batch_count, fit_line, measure_steps
from eldr.demo.summary import summarise, write_summary
from eldr.demo.view import View
from eldr.errors import EldrError
from eldr.load.client import Target, run_closed
from eldr.load.outcome import Outcome
from eldr.load.request import Request
from eldr.policies import POLICY_NAMES
from eldr.record import Connector, RecordOptions, record
from eldr.record import Prompt as RecordPrompt
from eldr.trace import write_trace

EXIT_FAILED = 1
EXIT_TERMINATED = 128 + signal.SIGTERM
# Calibration prompts in all. Every kind of text has the same share.
CALIBRATION_PROMPTS = 96
CALIBRATION_MAX_TOKENS = 48
CALIBRATION_IN_FLIGHT = 8
REFERENCE_IN_FLIGHT = 32


class DemoError(EldrError):
    """The demo cannot run with these options, or one of its steps failed."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """The options of a demo run.

    vllm_python: the interpreter of the environment that holds vLLM and eldr.
    output: the folder for results.
    requests: how many each policy gets in a round. rounds: how many are measured, at most.
    in_flight: how many requests the client keeps in flight, over all decode workers.
    seed: for prompts, lengths and calibration.
    gateway: put between client and workers, with an endpoint picker for each policy. None for routers.
    """

    vllm_python: Path
    output: Path = Path("build/demo")
    requests: int = 48
    rounds: int = 9
    policies: Sequence[str] = ("jsq", "locality-band", "expected-union")
    decode_workers: int = 4
    in_flight: int = 40
    seed: int = 0
    gateway: Gateway | None = None

    def check(self) -> None:
        """Raises DemoError if the demo cannot run with these options."""
        unknown = [name for name in self.policies if name not in POLICY_NAMES]
        if unknown or not self.policies:
            raise DemoError(f"unknown policy {unknown[0] if unknown else ''!r}; choose from {', '.join(POLICY_NAMES)}")
        if len(set(self.policies)) < len(self.policies):
            raise DemoError("a policy is named twice")
        if self.rounds < MIN_ROUNDS:
            raise DemoError(f"{self.rounds} rounds are too few for an interval; take at least {MIN_ROUNDS}")
        if not self.vllm_python.is_file():
            raise DemoError(
                f"{self.vllm_python}: no such interpreter; give one that has vLLM installed, as `make demo` does"
            )
        for file in () if self.gateway is None else (self.gateway.envoy, self.gateway.config):
            if not file.is_file():
                raise DemoError(f"{file}: no such file; `make demo-gateway` gives both that a gateway needs")


def run_demo(options: DemoOptions) -> int:
    """Run the demo. Returns the exit code, which is 0 only if no request failed and every output passed its check.

    Ctrl-C (KeyboardInterrupt) and SIGTERM stop every process that the demo started. Raises EldrError if a step fails.
    """
    options.check()
    console = Console()
    try:
        return asyncio.run(_run_until_terminated(options, console))
    except asyncio.CancelledError:
        return EXIT_TERMINATED


async def _run_until_terminated(options: DemoOptions, console: Console) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    view = View(console)
    with view.live():
        demo = _Demo(options, view)
        result = await demo.run()
        with view.step("write summary and report"):
            write_summary(summarise(result), options.output / "summary.json")
            write_report(result, demo.requests, options.output / "report.html")
    view.conclude(result, options.output)
    return 0 if result.passed else EXIT_FAILED


class _Demo:
    """The steps of one run. Each keeps its results for the steps after it."""

    def __init__(self, options: DemoOptions, view: View) -> None:
        self.options = options
        self.view = view
        self.calibration_path = options.output / "calibration.npz"
        self.cost_path = options.output / "cost.json"
        calibration_prompts = make_prompts(CALIBRATION_PROMPTS, seed=options.seed)
        known = frozenset(prompt.text for prompt in calibration_prompts)
        count = WARM_UP_REQUESTS + options.rounds * options.requests
        served = mix_kinds(make_prompts(count, seed=options.seed + 1, exclude=known))
        self.calibration_prompts = calibration_prompts
        self.requests = make_requests(served, seed=options.seed)
        self.reference: list[Outcome] = []

    async def run(self) -> DemoResult:
        options, view = self.options, self.view
        shipped, heavy, logs = (options.output / name for name in ("model", "heavy-model", "logs"))
        with view.step("unpack the model and pad its experts"):
            logs.mkdir(parents=True, exist_ok=True)
            write_model(shipped)
            write_model(heavy)
            pad_experts(heavy, inner_size_for(shipped, available_bytes(), options.decode_workers))
        experts = ExpertBytes(expert_bytes(shipped), expert_bytes(heavy))
        view.say(experts.in_words())
        async with contextlib.AsyncExitStack() as stack:
            count = 2 + options.decode_workers
            with view.step(f"start 1 prefill, 1 plain and {options.decode_workers} decode workers", count) as step:
                workers = await stack.enter_async_context(
                    running_workers(options.vllm_python, shipped, heavy, logs, options.decode_workers, step.advance)
                )
            view.workers = workers.decode_urls
            calibration, _ = await asyncio.gather(self._calibrate(workers), self._ask_reference(workers))
            line = await self._measure_steps(workers, calibration.geometry.layers, experts.padded)
            result = DemoResult(calibration, workers.decode_urls, view.runs, line, experts)
            await self._run_rounds(workers)
            await self._check_outputs(workers, result)
        return result

    async def _calibrate(self, workers: Workers) -> Calibration:
        """Record the calibration prompts on the prefill worker and fit one zone for each decode worker."""
        prompts = [RecordPrompt({"prompt": prompt.text}, prompt.kind) for prompt in self.calibration_prompts]
        options = RecordOptions(
            workers.prefill.url,
            model=MODEL_NAME,
            max_tokens=CALIBRATION_MAX_TOKENS,
            concurrency=CALIBRATION_IN_FLIGHT,
        )
        with self.view.step("record calibration prompts", len(prompts)) as step:
            recording = await asyncio.to_thread(record, prompts, Connector(options), step.advance)
            if recording.failures:
                raise DemoError(f"{len(recording.failures)} prompts were not recorded: {recording.failures[0]}")
            write_trace(recording.trace, self.options.output / "trace.npz")
        with self.view.step("fit signatures and zones"):
            calibration = await asyncio.to_thread(
                fit_calibration, recording.trace, len(workers.decode), seed=self.options.seed
            )
            calibration.save(self.calibration_path)
        return calibration

    async def _ask_reference(self, workers: Workers) -> None:
        """Ask the plain worker for its output to every prompt, as the reference."""
        target = Target(workers.plain.url, MODEL_NAME, "reference")
        with self.view.step("reference outputs of the plain worker", len(self.requests)) as step:

            def heard(outcome: Outcome) -> None:
                if outcome.error is not None:
                    raise DemoError(f"the plain worker failed on request {outcome.number}: {outcome.error}")
                self.reference.append(outcome)
                step.advance()

            await run_closed(target, self.requests, REFERENCE_IN_FLIGHT, heard)

    async def _measure_steps(self, workers: Workers, layers: int, weight_bytes: int) -> StepLine:
        """Measure a step of a decode worker, while all other engines are idle, for the policies' cost model."""
        with self.view.step("measure what a decode step costs here", batch_count()) as step:
            url = workers.decode_urls[0]
            steps = await measure_steps(url, MODEL_NAME, layers, self.options.seed, step.advance)
            line = fit_line(steps, layers)
            line.cost_model(weight_bytes).save(self.cost_path)
        return line

    async def _run_rounds(self, workers: Workers) -> None:
        """Let the policies take turns: a warm-up, then rounds until they are all done or their time is up."""
        options, view = self.options, self.view
        async with contextlib.AsyncExitStack() as stack:
            turns = []
            for policy in options.policies:
                log = self._router_log(policy)
                url = await stack.enter_async_context(self._router(policy, workers))
                turns.append(
                    PolicyTurn(policy, Target(url, MODEL_NAME, policy), workers.decode_urls, log, options.in_flight)
                )
            view.runs += [turn.run for turn in turns]

            async def take(number: int, requests: Sequence[Request]) -> None:
                title = f"round {number}" if number else "warm up"
                with view.step(f"{title}: {', '.join(options.policies)}", len(requests) * len(turns)) as step:
                    for turn in turns:
                        await turn.take(number, requests, step.advance)

            await run_rounds(split(self.requests, options.requests), take)

    async def _check_outputs(self, workers: Workers, result: DemoResult) -> None:
        async def ask(number: int) -> TopTwo:
            return await top_two_gaps(workers.plain.url, MODEL_NAME, self.requests[number])

        with self.view.step("compare outputs with the plain worker's", len(result.runs)) as step:
            for run in result.runs:
                await check_outputs(run, self.reference, ask, result.check)
                step.advance()

    def _router(self, policy: str, workers: Workers) -> AbstractAsyncContextManager[str]:
        """A router, or a gateway and its picker, in front of the workers. Gives its URL."""
        flags = ["--policy", policy, "--calibration", str(self.calibration_path), "--cost", str(self.cost_path)]
        # At level debug, the router logs every request and its decode worker.
        flags += ["--log-level", "debug"]
        log, gateway = self._router_log(policy), self.options.gateway
        if gateway is None:
            return running_router(workers, flags, log)
        return running_gateway(gateway, workers, flags, log)

    def _router_log(self, policy: str) -> Path:
        return self.options.output / "logs" / f"router-{policy}.log"
