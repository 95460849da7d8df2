"""The experts that each decode worker's running requests activate together, kept exact as requests start and finish."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr import kernels
from eldr.activation import LEAST, MOST
from eldr.policies.rows import longer, row_products

# The experts of random batches are recomputed after this many starts, and sooner as long as there were few.
RANDOM_BATCH_STARTS = 64

# A request's exposure of an expert, -log2(1 - p), is stored as a one-byte code whose square counts units of 9e-5, so it
# is finest where most probabilities are. Sums are integers: adding and removing a request cancel exactly, and 66,000
# requests that are all certain to activate the same expert fit into 32 bits.
_UNIT = -math.log2(1 - MOST) / 255**2


# The probability of each code, which has lost up to half a step of the code.
_PROBABILITIES = (1 - np.exp2(-_UNIT * np.arange(256.0) ** 2)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Geometry:
    """L MoE layers of E experts. D = L * E, layer by layer."""

    layers: int
    experts: int

    @property
    def dimension(self) -> int:
        """D, the number of (layer, expert) pairs."""
        return self.layers * self.experts


class Unions:
    """The experts that each worker's requests activate, one row per worker.

    Matrices have spare rows, and the first W are in use.

    exposure: uint32 [W, D], the sum of -log2(1 - p) over the running requests, in units of _UNIT.
    survival: uint16 [W, D], the probability 2^-exposure that no request activates an expert, as a fraction of CERTAIN.
    union: float64 [W], the expected distinct experts of a step, summed over layers.
    context: W numbers, the tokens of running prompts.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.count = 0
        self._geometry = geometry
        self._exposure = np.zeros((0, geometry.dimension), dtype=np.uint32)
        self._survival = np.zeros((0, geometry.dimension), dtype=np.uint16)
        self.union = np.zeros(0)
        self.context: list[int] = []

    @property
    def exposure(self) -> NDArray[np.uint32]:
        return self._exposure[: self.count]

    @property
    def survival(self) -> NDArray[np.uint16]:
        return self._survival[: self.count]

    def by_layer(self) -> NDArray[np.float64]:
        """Expected distinct experts of a step in each layer, float64 [W, L]."""
        survival = self.survival.reshape(self.count, self._geometry.layers, self._geometry.experts)
        return np.asarray(self._geometry.experts - survival.sum(axis=2) / kernels.CERTAIN)

    def append(self) -> None:
        """Add a row for one more worker. Capacity doubles, so that a large fleet can join one by one."""
        row = self.count
        if row == len(self._exposure):
            self._exposure, self._survival = longer(self._exposure), longer(self._survival)
        self.count += 1
        self._exposure[row] = 0
        self._survival[row] = kernels.CERTAIN
        self.union = np.append(self.union, 0.0)
        self.context.append(0)

    def remove(self, row: int) -> None:
        """Remove a worker's row. The last row takes its place."""
        self.count -= 1
        for array in (self._exposure, self._survival, self.union):
            array[row] = array[self.count]
        self.union = self.union[:-1]
        self.context[row] = self.context[-1]
        self.context.pop()

    def add(self, row: int, codes: NDArray[np.uint8], context_tokens: int, sign: int) -> None:
        """Add (sign 1) or remove (sign -1) a running request. Sums are integers, so a removal cancels exactly.

        codes: uint8 [D], from `encode_exposure`.
        context_tokens: the tokens of its prompt.
        """
        self.context[row] += sign * context_tokens
        self.union[row] = kernels.shift_exposure(codes, sign, _UNIT, self._exposure, self._survival, row)

    def added(self, profile: NDArray[np.float32]) -> NDArray[np.float64]:
        """Distinct experts that a request would add to each worker's steps, float64 [W]."""
        return row_products(self.survival, profile)


class RandomBatches:
    """The distinct experts of a step of a random batch. This is what routing by load alone gives.

    With the fleet's mean profile m, B independent requests activate an expert with probability 1 - (1 - m)^B.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._starts = self._next = 0
        self._survival = np.ones(geometry.dimension, dtype=np.float32)
        self._product = self._survival.copy()
        self._experts = np.zeros(1)

    def started(self, mean_profile: NDArray[np.float32]) -> bool:
        """Note that one more request has started. Returns whether the mean profile, float32 [D], was read this time."""
        self._starts += 1
        if self._starts < self._next:
            return False
        self._next = self._starts + min(self._starts, RANDOM_BATCH_STARTS)
        self.set_mean(mean_profile)
        return True

    def set_mean(self, mean_profile: NDArray[np.float32]) -> None:
        """Use this mean profile, float32 [D], from now on."""
        self._survival = 1 - np.clip(mean_profile, LEAST, MOST)
        self._product = np.ones_like(self._survival)
        self._experts = np.zeros(1)

    def experts(self, most: int) -> NDArray[np.float64]:
        """Distinct experts of batches of 0, 1, 2, ... requests, float64 [at least most + 1]."""
        if most >= len(self._experts):
            more = []
            for _ in range(len(self._experts), most + 1):
                self._product *= self._survival
                more.append(len(self._product) - float(self._product.sum()))
            self._experts = np.append(self._experts, more)
        return self._experts


def encode_exposure(profile: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Encode the exposures of probabilities 0..1 as codes, uint8 [D], with p = 1 - 2^-(code^2 * _UNIT)."""
    codes = np.empty(len(profile), dtype=np.uint8)
    kernels.encode_exposure(np.ascontiguousarray(profile, dtype=np.float32), MOST, 1 / _UNIT, codes)
    return codes


def decode_exposure(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The probabilities, float32 [D], that `encode_exposure` would encode as these codes."""
    return _PROBABILITIES.take(codes)  # half the time of indexing
