"""What an engine counts of its steps, whichever engine it is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepCounters:
    """What a worker has counted since it started.

    gaps, gaps_s: the times between two tokens of a request, how many and their sum.
    steps: the steps that made tokens. 0 if it does not count them.
    experts, expert_steps: the distinct experts of decode steps in MoE layers, summed over both, and how many pairs of a
        step and a layer that were. 0 if it does not count them.
    prompt_tokens, prompts: what it computed of prompts: how many tokens, and how many prompts.
    preemptions: the requests that it has put back.
    """

    gaps: float = 0.0
    gaps_s: float = 0.0
    steps: float = 0.0
    experts: float = 0.0
    expert_steps: float = 0.0
    prompt_tokens: float = 0.0
    prompts: float = 0.0
    preemptions: float = 0.0

    def since(self, seen: StepCounters) -> StepCounters | None:
        """What was counted since it had counted `seen`. None if it has restarted since then."""
        values = [getattr(self, part.name) - getattr(seen, part.name) for part in dataclasses.fields(self)]
        return None if min(values) < 0 else StepCounters(*values)
