"""Locality-band routing of ELDR (arXiv 2607.00466): the least loaded of the workers whose zone is near enough."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eldr.policies.base import Decision, DecodeRequest, Picture, Policy
from eldr.policies.learned import Learned
from eldr.policies.load import least_loaded
from eldr.policies.refit import LEAST_PER_ZONE, WANTED_PER_ZONE, Refit, RefitTask, SignatureWindow
from eldr.policies.request_model import PromptPredictor
from eldr.policies.zone_owners import ZoneOwners
from eldr.policies.zone_scores import ZoneScores

if TYPE_CHECKING:
    from eldr.calibration import Calibration
    from eldr.prompt.model import PromptModel


class LocalityBand(Policy):
    """Sends each request to the least loaded eligible worker whose centroid is within `tau` of the nearest centroid.

    calibration: the signature model and the zones.
    signature: one of SIGNATURES: what requests are known by.
    tau: the width of the band in cosine similarity. 0 is pure locality. 2 admits every worker, and so does 1, because
        counts are never negative.
    two_nearest: whether a band of a single worker is widened by the second-nearest worker (all of them on a tie). Only
        applies for tau > 0.
    remember: the number of signatures kept for refitting. 0 leaves the zones as they were fitted.
    seed: the seed of random choices.

    `ZoneOwners` says which worker has which zone. The neighbours of a zone without an owner serve it. A refit gives
    every worker a zone of its own.
    """

    name = "locality-band"

    def __init__(
        self,
        calibration: Calibration,
        *,
        signature: str = "auto",
        tau: float = 0.1,
        two_nearest: bool = True,
        remember: int = 0,
        seed: int = 0,
    ) -> None:
        self._geometry = calibration.geometry
        self._calibration = calibration
        self._by_prompt = PromptPredictor(calibration.prompts, 1.0)
        self._uses_counts = signature != "prompt"
        of_prompts = calibration.prompt_centroids
        self._uses_prompts = signature != "counts" and of_prompts is not None
        self._tau = tau
        self._two_nearest = two_nearest
        self._seed = seed
        self._rng = random.Random(seed)
        self._owners = ZoneOwners(calibration.workers)
        self._scores = ZoneScores(calibration.signature, calibration.centroids)
        self._prompt_scores = self._scores if of_prompts is None else ZoneScores(calibration.signature, of_prompts)
        if not self._uses_counts:
            self._scores = self._prompt_scores
        self._recent = SignatureWindow(self._scores.dimension, remember) if remember else None

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        counts, geometry = request.counts if self._uses_counts else None, self._geometry
        if counts is not None and (counts.layers, counts.experts, counts.top_k) == geometry.shape:
            source: NDArray[Any] = counts.counts
            scores, reason = self._scores, "locality"
        else:
            expected = self._expected_counts(request)
            if expected is None:
                return Decision(
                    least_loaded(in_flight, self._rng), "no_signature" if counts is None else "wrong_geometry"
                )
            source = expected
            scores, reason = self._prompt_scores, "locality_prompt"
        similarity = scores.similarities(source, self._recent if scores is self._scores else None)
        if similarity is None:
            return Decision(least_loaded(in_flight, self._rng), "zero_signature")
        of_zone, zone_of = similarity.tolist(), self._owners.zone_of
        band = self._band({worker: of_zone[zone_of[worker]] for worker in in_flight})
        return Decision(least_loaded({worker: in_flight[worker] for worker in band}, self._rng), reason)

    def _expected_counts(self, request: DecodeRequest) -> NDArray[np.float32] | None:
        """What the words of a prompt let expect of its counts, in proportion, float32 [L, E]. None if nothing."""
        latent = self._by_prompt.latent(request) if self._uses_prompts else None
        profile = None if latent is None else self._by_prompt.profile(latent)
        if profile is None or len(profile) != self._geometry.layers * self._geometry.experts:
            return None
        return self._calibration.expected_counts(profile)

    def wants_words(self, with_counts: bool) -> bool:
        return self._uses_prompts and not (with_counts and self._uses_counts)

    @property
    def prompts(self) -> PromptModel | None:
        return self._calibration.prompts

    def learned(self, learned: Learned) -> None:
        if self._uses_prompts:
            self._by_prompt.learned(learned)

    def _band(self, nearness: Mapping[str, float]) -> list[str]:
        floor = max(nearness.values()) - self._tau
        band = [worker for worker, value in nearness.items() if value >= floor]
        if self._two_nearest and self._tau > 0 and len(band) == 1 and len(nearness) > 1:
            second = max(value for worker, value in nearness.items() if worker != band[0])
            band += [worker for worker, value in nearness.items() if value == second]
        return band

    @property
    def signatures_seen(self) -> int:
        return 0 if self._recent is None else self._recent.seen

    def refit_task(self, newest: int) -> RefitTask | None:
        zone_of = self._owners.zone_of
        if self._recent is None or len(zone_of) < 2:
            return None
        codes = self._recent.newest(max(newest, WANTED_PER_ZONE * len(zone_of)))
        if len(codes) < LEAST_PER_ZONE * len(zone_of):
            return None
        return RefitTask(tuple(zone_of), self._scores.centroids[list(zone_of.values())], codes, self._seed)

    def refitted(self, refit: Refit) -> None:
        if refit.centroids.shape[1] != self._scores.dimension:
            raise ValueError(f"zones have {refit.centroids.shape[1]} entries, signatures {self._scores.dimension}")
        self._scores.set_centroids(refit.centroids.astype(np.float32))
        self._owners.replace(refit.workers)

    def joined(self, worker: str) -> None:
        self._owners.join(worker)

    def left(self, worker: str) -> None:
        self._owners.leave(worker)

    def picture(self) -> Picture | None:
        zone_of = self._owners.zone_of
        return Picture("zones", dict(zip(zone_of, self._scores.alike(list(zone_of.values())), strict=True)), 1.0)
