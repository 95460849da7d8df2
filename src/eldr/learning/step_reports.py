"""From what an engine counts of its steps to the mean step since the last look.

Engines count the gaps between two tokens of a request, which are steps as long as the request runs. The experts come
from eldr's connector inside the worker. Where there is none, the policy's expectation stands in.
"""

from __future__ import annotations

import math

from eldr.learning.step_costs import StepReport
from eldr.learning.step_counters import StepCounters
from eldr.policies.base import ExpectedStep
from eldr.policies.worker_costs import TYPICAL_EXPERTS, TYPICAL_LAYERS

# Fewer gaps than this are no mean. They wait for the next look.
LEAST_GAPS = 8
# A worker may report so many times more or fewer experts than the policy expects. Beyond that it is not believed.
EXPERTS_APART = 2.0


def layers_of(expected: ExpectedStep | None) -> int:
    """The MoE layers of the model. A typical number if the policy does not know them: only ratios matter then."""
    return TYPICAL_LAYERS if expected is None else expected.layers


def report_of(
    counted: StepCounters, expected: ExpectedStep | None, running: float, chunk_tokens: int
) -> StepReport | None:
    """The mean step of what a worker has counted between two looks. None if it says nothing of steps.

    A request that was put back waits between two of its tokens, so a look with preemptions is left out.

    expected: what the policy expects of its next step. None if it expects nothing.
    running: the requests there, by the router's own count.
    chunk_tokens: the most prompt tokens that a step computes.
    """
    if counted.gaps < LEAST_GAPS or counted.preemptions:
        return None
    batch = counted.gaps / counted.steps if counted.steps else running
    steps = counted.steps or counted.gaps / max(running, 1.0)
    layers = layers_of(expected)
    if counted.expert_steps:
        experts = counted.experts / counted.expert_steps * layers
        if expected is not None and expected.experts > 0:
            experts = min(max(experts, expected.experts / EXPERTS_APART), expected.experts * EXPERTS_APART)
    elif expected is not None:
        if expected.experts <= 0:  # nothing runs there any more, and nobody counted what did
            return None
        experts = expected.experts
    else:
        experts = float(TYPICAL_EXPERTS * layers)
    if expected is not None:
        # A chunk of a prompt reads nearly all experts.
        chunks = max(counted.prompts, counted.prompt_tokens / chunk_tokens) if counted.prompt_tokens > batch else 0.0
        every = float(layers * expected.experts_per_layer)
        experts = min(experts, every)
        experts += min(chunks / steps, 1.0) * (every - experts)
        # The line prices reads.
        experts *= expected.reads_per_expert
    report = StepReport(
        step_s=counted.gaps_s / counted.gaps,
        experts=experts,
        batch=batch,
        context_tokens=0.0 if expected is None else float(expected.context_tokens),
        prompt_tokens=counted.prompt_tokens / steps,
    )
    return report if math.isfinite(report.step_s) and report.step_s > 0 else None
