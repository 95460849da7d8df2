"""The interface of a source: something that runs a prompt and knows the experts of its tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr.counts import ExpertCounts
from eldr.record.prompts import Prompt
from eldr.routed_experts import count_rows, split_rows


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


def sample_of_rows(rows: NDArray[np.int32], shape: MoeShape, prompt_tokens: int, generated_tokens: int) -> Sample:
    """Make a sample of the rows of all tokens but the last, int32 [T, layers, k]. Raises CountsError."""
    geometry = shape.layers, shape.experts, shape.top_k
    prompt, decode = split_rows(rows, prompt_tokens, generated_tokens, geometry)
    return Sample(count_rows(prompt, shape.experts), decode)
