"""The expert weights that a simulated worker's steps wait for.

A step reads every expert that its batch activates. How long that takes depends on the worker: on how its experts are
laid out, and on where their weights are. A `Reading` says it in reads: one is the time of one expert in the memory of
the device that computes it, which `StepCost.per_expert_s` prices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


class Reading(ABC):
    """What the steps of one worker read. A worker asks about steps that it may make, and tells which it has made."""

    @abstractmethod
    def of_batch(self, active: NDArray[np.uint64]) -> NDArray[np.float64]:
        """Reads that each of the next S steps waits for, summed over layers, float64 [S].

        active: uint64 [S, words], the experts that each step activates (`PackedTrace.words`).
        """

    def of_requests(self, active: NDArray[np.uint64], requests: Sequence[NDArray[np.uint64]]) -> NDArray[np.float64]:
        """The same, given the experts of each running request as well, which matter where tokens do.

        requests: for each of them uint64 [S, words], the experts of its token in each step.
        """
        return self.of_batch(active)

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


def unpacked(active: NDArray[np.uint64], dimension: int) -> NDArray[np.uint8]:
    """Bit sets of experts, uint64 [S, words], as zeros and ones, uint8 [S, D]."""
    return np.unpackbits(active.view(np.uint8), axis=1, bitorder="little", count=dimension)
