"""One request of a load run."""

from __future__ import annotations

from dataclasses import dataclass

from eldr.workloads.prompt import Prompt


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the workload."""

    number: int
    prompt: Prompt
    max_tokens: int
