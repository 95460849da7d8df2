"""The expert weights that a simulated worker's steps wait for.

A step reads every expert that its batch activates. How long that takes depends on the worker: on how its experts are
laid out, and on where their weights are. A `Reading` says it in reads: one is the time of one expert in the memory of
the device that computes it, which `StepCost.per_expert_s` prices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


class Reading(ABC):
    """What the steps of one worker read. A worker asks about steps that it may make, and tells which it has made."""

    @abstractmethod
    def of_batch(self, active: NDArray[np.uint64]) -> NDArray[np.float64]:
        """Reads that each of the next S steps waits for, summed over layers, float64 [S].

        active: uint64 [S, words], the experts that each step activates (`PackedTrace.words`).
        """

    @abstractmethod
    def of_expected(self, active: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same where experts are not known for certain, float64 [S].

        active: float64 [S, D], the probability that each step activates each expert.
        """

    def made(self, active: NDArray[np.uint64]) -> None:  # noqa: B027
        """These steps were made, uint64 [S, words]. Readings without a state ignore it."""


ReadingMaker = Callable[[int], Reading]
"""Makes the reading of the worker with this index."""


class DistinctExperts(Reading):
    """One device that holds all experts: every distinct expert is one read."""

    def of_batch(self, active: NDArray[np.uint64]) -> NDArray[np.float64]:
        return np.asarray(np.bitwise_count(active).sum(axis=1, dtype=np.float64))

    def of_expected(self, active: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(active.sum(axis=1))


def distinct_experts(worker: int) -> Reading:
    """The reading of a worker with one device, which has no state."""
    return DistinctExperts()


class BusiestRank(Reading):
    """Expert parallelism: every rank reads its own experts, and a layer is done when its busiest rank is.

    Rank r of R holds experts r * E / R up to (r + 1) * E / R of every layer.
    layers, experts: L and E.
    ranks: R, which divides E.
    """

    def __init__(self, layers: int, experts: int, ranks: int) -> None:
        self._layers = layers
        self._experts = experts
        self._ranks = ranks

    def of_batch(self, active: NDArray[np.uint64]) -> NDArray[np.float64]:
        return self._busiest(unpacked(active, self._layers * self._experts))

    def of_expected(self, active: NDArray[np.float64]) -> NDArray[np.float64]:
        return self._busiest(active)

    def _busiest(self, active: NDArray[np.uint8] | NDArray[np.float64]) -> NDArray[np.float64]:
        of_ranks = active.reshape(len(active), self._layers, self._ranks, -1).sum(axis=-1, dtype=np.float64)
        return np.asarray(of_ranks.max(axis=-1).sum(axis=-1))


def unpacked(active: NDArray[np.uint64], dimension: int) -> NDArray[np.uint8]:
    """Bit sets of experts, uint64 [S, words], as zeros and ones, uint8 [S, D]."""
    return np.unpackbits(active.view(np.uint8), axis=1, bitorder="little", count=dimension)
