"""Prompts of two kinds that use different experts. Without Dynamo, so that the fake workers can be read alone."""

from __future__ import annotations

import numpy as np

from eldr.counts import ExpertCounts

LAYERS, EXPERTS, TOP_K = 4, 16, 2


def counts_of(tokens: list[int]) -> ExpertCounts:
    """The counts of a prompt: all of its tokens choose two experts, which depend on the first token alone."""
    counts = np.zeros((LAYERS, EXPERTS), dtype=np.uint32)
    first = 2 * (tokens[0] % (EXPERTS // 2))
    counts[:, first : first + TOP_K] = len(tokens)
    return ExpertCounts(counts, len(tokens), TOP_K)
