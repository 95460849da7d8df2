"""Running means over the requests of a fleet."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eldr import kernels
from eldr.policies.unions import RANDOM_BATCH_STARTS, Geometry, RandomBatches

# Length of the moving averages, in requests.
MEAN_REQUESTS = 500
# The weight of a calibration's means at the start. Traffic may differ from what was recorded, and directions from the
# mean of other traffic all point the same way.
CALIBRATION_REQUESTS = 20


class FleetMeans:
    """Moving averages over the requests that the fleet has started.

    frequency: float32 [D], the mean of the expert frequencies of those with counts. It is zero for experts that no
        prompt has used.
    profile: float32 [D], the mean of the probabilities that a decode step activates each expert.
    at_random: batches of requests with the mean profile.
    in_use: bool [L, E], the experts that prompts have used. The layers of a model may differ in experts, and counts are
        padded with zeros, so this is how many a layer has. All, as long as few requests had counts. It is replaced,
        never changed.
    spread: the mean squared distance of these frequencies from their mean. None if nobody asks for it.
    with_counts, requests: the weight of the initial means, in requests. With 0 the first request replaces them.
    """

    def __init__(
        self,
        geometry: Geometry,
        frequency: NDArray[np.float32],
        profile: NDArray[np.float32],
        with_counts: int,
        requests: int,
        spread: float | None = None,
    ) -> None:
        self.frequency = frequency
        self.profile = profile
        self.at_random = RandomBatches(geometry)
        self.at_random.set_mean(profile)
        self._layers = geometry.layers
        self._with_counts = with_counts
        self.in_use = np.ones((geometry.layers, geometry.experts), dtype=np.bool_)
        if with_counts:
            self._look_at_experts()
        self.spread = spread
        self._requests = requests

    def move(self, frequency: NDArray[np.float32] | None, profile: NDArray[np.float32]) -> None:
        """Count one more request. frequency: float32 [D], None without counts. profile: float32 [D]."""
        if frequency is not None:
            self._with_counts = min(self._with_counts + 1, MEAN_REQUESTS)
            if self.spread is not None:
                distance = frequency - self.frequency
                self.spread += (float(distance @ distance) - self.spread) / self._with_counts
            kernels.move_towards(self.frequency, frequency, 1 / self._with_counts)
        self._requests = min(self._requests + 1, MEAN_REQUESTS)
        kernels.move_towards(self.profile, profile, 1 / self._requests)
        if self.at_random.started(self.profile) and self._with_counts >= RANDOM_BATCH_STARTS:
            self._look_at_experts()

    def _look_at_experts(self) -> None:
        in_use = self.frequency.reshape(self._layers, -1) > 0
        if (in_use != self.in_use).any():
            self.in_use = in_use
