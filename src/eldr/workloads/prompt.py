"""A prompt of a workload."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and its kind, which no policy is told."""

    kind: str
    text: str
