"""The last finished requests whose experts are known: what a model is learned from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eldr.counts import ExpertCounts
from eldr.prompt.words import Words

# As many requests are learned from. They take 6 MiB for 48 x 128 experts, and their words some 2 MiB.
CAPACITY = 1024
# An answer of fewer tokens says too little of its profile.
LEAST_ROWS = 8


def profile_of(decode: ExpertCounts) -> NDArray[np.float32]:
    """The share of decode steps that activated each expert, float32 [D]. decode: the counts of their rows."""
    return decode.counts.reshape(-1).astype(np.float32) / np.float32(decode.prompt_tokens)


class Lessons:
    """The words and decode profiles of the last CAPACITY finished requests of one model.

    layers, experts, top_k: its geometry.
    taken: how many were added in all.
    """

    def __init__(self, layers: int, experts: int, top_k: int, capacity: int = CAPACITY) -> None:
        self.layers = layers
        self.experts = experts
        self.top_k = top_k
        self.taken = 0
        self._words: list[Words] = []
        # Square roots in a byte each are finest where most shares are.
        self._codes = np.zeros((capacity, layers * experts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._words)

    def add(self, words: Words, profile: NDArray[np.float32]) -> None:
        """Add a request, in place of the oldest one if there is no more room.

        profile: float32 [D], shares from 0 to 1.
        """
        at = self.taken % len(self._codes)
        self._codes[at] = np.rint(np.sqrt(profile) * np.float32(255))
        if at < len(self._words):
            self._words[at] = words
        else:
            self._words.append(words)
        self.taken += 1

    def words(self) -> list[Words]:
        """The words of each lesson, in the order of `codes`."""
        return list(self._words)

    def codes(self) -> NDArray[np.uint8]:
        """A copy of the profiles, uint8 [n, D], with share = (code / 255)^2."""
        return self._codes[: len(self._words)].copy()


def decoded(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The profiles of codes from `Lessons.codes`."""
    return np.asarray(np.square(codes.astype(np.float32) / np.float32(255)))
