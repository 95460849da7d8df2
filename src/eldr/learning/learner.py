"""Decides when a prompt model is learned anew, and whether the new one is used.

A model is learned from the last lessons alone, so that old traffic gives way. It is used if it predicts requests that
it was not fitted to better than the fitted model does. Reports that have nothing to do with the prompts thus change
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr.counts import ExpertCounts
from eldr.learning.lessons import LEAST_ROWS, Lessons, decoded, profile_of
from eldr.policies.learned import Learned
from eldr.prompt.fit import Choice, choose, fit_prompt_model
from eldr.prompt.model import PromptModel
from eldr.prompt.words import Words

# The first fit needs so many lessons. Then each needs so many new ones, or this share of those there are.
FIRST = 24
EVERY, EVERY_SHARE = 24, 0.1
# Cross-validation takes most of the time of a fit, and its choice hardly changes. It is made anew when there are so
# many times more lessons than at the last one, or as many new ones as are kept.
CHOOSE_AGAIN = 1.5
# A model that explains less of the variance of profiles is no better than the mean.
LEAST_R2 = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class LearnTask:
    """The input of a fit. It can be sent to another process.

    words: [N]. codes: uint8 [N, D], their profiles (`Lessons.codes`).
    layers, top_k: the model's.
    choice: what to use in place of a cross-validation.
    incumbent: the fitted model to beat. None if there is none.
    seed: the seed of the folds.
    """

    words: list[Words]
    codes: NDArray[np.uint8]
    layers: int
    top_k: int
    choice: Choice | None
    incumbent: PromptModel | None
    seed: int

    def run(self) -> Taught:
        """Fit a model, and judge it. Raises ActivationError if there are too few lessons."""
        profiles = decoded(self.codes)
        choice = self.choice or choose(self.words, profiles, seed=self.seed)
        incumbent = self.incumbent
        least = LEAST_R2 if incumbent is None else max(LEAST_R2, explained(incumbent, self.words, profiles))
        if choice.r2 < least:
            return Taught(choice, None)
        return Taught(
            choice, fit_prompt_model(self.words, profiles, self.layers, self.top_k, seed=self.seed, choice=choice)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Taught:
    """The result of a fit. model: None if it is no better than what there is."""

    choice: Choice
    model: PromptModel | None


def explained(model: PromptModel, words: list[Words], profiles: NDArray[np.float32]) -> float:
    """The share of the variance of profiles, float32 [N, D], that a model explains which was not fitted to them."""
    predicted = np.stack([model.predict(prompt) for prompt in words])
    spread = float(((profiles - profiles.mean(axis=0)) ** 2).sum())
    return 1 - float(((predicted - profiles) ** 2).sum()) / spread if spread > 0 else 0.0


class Learner:
    """Learns the prompt model of one model's fleet.

    fitted: the model that there is at first. None for none.
    seed: the seed of the folds.
    lessons: what it learns from. None before the first.
    model: the best model so far.
    r2: the share of the variance of profiles that the last fit explained, cross-validated.
    """

    def __init__(self, fitted: PromptModel | None, seed: int = 0) -> None:
        self._fitted = fitted
        self._seed = seed
        self._choice: Choice | None = None
        self._chosen_at = self._fitted_at = 0
        self.lessons: Lessons | None = None
        self.model = fitted
        self.r2 = 0.0
        if fitted is not None:
            profiles = fitted.profiles
            self.lessons = Lessons(profiles.layers, profiles.experts, profiles.top_k)

    def take(self, words: Words, decode: ExpertCounts) -> bool:
        """Learn from a finished request. Returns whether it says something.

        decode: the counts of its decode rows.
        """
        if decode.prompt_tokens < LEAST_ROWS or not len(words):
            return False
        lessons = self.lessons
        if lessons is None:
            lessons = self.lessons = Lessons(decode.layers, decode.experts, decode.top_k)
        if (decode.layers, decode.experts, decode.top_k) != (lessons.layers, lessons.experts, lessons.top_k):
            return False
        lessons.add(words, profile_of(decode))
        return True

    def task(self) -> LearnTask | None:
        """What is to be fitted now. None if there are too few new lessons."""
        lessons = self.lessons
        if lessons is None or lessons.taken < FIRST:
            return None
        if self._fitted_at and lessons.taken < self._fitted_at + max(EVERY, EVERY_SHARE * len(lessons)):
            return None
        stale = lessons.taken >= min(CHOOSE_AGAIN * self._chosen_at, self._chosen_at + len(lessons))
        self._fitted_at = lessons.taken
        if stale:
            self._chosen_at = lessons.taken
            self._choice = None
        return LearnTask(
            lessons.words(), lessons.codes(), lessons.layers, lessons.top_k, self._choice, self._fitted, self._seed
        )

    def taught(self, taught: Taught) -> Learned | None:
        """Take the result of a task. Returns what a policy is to use from now on. None if nothing changes."""
        self._choice = taught.choice
        self.r2 = taught.choice.r2
        model = taught.model or self._fitted
        if model is self.model or model is None:
            return None
        self.model = model
        return Learned(model.profiles, model.words)
