"""The self-anchor of expected-union: the direction from the fleet's mean to the requests of each worker."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eldr import kernels
from eldr.policies.rows import longer, row_products
from eldr.policies.unions import Geometry

# The anchor uses about this many (layer, expert) entries at most, from evenly spaced layers. Layers agree on the topic
# of a request, and with a thousand workers the cost is memory bandwidth.
ANCHOR_ENTRIES = 2048
# Length of the moving average of a worker's direction, in requests.
DIRECTION_REQUESTS = 20


class Anchor:
    """A moving average of the directions of the requests that each worker has started, one row per worker.

    A direction has A entries. The matrix has spare rows, and the first W are in use.

    length: float32 [W], the length of each worker's average.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.length = np.zeros(0, dtype=np.float32)
        self._layers = geometry.layers
        self._every = -(-geometry.dimension // ANCHOR_ENTRIES)
        self._entries = -(-geometry.layers // self._every) * geometry.experts
        self._directions = np.zeros((0, self._entries), dtype=np.float32)

    def append(self) -> None:
        """Add a row for one more worker, which points nowhere yet."""
        row = len(self.length)
        if row == len(self._directions):
            self._directions = longer(self._directions)
        self._directions[row] = 0
        self.length = np.append(self.length, np.float32(0))

    def remove(self, row: int) -> None:
        """Remove a worker's row. The last row takes its place."""
        last = len(self.length) - 1
        for array in (self._directions, self.length):
            array[row] = array[last]
        self.length = self.length[:-1]

    def direction(self, profile: NDArray[np.float32], mean_profile: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Unit vector from the fleet's mean profile to that of a request, float32 [A].

        profile, mean_profile: float32 [D]. Returns None if they are equal.
        """
        direction = np.empty(self._entries, dtype=np.float32)
        found = kernels.unit_direction(profile, mean_profile, self._layers, self._every, direction)
        return direction if found else None

    def turn(self, row: int, direction: NDArray[np.float32]) -> None:
        """Move a worker's average towards the direction of a request, float32 [A]."""
        self.length[row] = kernels.move_towards(self._directions[row], direction, 1 / DIRECTION_REQUESTS)

    def along(self, direction: NDArray[np.float32]) -> NDArray[np.float64]:
        """Scalar product of a request's direction and each worker's average, float64 [W].

        Divided by `length` it is their cosine.
        """
        return row_products(self._directions[: len(self.length)], direction)
