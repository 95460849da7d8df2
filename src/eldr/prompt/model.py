"""The prompt model: from the hashed words of a prompt to the experts that its decode steps will activate.

Each word has a row of a few numbers in a table. Their weighted mean is the prompt's *latent*, and a linear map takes it
to the activation profile. A latent is all that a policy or a log needs to know of a prompt, and no text can be read
from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr import kernels
from eldr.activation import to_probabilities
from eldr.prompt.words import Words

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class WordTable:
    """Turns words into latents.

    weight: float32 [65536], the weight of a word in each bucket: 0 where the model knows none.
    table: int8 [65536, R].
    scale: float32 [R], the unit of each column of the table.
    offset: float32 [R], the latent of the prompts that the model was fitted on, in the mean.
    """

    weight: Floats
    table: NDArray[np.int8]
    scale: Floats
    offset: Floats

    @property
    def rank(self) -> int:
        """R, the numbers in a latent."""
        return len(self.scale)

    def latent(self, words: Words) -> Floats | None:
        """The latent of a prompt, float32 [R]. None if the model knows none of its words."""
        latent = np.empty(self.rank, dtype=np.float32)
        known = kernels.words_to_latent(words.buckets, words.counts, self.weight, self.table, self.scale, latent)
        return latent - self.offset if known > 0 else None


@dataclass(frozen=True, slots=True, eq=False)
class ProfileMap:
    """Turns latents into the probabilities that one decode step activates each expert.

    mean: float32 [D], the mean profile.
    up: float32 [R, D].
    layers: L, the number of MoE layers.
    top_k: experts per token.
    """

    mean: Floats
    up: Floats
    layers: int
    top_k: int

    @property
    def experts(self) -> int:
        """E, experts per layer."""
        return len(self.mean) // self.layers

    def profile(self, latent: Floats) -> Floats:
        """The profile of a prompt with this latent, float32 [D]."""
        scores = np.empty_like(self.mean)
        kernels.latent_to_scores(self.mean, latent, self.up, scores)
        return to_probabilities(scores, self.layers, self.top_k)


@dataclass(frozen=True, slots=True, eq=False)
class PromptModel:
    """A fitted prompt model.

    words, profiles: its two halves.
    strength: the ridge strength, relative to the mean eigenvalue.
    idf: whether rare words weigh more.
    r2: the share of the variance of decode profiles that it explains, cross-validated.
    requests: how many requests it was fitted to.
    """

    words: WordTable
    profiles: ProfileMap
    strength: float
    idf: bool
    r2: float
    requests: int

    @property
    def rank(self) -> int:
        """R, the numbers in a latent."""
        return self.words.rank

    def predict(self, words: Words) -> Floats:
        """The predicted profile of a prompt, float32 [D]: the mean profile if the model knows none of its words."""
        latent = self.words.latent(words)
        if latent is None:
            latent = np.zeros(self.words.rank, dtype=np.float32)
        return self.profiles.profile(latent)
