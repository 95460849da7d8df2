"""A request before it is placed, and the prediction of the experts that its decode steps will activate."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from eldr.activation import ActivationModel, of_a_step, to_probabilities
from eldr.counts import ExpertCounts
from eldr.policies.means import CALIBRATION_REQUESTS, FleetMeans
from eldr.policies.unions import Geometry


class Arrival:
    """A request to be placed, with everything that is known of it.

    request_id: its id.
    context_tokens: the tokens of its prompt.
    profile: float32 [D], the probabilities that a decode step activates each expert.
    frequency: float32 [D], its own expert frequencies. None if its counts cannot be used.
    direction: float32 [A], the unit vector from the fleet's mean profile to its own. None if there is none.
    limit_s: the longest step that the tail guard let pass when a worker was chosen for it. None before that.
    """

    __slots__ = ("context_tokens", "direction", "frequency", "limit_s", "profile", "request_id")

    def __init__(
        self,
        request_id: str,
        context_tokens: int,
        profile: NDArray[np.float32],
        frequency: NDArray[np.float32] | None,
        direction: NDArray[np.float32] | None,
    ) -> None:
        self.request_id = request_id
        self.context_tokens = context_tokens
        self.profile = profile
        self.frequency = frequency
        self.direction = direction
        self.limit_s: float | None = None


class RequestModel:
    """Predicts the profiles of requests from the expert counts of their prompts.

    predictor: a fitted activation model. Without one the prompt's own expert frequencies are used.
    step_tokens: the number of independent tokens that a request gains per step.
    """

    def __init__(self, predictor: ActivationModel | None, step_tokens: float) -> None:
        self._predictor = predictor
        self._step_tokens = step_tokens

    def profile(
        self, counts: ExpertCounts, frequency: NDArray[np.float32], means: FleetMeans | None
    ) -> NDArray[np.float32]:
        """Predict the probability that one decode step of a request activates each expert, float32 [D].

        counts: its expert counts.
        frequency: float32 [D], its own expert frequencies, mixed with the fleet's mean.
        means: the fleet's means. A fitted model needs them.
        """
        predictor = self._predictor
        if predictor is not None and means is not None:
            token = predictor.predict(frequency, means.frequency, predictor.share(means.spread))
        else:
            token = to_probabilities(frequency, counts.layers, counts.top_k)
        return of_a_step(token, self._step_tokens)

    def first_means(self, geometry: Geometry, top_k: int) -> FleetMeans:
        """The fleet's means before it has started a request."""
        predictor = self._predictor
        if predictor is None:
            uniform = np.full(geometry.dimension, top_k / geometry.experts, dtype=np.float32)
            return FleetMeans(geometry, uniform, of_a_step(uniform.copy(), self._step_tokens), 0)
        profile = of_a_step(predictor.mean_profile.astype(np.float32), self._step_tokens)
        frequency = predictor.mean_frequency.astype(np.float32)
        spread = predictor.spread if math.isfinite(predictor.spread) else None
        return FleetMeans(geometry, frequency, profile, CALIBRATION_REQUESTS, spread)
