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
    """The W workers of a fleet. The policy keeps the arrays up to date.

    columns: float64 [4, W], seconds that a step takes: base, per expert, per token and per context token.
    union: float64 [W], the distinct experts of a step.
    context: W numbers, the tokens of running prompts.
    length: float32 [W], the length of each worker's direction.
    """

    columns: Doubles
    union: Doubles
    context: list[int]
    length: Floats


class PlacementWeights(NamedTuple):
    """The weights of the terms that expected-union adds up.

    others: the weight of the time that a newcomer adds to the requests already there.
    anchor: the weight of the distance to the nearest worker's direction.
    tail_guard: the margin of the tail guard, in units of what locality saves.
    guard_share: the share of expert time that counts as saved in addition.
    """

    others: float
    anchor: float
    tail_guard: float
    guard_share: float
