"""The arguments of the kernels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.uint32]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Survival is kept in 16 bits, as a fraction of this.
CERTAIN = 65535


class FleetState(NamedTuple):
    """The W workers of a fleet. The arrays are those that the policy keeps up to date.

    columns: float64 [4, W], a step's base, per expert, per token and per context token, seconds. union: float64 [W],
    distinct experts of a step. context: W, tokens of running prompts. length: float32 [W], of each worker's direction.
    """

    columns: Doubles
    union: Doubles
    context: list[int]
    length: Floats


class PlacementWeights(NamedTuple):
    """Weights of the terms that expected-union adds up.

    others: of the time that a newcomer adds to the requests already there. anchor: of the distance to the nearest
    worker's direction. tail_guard: margin of the tail guard, in units of what locality saves. guard_share: share of
    expert time that counts as saved beside it.
    """

    others: float
    anchor: float
    tail_guard: float
    guard_share: float
