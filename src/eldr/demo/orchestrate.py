"""Runs the demo from start to end: the model, a fleet, calibration, each policy under the same load, a verdict."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from eldr.calibration import Calibration, fit_calibration
from eldr.demo.engine_metrics import read_active_experts
from eldr.demo.gateway import Gateway, running_gateway
from eldr.demo.load import make_requests
from eldr.demo.measure import ActiveExperts, PolicyRun
from eldr.demo.model import write_model
from eldr.demo.outputs import TopTwo, check_outputs, top_two_gaps
from eldr.demo.processes import MODEL_NAME, Workers, running_router, running_workers
from eldr.demo.prompts import make_prompts
from eldr.demo.report import write_report
from eldr.demo.result import DemoResult
from eldr.demo.router_log import read_placements
from eldr.demo.summary import summarise, write_summary
from eldr.demo.view import View
from eldr.errors import EldrError
from eldr.load.client import Target, run_closed
from eldr.load.outcome import Outcome
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
WARM_UP_ROUNDS = 3
POLL_S = 1.0
# Shortly after the last token, the workers count their last step and the router logs its last request.
SETTLE_S = 0.5


class DemoError(EldrError):
    """The demo cannot run with these options, or one of its steps failed."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """The options of a demo run.

    vllm_python: the interpreter of the environment that holds vLLM and eldr.
    output: the folder for results. requests: how many each policy gets.
    in_flight: how many requests the client keeps in flight, over all decode workers.
    seed: for prompts, lengths and calibration.
    gateway: put between client and workers, with an endpoint picker for each policy. None for routers.
    """

    vllm_python: Path
    output: Path = Path("build/demo")
    requests: int = 200
    policies: Sequence[str] = ("jsq", "locality-band")
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
    view = View(console, options.requests)
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
        calibration_prompts = make_prompts(CALIBRATION_PROMPTS, seed=options.seed)
        known = frozenset(prompt.text for prompt in calibration_prompts)
        served = make_prompts(options.requests, seed=options.seed + 1, exclude=known)
        self.calibration_prompts = calibration_prompts
        self.requests = make_requests(served, seed=options.seed)
        self.reference: list[Outcome] = []

    async def run(self) -> DemoResult:
        options, view = self.options, self.view
        model, logs = options.output / "model", options.output / "logs"
        with view.step("unpack the model"):
            logs.mkdir(parents=True, exist_ok=True)
            write_model(model)
        async with contextlib.AsyncExitStack() as stack:
            count = 2 + options.decode_workers
            with view.step(f"start 1 prefill, 1 plain and {options.decode_workers} decode workers", count) as step:
                workers = await stack.enter_async_context(
                    running_workers(options.vllm_python, model, logs, options.decode_workers, step.advance)
                )
            view.workers = workers.decode_urls
            calibration, _ = await asyncio.gather(self._calibrate(workers), self._ask_reference(workers))
            await self._warm_up(workers)
            result = DemoResult(calibration, workers.decode_urls, view.runs)
            for policy in options.policies:
                await self._run_policy(policy, workers)
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

    async def _warm_up(self, workers: Workers) -> None:
        """Make every decode worker connect to the prefill worker, which would otherwise slow the first policy down."""
        count = WARM_UP_ROUNDS * len(workers.decode)
        requests = make_requests(self.calibration_prompts[:count], seed=self.options.seed)
        with self.view.step("warm up"):
            async with self._router("rr", workers) as url:
                target = Target(url, MODEL_NAME, "warm-up")
                await run_closed(target, requests, len(workers.decode), _raise_error)

    async def _run_policy(self, policy: str, workers: Workers) -> None:
        run = PolicyRun(policy)
        self.view.runs.append(run)
        with self.view.step(f"policy {policy}", len(self.requests)) as step:

            def heard(outcome: Outcome) -> None:
                run.outcomes.append(outcome)
                step.advance()

            async with self._router(policy, workers) as url:
                follow = _Follow(run, workers, self._router_log(policy))
                await follow.begin()
                started_s = time.monotonic()
                poll = asyncio.create_task(follow.forever())
                try:
                    # With its own name, each run starts with an empty prefix cache.
                    target = Target(url, MODEL_NAME, policy)
                    await run_closed(target, self.requests, self.options.in_flight, heard)
                finally:
                    poll.cancel()
                run.duration_s = time.monotonic() - started_s
                await asyncio.sleep(SETTLE_S)
                await follow.update()

    async def _check_outputs(self, workers: Workers, result: DemoResult) -> None:
        async def ask(number: int) -> TopTwo:
            return await top_two_gaps(workers.plain.url, MODEL_NAME, self.requests[number])

        with self.view.step("compare outputs with the plain worker's", len(result.runs)) as step:
            for run in result.runs:
                await check_outputs(run, self.reference, ask, result.check)
                step.advance()

    @contextlib.asynccontextmanager
    async def _router(self, policy: str, workers: Workers) -> AsyncIterator[str]:
        # At level debug, the router logs every request and its decode worker.
        flags = ["--policy", policy, "--calibration", str(self.calibration_path), "--log-level", "debug"]
        log, gateway = self._router_log(policy), self.options.gateway
        if gateway is None:
            async with running_router(workers, flags, log) as url:
                yield url
        else:
            async with running_gateway(gateway, workers, flags, log) as url:
                yield url

    def _router_log(self, policy: str) -> Path:
        return self.options.output / "logs" / f"router-{policy}.log"


def _raise_error(outcome: Outcome) -> None:
    if outcome.error is not None:
        raise DemoError(f"request {outcome.number} of the warm-up failed: {outcome.error}")


class _Follow:
    """Updates a run, while it lasts, from the decode workers' counters and the router's log."""

    def __init__(self, run: PolicyRun, workers: Workers, router_log: Path) -> None:
        self._run = run
        self._urls = workers.decode_urls
        self._router_log = router_log
        self._before: dict[str, ActiveExperts] = {}

    async def begin(self) -> None:
        """Remember the counters, so that earlier counts do not belong to the run."""
        self._before = await read_active_experts(self._urls)

    async def update(self) -> None:
        now = await read_active_experts(self._urls)
        self._run.active = {url: now[url] - self._before[url] for url in self._urls}
        self._run.served_by = read_placements(self._router_log)

    async def forever(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            with contextlib.suppress(EldrError):  # a worker may be too busy; only the last reading counts
                await self.update()
