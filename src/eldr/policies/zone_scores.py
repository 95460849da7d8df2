"""How near the signature of a prompt is to each zone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.policies.refit import SignatureWindow
from eldr.signature import TRANSFORMS, SignatureModel


class ZoneScores:
    """Cosine similarities of signatures with the centroids of K zones.

    dimension: D, the entries of a signature.
    centroids: float32 [K, D], unit vectors.
    """

    def __init__(self, signature: SignatureModel, centroids: NDArray[np.float32]) -> None:
        mask = signature.layer_mask
        self._layers = slice(None) if mask.all() else np.flatnonzero(mask)
        self._entries = TRANSFORMS[signature.transform_name].entries
        self._idf = signature.idf[mask].reshape(-1)
        self.dimension = len(self._idf)
        self.set_centroids(centroids)

    def set_centroids(self, centroids: NDArray[np.float32]) -> None:
        """Use these zones from now on. float32 [K, D], unit vectors."""
        self.centroids = centroids
        self._alike = centroids @ centroids.T
        # centroid . (entries * idf) = (centroid * idf) . entries: one matrix-vector product scores all zones.
        self._weights = np.ascontiguousarray(centroids * self._idf)

    def similarities(self, source: NDArray[Any], window: SignatureWindow | None) -> NDArray[np.float32] | None:
        """Cosine similarity of the signature to each centroid, float32 [K]. None if the signature is zero.

        source: [L, E], the counts of a prompt, or numbers in proportion to what they are expected to be.
        window: remembers the signature for a refit. None if there are no refits.
        """
        entries = self._entries(source[self._layers]).reshape(-1)
        weighted = entries * self._idf
        # Use einsum, not BLAS: on busy cores BLAS threads take milliseconds to synchronise for a product this small.
        norm = np.sqrt(np.einsum("d,d->", weighted, weighted))
        if norm == 0:
            return None
        if window is not None:
            window.add(weighted / norm)
        return np.asarray(np.einsum("kd,d->k", self._weights, entries) / norm, dtype=np.float32)

    def alike(self, zones: list[int]) -> list[list[float]]:
        """Cosine similarities of the centroids of n zones with each other, [n][n]."""
        rows: list[list[float]] = self._alike[zones][:, zones].tolist()
        return rows
