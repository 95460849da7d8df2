"""Background refitting of zones: when to fit, what to fit, and the fit itself. A policy takes part with three methods.

Zones that were fitted once do not follow a change of traffic. ELDR's artifact therefore refits them every few seconds
to the signatures of the last few seconds. A minimum-cost matching of old and new centroids keeps each worker near its
old zone, so that running requests stay among similar ones. Nothing here reads a clock: the router or the replay passes
the time in, and a fit is an event that a policy is notified of like any other.
"""

from __future__ import annotations

import base64
import binascii
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr import kernels
from eldr.zones import align_zones, balanced_kmeans

# Signatures that a policy remembers, at one byte per entry: 12 MiB for 48 x 128 experts.
CAPACITY = 2048
# If the window has fewer signatures per zone than this, older ones are added. Below LEAST_PER_ZONE nothing is fitted.
WANTED_PER_ZONE = 16
LEAST_PER_ZONE = 2


@dataclass(frozen=True, slots=True, eq=False)
class Refit:
    """New zones for a fleet.

    workers: the W workers.
    centroids: float16 [W, D], unit vectors, the zone of each worker.
    moved: the number of workers whose new zone is nearer to another worker's old zone than to their own.
    shift: the mean cosine distance between a worker's new zone and its old one.
    """

    workers: tuple[str, ...]
    centroids: NDArray[np.float16]
    moved: int = 0
    shift: float = 0.0

    def to_wire(self) -> dict[str, Any]:
        """Return a JSON-serialisable form."""
        data = np.ascontiguousarray(self.centroids, dtype="<f2").tobytes()
        return {"workers": list(self.workers), "centroids": base64.b64encode(data).decode("ascii")}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Refit:
        """Build a refit from its wire form. Raises KeyError, TypeError or ValueError if it is not valid."""
        workers = tuple(wire["workers"])
        try:
            data = base64.b64decode(wire["centroids"], validate=True)
        except binascii.Error as error:
            raise ValueError(str(error)) from None
        return cls(workers, np.frombuffer(data, dtype="<f2").astype(np.float16).reshape(len(workers), -1))


@dataclass(frozen=True, slots=True, eq=False)
class RefitTask:
    """The input of a fit. It can be sent to another process.

    workers: the W workers.
    centroids: float32 [W, D], the zone that each worker has now.
    codes: uint8 [N, D], encoded signatures.
    seed: the seed of the clustering.
    """

    workers: tuple[str, ...]
    centroids: NDArray[np.float32]
    codes: NDArray[np.uint8]
    seed: int

    def run(self) -> Refit:
        """Compute balanced zones of the signatures, one per worker. Raises ZonesError if they cannot be clustered."""
        signatures = decode_signatures(self.codes)
        found = balanced_kmeans(signatures, len(self.workers), seed=self.seed).centroids
        centroids = found[align_zones(self.centroids, found)]
        to_old = centroids @ self.centroids.T
        own = to_old.diagonal()
        moved = int((to_old.max(axis=1) > own + 1e-6).sum())
        return Refit(self.workers, centroids.astype(np.float16), moved, float(1 - own.mean()))


def encode_signature(signature: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Encode entries in 0..1 as codes, uint8 [D], with entry = (code / 255)^2."""
    codes = np.empty(len(signature), dtype=np.uint8)
    kernels.encode_signature(np.ascontiguousarray(signature, dtype=np.float32), codes)
    return codes


def decode_signatures(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Decode signatures, float32 [N, D], from codes [N, D] of `encode_signature`.

    They are scaled to unit length again. All-zero signatures stay zero.
    """
    signatures = np.square(codes.astype(np.float32))
    norms = np.sqrt(np.einsum("nd,nd->n", signatures, signatures))
    return np.asarray(signatures / np.where(norms > 0, norms, 1)[:, None])


class SignatureWindow:
    """The last CAPACITY signatures.

    seen: how many signatures were added in total.
    """

    def __init__(self, dimension: int, capacity: int = CAPACITY) -> None:
        self.seen = 0
        self._codes = np.zeros((capacity, dimension), dtype=np.uint8)

    def add(self, signature: NDArray[np.float32]) -> None:
        """Add a signature, float32 [D], a unit vector without negative entries."""
        self._codes[self.seen % len(self._codes)] = encode_signature(signature)
        self.seen += 1

    def newest(self, count: int) -> NDArray[np.uint8]:
        """Copy the last `count` signatures, or as many as there are, oldest first: uint8 [n, D]."""
        count = min(count, self.seen, len(self._codes))
        return self._codes[np.arange(self.seen - count, self.seen) % len(self._codes)]


class RefitSchedule:
    """Decides when to fit, and to how many signatures. Times are seconds on any one clock."""

    def __init__(self, interval_s: float, window_s: float) -> None:
        self.interval_s = interval_s
        self._window_s = window_s
        self._marks: deque[tuple[float, int]] = deque([(0.0, 0)])

    def newest(self, now_s: float, seen: int) -> int:
        """Return how many of the `seen` signatures are in the window that ends now, rounded up to whole intervals."""
        marks = self._marks
        while len(marks) > 1 and marks[1][0] <= now_s - self._window_s:
            marks.popleft()
        oldest = marks[0][1]
        marks.append((now_s, seen))
        return seen - oldest
