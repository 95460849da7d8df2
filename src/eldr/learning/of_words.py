"""Learns a prompt model: from the words of prompts to the profiles of their decodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr.learning.lessons import Codes, decoded
from eldr.prompt.fit import Choice, choose, fit_prompt_model
from eldr.prompt.model import PromptModel
from eldr.prompt.words import Words

# A model that explains less of the variance of profiles is no better than the mean.
LEAST_R2 = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class WordsTask:
    """The input of a fit. It can be sent to another process.

    words: [n]. profiles: uint8 [n, D], their codes.
    layers, top_k: the model's.
    choice: what to use in place of a cross-validation.
    incumbent: the fitted model to beat. None if there is none.
    seed: the seed of the folds.
    """

    words: list[Words]
    profiles: Codes
    layers: int
    top_k: int
    choice: Choice | None
    incumbent: PromptModel | None
    seed: int

    def run(self) -> tuple[Choice, PromptModel | None]:
        """Fit a model, and judge it. None if it is no better than what there is.

        Raises ActivationError if there are too few lessons.
        """
        profiles = decoded(self.profiles)
        choice = self.choice or choose(self.words, profiles, seed=self.seed)
        incumbent = self.incumbent
        least = LEAST_R2 if incumbent is None else max(LEAST_R2, explained(incumbent, self.words, profiles))
        if choice.r2 < least:
            return choice, None
        return choice, fit_prompt_model(self.words, profiles, self.layers, self.top_k, seed=self.seed, choice=choice)


def explained(model: PromptModel, words: list[Words], profiles: NDArray[np.float32]) -> float:
    """The share of the variance of profiles, float32 [N, D], that a model explains which was not fitted to them."""
    predicted = np.stack([model.predict(prompt) for prompt in words])
    spread = float(((profiles - profiles.mean(axis=0)) ** 2).sum())
    return 1 - float(((predicted - profiles) ** 2).sum()) / spread if spread > 0 else 0.0
