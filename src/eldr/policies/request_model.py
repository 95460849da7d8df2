"""A request before it is placed, and the prediction of the experts that its decode steps will activate.

A prediction comes from the expert counts of the prompt, or from its words, or, where neither is known, from the fleet's
mean. Each of the first two is a predictor of a request's profile.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from eldr.activation import ActivationModel, of_a_step, to_probabilities
from eldr.counts import ExpertCounts
from eldr.policies.base import DecodeRequest
from eldr.policies.learned import Learned
from eldr.policies.means import CALIBRATION_REQUESTS, FleetMeans
from eldr.policies.unions import Geometry
from eldr.prompt.model import ProfileMap, PromptModel, WordTable

# What a signature is made from: the counts of a prompt, its words, or counts where they came and else words.
SIGNATURES: Final = ("auto", "counts", "prompt")


class Arrival:
    """A request to be placed, with everything that is known of it.

    request_id: its id.
    context_tokens: the tokens of its prompt.
    profile: float32 [D], the probabilities that a decode step activates each expert.
    frequency: float32 [D], its own expert frequencies. None if its counts cannot be used.
    direction: float32 [A], the unit vector from the fleet's mean profile to its own. None if there is none.
    reason: why the decision about it is what it is, for `Decision`.
    known: whether the profile is its own, and not the fleet's mean.
    learned: whether the profile comes from reports of finished requests, which may lie.
    limit_s: the longest step that the tail guard let pass when a worker was chosen for it. None before that.
    """

    __slots__ = (
        "context_tokens",
        "direction",
        "frequency",
        "known",
        "learned",
        "limit_s",
        "profile",
        "reason",
        "request_id",
    )

    def __init__(
        self,
        request: DecodeRequest,
        profile: NDArray[np.float32],
        frequency: NDArray[np.float32] | None,
        direction: NDArray[np.float32] | None,
        reason: str,
        known: bool,
        learned: bool = False,
    ) -> None:
        self.request_id = request.request_id
        self.context_tokens = request.prompt_tokens
        self.profile = profile
        self.frequency = frequency
        self.direction = direction
        self.reason = reason
        self.known = known
        self.learned = learned
        self.limit_s: float | None = None


class CountsPredictor:
    """Predicts the profile of a request from the expert counts of its prompt.

    fitted: an activation model. Without one the prompt's own expert frequencies are used.
    step_tokens: the number of independent tokens that a request gains per step.
    has_learned: whether it goes by a model that was learned from reports.
    """

    def __init__(self, fitted: ActivationModel | None, step_tokens: float) -> None:
        self._fitted = fitted
        self._model = fitted
        self._step_tokens = step_tokens
        self.has_learned = False

    def learned(self, learned: Learned) -> None:
        """Use another model from now on."""
        self.has_learned = learned.activation is not None
        self._model = learned.activation or self._fitted

    def profile(
        self, counts: ExpertCounts, frequency: NDArray[np.float32], means: FleetMeans | None
    ) -> NDArray[np.float32]:
        """Predict the probability that one decode step of a request activates each expert, float32 [D].

        counts: its expert counts.
        frequency: float32 [D], its own expert frequencies, mixed with the fleet's mean.
        means: the fleet's means. A model needs them.
        """
        model = self._model
        if model is not None and means is not None and len(model.slope) == len(frequency):
            token = model.predict(frequency, means.frequency, model.share(means.spread))
        else:
            token = to_probabilities(frequency, counts.layers, counts.top_k)
        return of_a_step(token, self._step_tokens)


class PromptPredictor:
    """Predicts the profile of a request from the words of its prompt.

    model: a fitted prompt model. None if there is none yet.
    step_tokens: as for `CountsPredictor`.
    """

    def __init__(self, model: PromptModel | None, step_tokens: float) -> None:
        self._fitted = model
        self.profiles: ProfileMap | None = None if model is None else model.profiles
        self._words: WordTable | None = None if model is None else model.words
        self._step_tokens = step_tokens

    def learned(self, learned: Learned) -> None:
        """Use another model from now on."""
        fitted = self._fitted
        if learned.profiles is None and fitted is not None:
            self.profiles, self._words = fitted.profiles, fitted.words
        else:
            self.profiles, self._words = learned.profiles, learned.words

    def latent(self, request: DecodeRequest) -> NDArray[np.float32] | None:
        """What the model makes of the words of a request, which is noted there. None if it knows none of them."""
        if request.words is not None and self._words is not None:
            request.latent = self._words.latent(request.words)
        return request.latent

    def profile(self, latent: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Predict the probability that one decode step of a request activates each expert, float32 [D].

        None if the latent is another model's.
        """
        profiles = self.profiles
        if profiles is None or len(latent) != len(profiles.up):
            return None
        return of_a_step(profiles.profile(latent), self._step_tokens)


def first_means(
    geometry: Geometry, top_k: int, fitted: ActivationModel | None, prompts: ProfileMap | None, step_tokens: float
) -> FleetMeans:
    """The fleet's means before it has started a request."""
    if fitted is None:
        unused = np.zeros(geometry.dimension, dtype=np.float32)
        if prompts is not None:
            return FleetMeans(geometry, unused, of_a_step(prompts.mean.copy(), step_tokens), 0, CALIBRATION_REQUESTS)
        uniform = np.full(geometry.dimension, top_k / geometry.experts, dtype=np.float32)
        return FleetMeans(geometry, unused, of_a_step(uniform, step_tokens), 0, 0)
    profile = of_a_step(fitted.mean_profile.astype(np.float32), step_tokens)
    frequency = fitted.mean_frequency.astype(np.float32)
    spread = fitted.spread if math.isfinite(fitted.spread) else None
    return FleetMeans(geometry, frequency, profile, CALIBRATION_REQUESTS, CALIBRATION_REQUESTS, spread)
