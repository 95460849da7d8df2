"""The words of a prompt, each known by 16 bits of its hash, and how often each is there."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from eldr import kernels

# Of a longer prompt, the end is looked at: it asks what the rest is about.
MOST_TEXT_BYTES = 16384
# A word of the last END_BYTES counts as much as END_TIMES before them. So the last message of a conversation is not
# drowned by the earlier ones, nor a question by instructions that many requests share.
END_BYTES, END_TIMES = 1024, 16


class Words:
    """The hashed words of one prompt.

    buckets: uint16 [n], each once.
    counts: uint16 [n], how often each was seen, weighed by place.
    """

    __slots__ = ("buckets", "counts")

    def __init__(self, buckets: NDArray[np.uint16], counts: NDArray[np.uint16]) -> None:
        self.buckets = buckets
        self.counts = counts

    def __len__(self) -> int:
        return len(self.buckets)


def words_of_text(text: bytes) -> Words:
    """The words of the end of a text (`eldr.kernels.text_words`). text: UTF-8, but any bytes will do."""
    return Words(*kernels.text_words(text[-MOST_TEXT_BYTES:], END_BYTES, END_TIMES))


def words_of_tokens(text: bytes, start: int, end: int) -> Words:
    """The token ids of a prompt as words. text[start:end]: a JSON array of them, of which the end is looked at."""
    cut = end - MOST_TEXT_BYTES
    if cut > start:
        start = text.find(b",", cut, end)  # the first one may be cut in two
        start = cut if start < 0 else start
    return Words(*kernels.token_words(text, start, end, END_BYTES, END_TIMES))


def vocabulary(prompts: Iterable[Words]) -> NDArray[np.int64]:
    """How many prompts each bucket is in, int64 [65536]."""
    seen = np.zeros(kernels.WORD_BUCKETS, dtype=np.int64)
    for words in prompts:
        seen[words.buckets] += 1
    return seen
