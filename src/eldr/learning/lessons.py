"""The last finished requests whose experts are known: what models are learned from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eldr.counts import ExpertCounts
from eldr.prompt.words import Words

# As many requests are learned from. They take 12 MiB for 48 x 128 experts, and their words some 2 MiB.
CAPACITY = 1024
# An answer of fewer tokens says too little of its profile.
LEAST_ROWS = 8

Codes = NDArray[np.uint8]


def share_codes(counts: ExpertCounts) -> Codes:
    """The share of the counted tokens that chose each expert, uint8 [D], with share = (code / 255)^2.

    Square roots in a byte each are finest where most shares are.
    """
    shares = counts.counts.reshape(-1).astype(np.float32) / np.float32(counts.prompt_tokens)
    return np.asarray(np.rint(np.sqrt(shares) * np.float32(255)), dtype=np.uint8)


def decoded(codes: Codes) -> NDArray[np.float32]:
    """The shares of codes from `share_codes`."""
    return np.asarray(np.square(codes.astype(np.float32) / np.float32(255)))


class Asked:
    """What was known of a request before its decode.

    words: the words of its prompt. None if nobody looked at them.
    prompt_tokens: the tokens of its prompt.
    frequencies: uint8 [D], the codes of the experts that they chose. None if they are not known.
    """

    __slots__ = ("frequencies", "prompt_tokens", "words")

    def __init__(self, words: Words | None, prompt_tokens: int = 0, frequencies: Codes | None = None) -> None:
        self.words = words
        self.prompt_tokens = prompt_tokens
        self.frequencies = frequencies


class Lesson:
    """One finished request, as one router tells another.

    layers, experts, top_k: the geometry of its model.
    profile: uint8 [D], the codes of its decode profile.
    """

    __slots__ = ("asked", "experts", "layers", "profile", "top_k")

    def __init__(self, layers: int, experts: int, top_k: int, asked: Asked, profile: Codes) -> None:
        self.layers = layers
        self.experts = experts
        self.top_k = top_k
        self.asked = asked
        self.profile = profile


class Lessons:
    """The last CAPACITY finished requests of one model: what they asked, and their decode profiles.

    layers, experts, top_k: its geometry.
    taken: how many were added in all.
    """

    def __init__(self, layers: int, experts: int, top_k: int, capacity: int = CAPACITY) -> None:
        self.layers = layers
        self.experts = experts
        self.top_k = top_k
        self.taken = 0
        self._asked: list[Asked] = []
        self._profiles = np.zeros((capacity, layers * experts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._asked)

    def add(self, asked: Asked, profile: Codes) -> None:
        """Add a request, in place of the oldest one if there is no more room.

        profile: uint8 [D], the codes of its decode profile.
        """
        at = self.taken % len(self._profiles)
        self._profiles[at] = profile
        if at < len(self._asked):
            self._asked[at] = asked
        else:
            self._asked.append(asked)
        self.taken += 1

    def with_words(self) -> tuple[list[Words], Codes]:
        """The words of each lesson that has some, and a copy of the codes of their profiles, [n, D]."""
        chosen = [at for at, asked in enumerate(self._asked) if asked.words is not None and len(asked.words)]
        words = [asked.words for asked in self._asked if asked.words is not None and len(asked.words)]
        return words, self._profiles[chosen]

    def with_frequencies(self) -> tuple[NDArray[np.int64], Codes, Codes]:
        """Of each lesson that has frequencies, the tokens of its prompt [n], and the codes of both, [n, D]."""
        chosen = [at for at, asked in enumerate(self._asked) if asked.frequencies is not None]
        tokens = np.array([self._asked[at].prompt_tokens for at in chosen], dtype=np.int64)
        codes = [asked.frequencies for asked in self._asked if asked.frequencies is not None]
        profiles = self._profiles[chosen]
        return tokens, np.stack(codes) if codes else profiles, profiles
