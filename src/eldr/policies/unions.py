"""What decode workers' running requests activate together, kept exact under starts and finishes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr import kernels
from eldr.activation import LEAST, MOST, busiest_rank_experts
from eldr.policies.rows import longer, row_products

# Starts after which the experts of random batches are computed anew; sooner while there were few.
RANDOM_BATCH_STARTS = 64

# What a request exposes an expert to, -log2(1 - p), is kept as a code of one byte, finest where most probabilities are:
# its square counts units of 9e-5. Whole numbers: adding a request and removing it cancel exactly, and 66,000 requests
# that are all sure to activate the same expert fit into 32 bits.
_UNIT = -math.log2(1 - MOST) / 255**2


class Profile:
    """What is remembered of a request while it runs. codes: uint8 [D], of `encode_exposure`. context_tokens: of its
    prompt."""

    __slots__ = ("codes", "context_tokens")

    def __init__(self, codes: NDArray[np.uint8], context_tokens: int) -> None:
        self.codes = codes
        self.context_tokens = context_tokens


@dataclass(frozen=True, slots=True)
class Geometry:
    """L MoE layers of E experts, divided over `ranks` of expert parallelism; D = L * E, layer by layer."""

    layers: int
    experts: int
    ranks: int = 1

    @property
    def dimension(self) -> int:
        """D."""
        return self.layers * self.experts

    def active(self, survival: NDArray[np.float32]) -> float:
        """Distinct experts that a step waits for, of [D] probabilities that nobody activates an expert."""
        if self.ranks == 1:
            return len(survival) - float(survival.sum())
        return float(busiest_rank_experts(1 - survival, self.layers, self.ranks))


class Unions:
    """One row a worker. Matrices have room for more, C rows, of which those in use, W, come first.

    exposure: uint32 [W, D], sum of -log2(1 - p) of the running requests, in units of _UNIT. survival: uint16 [W, D],
    the probability that none of them activates an expert, 2^-exposure, as a fraction of CERTAIN. union: float64 [W],
    expected distinct experts that a step waits for, summed over layers: all of them, with expert parallelism those of
    the busiest rank (`busiest_rank_experts`). context: W, tokens of running prompts.
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
        """float64 [W, L]: expected distinct experts of a step in each layer."""
        survival = self.survival.reshape(self.count, self._geometry.layers, self._geometry.experts)
        return np.asarray(self._geometry.experts - survival.sum(axis=2) / kernels.CERTAIN)

    def append(self) -> None:
        """Add a row for one more worker, which runs nothing yet."""
        row = self.count
        if row == len(self._exposure):
            self._exposure, self._survival = longer(self._exposure), longer(self._survival)
        self.count += 1
        self._exposure[row] = 0
        self._survival[row] = kernels.CERTAIN
        self.union = np.append(self.union, 0.0)
        self.context.append(0)

    def remove(self, row: int) -> None:
        """Forget a worker; the last row takes its place."""
        self.count -= 1
        for array in (self._exposure, self._survival, self.union):
            array[row] = array[self.count]
        self.union = self.union[:-1]
        self.context[row] = self.context[-1]
        self.context.pop()

    def add(self, row: int, profile: Profile, sign: int) -> None:
        """Add (sign 1) or remove (sign -1) a running request. Whole numbers: what was added cancels exactly."""
        self.context[row] += sign * profile.context_tokens
        union = kernels.shift_exposure(profile.codes, sign, _UNIT, self._exposure, self._survival, row)
        if self._geometry.ranks > 1:
            union = self._geometry.active(kernels.from_fractions(self._survival[row]))
        self.union[row] = union

    def added(self, profile: NDArray[np.float32]) -> NDArray[np.float64]:
        """float64 [W]: distinct experts that a request adds to what each worker's steps wait for."""
        survival = self.survival
        geometry = self._geometry
        if geometry.ranks == 1:
            return row_products(survival, profile)
        active = 1 - kernels.from_fractions(survival) * (1 - profile)
        return busiest_rank_experts(active, geometry.layers, geometry.ranks) - self.union


class RandomBatches:
    """Distinct experts that a step of requests drawn at random waits for: what routing by load alone gives.

    With m the fleet's mean profile, B independent requests activate an expert with probability 1 - (1 - m)^B.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._starts = self._next = 0
        self._survival = np.ones(geometry.dimension, dtype=np.float32)
        self._product = self._survival.copy()
        self._experts = np.zeros(1)

    def started(self, mean_profile: NDArray[np.float32]) -> None:
        """One more request has started; mean_profile: float32 [D], looked at now and then."""
        self._starts += 1
        if self._starts >= self._next:
            self._next = self._starts + min(self._starts, RANDOM_BATCH_STARTS)
            self.set_mean(mean_profile)

    def set_mean(self, mean_profile: NDArray[np.float32]) -> None:
        """Use this mean from now on. float32 [D]."""
        self._survival = 1 - np.clip(mean_profile, LEAST, MOST)
        self._product = np.ones_like(self._survival)
        self._experts = np.zeros(1)

    def experts(self, most: int) -> NDArray[np.float64]:
        """float64 [at least most + 1], of batches of 0, 1, 2, ... requests."""
        if most >= len(self._experts):
            more = []
            for _ in range(len(self._experts), most + 1):
                self._product *= self._survival
                more.append(self._geometry.active(self._product))
            self._experts = np.append(self._experts, more)
        return self._experts


def encode_exposure(profile: NDArray[np.float32]) -> NDArray[np.uint8]:
    """uint8 [D]: what probabilities 0..1 expose experts to, as codes: p = 1 - 2^-(code^2 * _UNIT)."""
    codes = np.empty(len(profile), dtype=np.uint8)
    kernels.encode_exposure(np.ascontiguousarray(profile, dtype=np.float32), MOST, 1 / _UNIT, codes)
    return codes
