"""Locality-band routing of ELDR (arXiv 2607.00466): the least loaded of the workers whose zone is near enough."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eldr.counts import ExpertCounts
from eldr.policies.base import Decision, DecodeRequest, Picture, Policy
from eldr.policies.load import least_loaded
from eldr.policies.refit import LEAST_PER_ZONE, WANTED_PER_ZONE, Refit, RefitTask, SignatureWindow
from eldr.signature import TRANSFORMS

if TYPE_CHECKING:
    from eldr.calibration import Calibration


class LocalityBand(Policy):
    """Sends each request to the least loaded eligible worker whose centroid is within `tau` of the nearest centroid.

    calibration: the signature model and the zones.
    tau: the width of the band in cosine similarity. 0 is pure locality. 2 admits every worker, and so does 1, because
        counts are never negative.
    two_nearest: whether a band of a single worker is widened by the second-nearest worker (all of them on a tie). Only
        applies for tau > 0.
    remember: the number of signatures kept for refitting. 0 leaves the zones as they were fitted.
    seed: the seed of random choices.

    Zones belong to workers. A worker that joins takes the zone with the fewest owners, the first one on a tie, so
    several workers may share a zone. When a worker leaves, its zone takes over an owner from a zone that has at least
    two more. If there is no such zone, a zone may stay without an owner until another worker joins, and its neighbours
    serve it. A refit gives every worker a zone of its own.
    """

    name = "locality-band"

    def __init__(
        self,
        calibration: Calibration,
        *,
        tau: float = 0.1,
        two_nearest: bool = True,
        remember: int = 0,
        seed: int = 0,
    ) -> None:
        signature = calibration.signature
        self._geometry = calibration.geometry
        self._tau = tau
        self._two_nearest = two_nearest
        self._seed = seed
        self._rng = random.Random(seed)
        self._zone: dict[str, int] = {}
        self._owners = [0] * calibration.workers
        mask = signature.layer_mask
        self._layers = slice(None) if mask.all() else np.flatnonzero(mask)
        self._entries = TRANSFORMS[signature.transform_name].entries
        self._idf = signature.idf[mask].reshape(-1)
        self._set_centroids(calibration.centroids)
        self._recent = SignatureWindow(len(self._idf), remember) if remember else None

    def _set_centroids(self, centroids: NDArray[np.float32]) -> None:
        self._centroids = centroids
        self._alike = centroids @ centroids.T
        # centroid . (entries * idf) = (centroid * idf) . entries: one matrix-vector product scores all zones.
        self._weights = np.ascontiguousarray(centroids * self._idf)

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        counts = request.counts
        if counts is None:
            return Decision(least_loaded(in_flight, self._rng), "no_signature")
        geometry = self._geometry
        if (counts.layers, counts.experts, counts.top_k) != (geometry.layers, geometry.experts, geometry.top_k):
            return Decision(least_loaded(in_flight, self._rng), "wrong_geometry")
        similarity = self.similarities(counts)
        if similarity is None:
            return Decision(least_loaded(in_flight, self._rng), "zero_signature")
        of_zone = similarity.tolist()
        nearness = {worker: of_zone[self._zone[worker]] for worker in in_flight}
        band = self._band(nearness)
        return Decision(least_loaded({worker: in_flight[worker] for worker in band}, self._rng), "locality")

    def similarities(self, counts: ExpertCounts) -> NDArray[np.float32] | None:
        """Cosine similarity of the signature to each centroid, float32 [K]. None if the signature is zero."""
        entries = self._entries(counts.counts[self._layers]).reshape(-1)
        weighted = entries * self._idf
        # Use einsum, not BLAS: on busy cores BLAS threads take milliseconds to synchronise for a product this small.
        norm = np.sqrt(np.einsum("d,d->", weighted, weighted))
        if norm == 0:
            return None
        if self._recent is not None:
            self._recent.add(weighted / norm)
        return np.asarray(np.einsum("kd,d->k", self._weights, entries) / norm, dtype=np.float32)

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
        workers = tuple(self._zone)
        if self._recent is None or len(workers) < 2:
            return None
        codes = self._recent.newest(max(newest, WANTED_PER_ZONE * len(workers)))
        if len(codes) < LEAST_PER_ZONE * len(workers):
            return None
        return RefitTask(workers, self._centroids[list(self._zone.values())], codes, self._seed)

    def refitted(self, refit: Refit) -> None:
        if refit.centroids.shape[1] != len(self._idf):
            raise ValueError(f"zones have {refit.centroids.shape[1]} entries, signatures {len(self._idf)}")
        self._set_centroids(refit.centroids.astype(np.float32))
        zone_of = {worker: zone for zone, worker in enumerate(refit.workers)}
        joined_since = [worker for worker in self._zone if worker not in zone_of]
        self._zone = {worker: zone_of[worker] for worker in self._zone if worker in zone_of}
        self._owners = [0] * len(refit.workers)
        for zone in self._zone.values():
            self._owners[zone] += 1
        for worker in joined_since:
            self.joined(worker)

    def joined(self, worker: str) -> None:
        zone = self._owners.index(min(self._owners))
        self._zone[worker] = zone
        self._owners[zone] += 1

    def left(self, worker: str) -> None:
        self._owners[self._zone.pop(worker)] -= 1
        most, fewest = max(self._owners), min(self._owners)
        if most - fewest > 1:
            crowded, lonely = self._owners.index(most), self._owners.index(fewest)
            newest = [worker for worker, zone in self._zone.items() if zone == crowded][-1]
            self._zone[newest] = lonely
            self._owners[crowded] -= 1
            self._owners[lonely] += 1

    def picture(self) -> Picture | None:
        zones = list(self._zone.values())
        return Picture("zones", dict(zip(self._zone, self._alike[zones][:, zones].tolist(), strict=True)), 1.0)
