"""Measures what a decode step costs on this machine: its time against the distinct experts that it reads.

One decode worker answers batches of different sizes, of one kind of text and of all kinds mixed, while all other
engines are idle. All requests of a batch generate equally many tokens, so their steps have the whole batch. The worker
counts the active experts of its steps itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from eldr.cost import CostModel, MoeLayerCost, RestCost, fit_moe_layer
from eldr.demo.engine_metrics import read_active_experts
from eldr.demo.prompts import make_prompts
from eldr.errors import EldrError
from eldr.load.client import Target, run_closed
from eldr.load.outcome import Outcome
from eldr.load.request import Request
from eldr.workloads.kinds import KINDS
from eldr.workloads.prompt import Prompt

BATCHES = (1, 2, 4, 8, 12)
TOKENS = 24
# Enough for a kind to show, and soon computed.
PROMPT_CHARS = 48
_MS = 1e3


class StepCostError(EldrError):
    """The steps of this machine cannot be measured, or have no line."""


@dataclass(frozen=True, slots=True)
class Step:
    """The mean decode step of one batch. active_experts: distinct experts, summed over the MoE layers."""

    batch: int
    active_experts: float
    time_ms: float


@dataclass(frozen=True, slots=True)
class StepLine:
    """The time of a decode step of this machine, base_ms + per_expert_ms * active experts + per_token_ms * batch.

    layers: MoE layers, over which active experts are summed. r2: of the fit to `steps`.
    """

    base_ms: float
    per_expert_ms: float
    per_token_ms: float
    r2: float
    layers: int
    steps: tuple[Step, ...]

    def time_ms(self, active_experts: float, batch: float) -> float:
        return self.base_ms + self.per_expert_ms * active_experts + self.per_token_ms * batch

    def cost_model(self, expert_bytes: int) -> CostModel:
        """The line as `eldr serve --cost` takes it, for the scope "step"."""
        return CostModel(
            name="eldr-demo",
            device="this machine's CPU, one thread a worker",
            source=f"steps of one decode worker, measured by eldr demo; experts of {expert_bytes} bytes",
            moe_layer=MoeLayerCost(0.0, self.per_expert_ms * _MS, 0.0, self.r2),
            rest=RestCost(0.0, 0.0, self.base_ms * _MS, self.per_token_ms * _MS, 0.0),
        )


def fit_line(steps: Sequence[Step], layers: int) -> StepLine:
    """Fit the line by least squares, with no coefficient below zero. Raises CostError if `steps` have no line."""
    experts, batch, time_ms = (
        np.array([getattr(step, name) for step in steps], dtype=np.float64)
        for name in ("active_experts", "batch", "time_ms")
    )
    fitted = fit_moe_layer(experts, batch, time_ms)
    assert fitted.r2 is not None
    return StepLine(fitted.base_us, fitted.per_expert_us, fitted.per_token_us, fitted.r2, layers, tuple(steps))


async def measure_steps(url: str, model: str, layers: int, seed: int, measured: Callable[[], None]) -> list[Step]:
    """Measure the batches on the decode worker at `url`. measured: called after each.

    Raises StepCostError if the worker fails, or EngineMetricsError.
    """
    kinds = list(KINDS)
    steps = []
    for number, (batch, kind) in enumerate(_batches(kinds)):
        prompts = [
            Prompt(prompt.kind, prompt.text[:PROMPT_CHARS])
            for prompt in make_prompts(batch * len(kinds), seed=seed + number)
            if kind is None or prompt.kind == kind
        ]
        requests = [Request(at, prompt, TOKENS) for at, prompt in enumerate(prompts[:batch])]
        outcomes: list[Outcome] = []
        before = await read_active_experts([url])
        await run_closed(Target(url, model, f"steps-{number}"), requests, batch, outcomes.append)
        active = (await read_active_experts([url]))[url] - before[url]
        failed = next((outcome.error for outcome in outcomes if outcome.error is not None), None)
        if failed is not None or active.mean is None:
            raise StepCostError(f"decode worker {url} failed while its steps were measured: {failed}")
        # The slowest prompts of a batch may be computed a step later than the others. The median step has them all.
        gaps_s = np.concatenate([outcome.itl_s for outcome in outcomes])
        steps.append(Step(batch, active.mean * layers, 1000 * float(np.median(gaps_s))))
        measured()
    return steps


def batch_count() -> int:
    """How many batches `measure_steps` measures."""
    return len(_batches(list(KINDS)))


def _batches(kinds: Sequence[str]) -> list[tuple[int, str | None]]:
    """Sizes of the batches with the kind of each, None for all kinds mixed."""
    return [(batch, kind) for batch in BATCHES for kind in (None, *kinds[:: len(kinds) // 2])]
