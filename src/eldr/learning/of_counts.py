"""Learns an activation model: from the expert counts of prompts to the profiles of their decodes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from eldr.activation import (
    PRIOR_TOKENS,
    RANKS,
    STRENGTHS,
    ActivationModel,
    deserved_trust,
    held_out_deviations,
    overlap_gain,
)
from eldr.learning.lessons import Codes, decoded

# The least correlation of what prompts and decodes of the lessons use, over all requests and experts. Reports below it
# are not believed: a request decodes with experts like those of its prompt, and these were counted elsewhere. It is
# 0.77 in a trace of gpt-oss-20b, 0.98 in one of the small model, and below 0.03 if decodes are mixed up.
LEAST_AGREEMENT = 0.3

# Ridge strength and rank.
CountsChoice = tuple[float, int]


@dataclass(frozen=True, slots=True, eq=False)
class CountsTask:
    """The input of a fit. It can be sent to another process.

    prompt_tokens: int64 [n]. frequencies, profiles: uint8 [n, D], codes of their prompts and of their decodes.
    layers, top_k: the model's.
    choice: strength and rank, in place of a cross-validation.
    fitted: a model that was fitted to other requests. None if there is none.
    seed: the seed of the folds.
    """

    prompt_tokens: NDArray[np.int64]
    frequencies: Codes
    profiles: Codes
    layers: int
    top_k: int
    choice: CountsChoice | None
    fitted: ActivationModel | None
    seed: int

    def run(self) -> tuple[CountsChoice | None, ActivationModel | None]:
        """Fit a model with the trust that it deserves. It is `fitted` with that trust if that predicts better.

        None if the reports are not to be believed. Raises ActivationError if there are too few lessons.
        """
        frequencies, profiles = self.own_frequencies(), decoded(self.profiles)
        if agreement(frequencies, profiles) < LEAST_AGREEMENT:
            return None, None
        strengths, ranks = (STRENGTHS, RANKS) if self.choice is None else ((self.choice[0],), (self.choice[1],))
        model = ActivationModel.fit_lessons(
            frequencies, profiles, self.layers, self.top_k, seed=self.seed, ranks=ranks, strengths=strengths
        )
        choice = model.strength, model.rank
        x, corrections, y = held_out_deviations(frequencies, profiles, *choice, self.seed)
        trust = deserved_trust(x, corrections, y)
        deviations = x + np.float32(trust) * corrections
        if self.fitted is not None:
            fitted = self.fitted.judged(frequencies, profiles)
            if _error(fitted, frequencies, profiles) <= float(((deviations - y) ** 2).sum()):
                return choice, fitted
        return choice, replace(model, trust=trust, gain=overlap_gain(deviations, y))

    def own_frequencies(self) -> NDArray[np.float32]:
        """As `eldr.activation.own_frequencies`, with the mean of these requests."""
        shares = decoded(self.frequencies)
        tokens = self.prompt_tokens.astype(np.float32)[:, None]
        return np.asarray((shares * tokens + PRIOR_TOKENS * shares.mean(axis=0)) / (tokens + PRIOR_TOKENS), np.float32)


def agreement(frequencies: NDArray[np.float32], profiles: NDArray[np.float32]) -> float:
    """The correlation of own frequencies and profiles, float32 [n, D], each less its mean over the requests."""
    x, y = frequencies - frequencies.mean(axis=0), profiles - profiles.mean(axis=0)
    lengths = float(np.linalg.norm(x)) * float(np.linalg.norm(y))
    return float((x * y).sum()) / lengths if lengths > 0 else 0.0


def _error(model: ActivationModel, frequencies: NDArray[np.float32], profiles: NDArray[np.float32]) -> float:
    """The squared error of a model that was not fitted to these requests, but for their means."""
    x, y = frequencies - frequencies.mean(axis=0), profiles - profiles.mean(axis=0)
    return float(((x + np.float32(model.trust) * model.corrections(x) - y) ** 2).sum())
