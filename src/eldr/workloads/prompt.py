"""A prompt of a workload."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and its kind. Policies are not told the kind."""

    kind: str
    text: str
