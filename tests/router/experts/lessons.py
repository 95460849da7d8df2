"""A sink that keeps what it is told, and rows to tell it."""

from __future__ import annotations

import numpy as np

from eldr.counts import CountsError, ExpertCounts
from tests.router.fake_worker import EXPERTS, LAYERS, TOP_K

GEOMETRY = f"{LAYERS}x{EXPERTS}x{TOP_K}"


class Lessons:
    """refuse: raises for every report, as for one of another geometry."""

    def __init__(self, *, refuse: bool = False) -> None:
        self.heard: list[tuple[str, ExpertCounts]] = []
        self._refuse = refuse

    def report(self, request_id: str, decode: ExpertCounts) -> None:
        if self._refuse:
            raise CountsError("geometry", "not the model that is learned")
        self.heard.append((request_id, decode))


def rows_of(tokens: int, seed: int = 0) -> np.ndarray:
    """The experts of so many tokens, [T, L, k]."""
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((tokens, LAYERS, EXPERTS)), axis=-1)[..., :TOP_K]


def counted(rows: np.ndarray) -> np.ndarray:
    """How many of the rows chose each expert: [L, E]."""
    return np.stack([np.bincount(rows[:, layer].ravel(), minlength=EXPERTS) for layer in range(LAYERS)])
