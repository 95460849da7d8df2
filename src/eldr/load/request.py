"""What a load consists of, for whoever makes or sends it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and its kind, which no policy is told."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the workload."""

    number: int
    prompt: Prompt
    max_tokens: int
