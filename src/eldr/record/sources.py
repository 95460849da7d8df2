"""The interface of a source: something that runs a prompt and knows the experts of its tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr.counts import CountsError, ExpertCounts
from eldr.record.prompts import Prompt
from eldr.routed_experts import count_rows, moe_rows


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt that was run.

    counts: the experts of the prompt's tokens.
    rows: uint16 [G - 1, L, k], the experts of the generated tokens but the last, which is never an input.
    """

    counts: ExpertCounts
    rows: NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class MoeShape:
    """The MoE layers of a model, for sources that do not state all of it."""

    layers: int
    experts: int
    top_k: int


class Source(ABC):
    """Runs prompts and returns their experts.

    model: the name of the model.
    concurrency: how many prompts it should run at a time.
    """

    model: str
    concurrency: int

    @abstractmethod
    def sample(self, prompt: Prompt) -> Sample:
        """Run `prompt`. May be called by `concurrency` threads at once. Raises RecordError."""


def split_rows(rows: NDArray[np.int32], shape: MoeShape, prompt_tokens: int, generated_tokens: int) -> Sample:
    """Split the rows of all tokens but the last, [T, layers, k], into those of the prompt and of the answer.

    Raises CountsError if they are not these rows.
    """
    expected = prompt_tokens + generated_tokens - 1
    if prompt_tokens < 1 or len(rows) != expected:
        raise CountsError("incomplete", f"it states {len(rows)} rows of experts for {expected} tokens")
    checked = moe_rows(rows, shape.layers, shape.experts, shape.top_k)
    return Sample(count_rows(checked[:prompt_tokens], shape.experts), checked[prompt_tokens:])
