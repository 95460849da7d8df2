"""Background refitting of zones: what to fit, the fit itself, and when. A policy takes part by three of its methods.

Zones that were fitted once do not follow a change of traffic. ELDR's artifact therefore fits them again every few
seconds to the signatures of the last few, and keeps each worker near the zone it had by a minimum-cost matching of old
and new centroids, so that running requests stay among their like. Nothing here reads a clock: whoever drives the refits
(the router, the replay) says what time it is, and a fit is an event that a policy hears like any other.
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

# Signatures that a policy remembers, one byte an entry: 12 MiB at 48 x 128 experts.
CAPACITY = 2048
# Where the window has fewer signatures a zone than this, older ones are taken in; below LEAST_PER_ZONE nothing is
# fitted.
WANTED_PER_ZONE = 16
LEAST_PER_ZONE = 2


@dataclass(frozen=True, slots=True, eq=False)
class Refit:
    """New zones. workers: W of them; centroids: float16 [W, D], unit vectors, the zone of each.

    moved: workers whose new zone is nearer to another's old zone than to their own. shift: mean cosine distance of a
    worker's new zone to its old one.
    """

    workers: tuple[str, ...]
    centroids: NDArray[np.float16]
    moved: int = 0
    shift: float = 0.0

    def to_wire(self) -> dict[str, Any]:
        """JSON-able form of what a policy hears."""
        data = np.ascontiguousarray(self.centroids, dtype="<f2").tobytes()
        return {"workers": list(self.workers), "centroids": base64.b64encode(data).decode("ascii")}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Refit:
        """Raises KeyError, TypeError or ValueError for what is none."""
        workers = tuple(wire["workers"])
        try:
            data = base64.b64decode(wire["centroids"], validate=True)
        except binascii.Error as error:
            raise ValueError(str(error)) from None
        return cls(workers, np.frombuffer(data, dtype="<f2").astype(np.float16).reshape(len(workers), -1))


@dataclass(frozen=True, slots=True, eq=False)
class RefitTask:
    """What a fit needs, fit to be sent to another process.

    workers: W of them. centroids: float32 [W, D], the zone that each has now. codes: uint8 [N, D], signatures.
    """

    workers: tuple[str, ...]
    centroids: NDArray[np.float32]
    codes: NDArray[np.uint8]
    seed: int

    def run(self) -> Refit:
        """Balanced zones of the signatures, one a worker. Raises ZonesError where they cannot be clustered."""
        signatures = decode_signatures(self.codes)
        found = balanced_kmeans(signatures, len(self.workers), seed=self.seed).centroids
        centroids = found[align_zones(self.centroids, found)]
        to_old = centroids @ self.centroids.T
        own = to_old.diagonal()
        moved = int((to_old.max(axis=1) > own + 1e-6).sum())
        return Refit(self.workers, centroids.astype(np.float16), moved, float(1 - own.mean()))


def encode_signature(signature: NDArray[np.float32]) -> NDArray[np.uint8]:
    """uint8 [D]: entries 0..1 as codes, (code / 255)^2."""
    codes = np.empty(len(signature), dtype=np.uint8)
    kernels.encode_signature(np.ascontiguousarray(signature, dtype=np.float32), codes)
    return codes


def decode_signatures(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float32 [N, D] from codes [N, D], made by `encode_signature`, scaled to unit length again; all zero stays
    zero."""
    signatures = np.square(codes.astype(np.float32))
    norms = np.sqrt(np.einsum("nd,nd->n", signatures, signatures))
    return np.asarray(signatures / np.where(norms > 0, norms, 1)[:, None])


class SignatureWindow:
    """The last CAPACITY signatures. seen: how many there have been in all."""

    def __init__(self, dimension: int, capacity: int = CAPACITY) -> None:
        self.seen = 0
        self._codes = np.zeros((capacity, dimension), dtype=np.uint8)

    def add(self, signature: NDArray[np.float32]) -> None:
        """signature: float32 [D], unit vector without negative entries."""
        self._codes[self.seen % len(self._codes)] = encode_signature(signature)
        self.seen += 1

    def newest(self, count: int) -> NDArray[np.uint8]:
        """uint8 [n, D]: a copy of the last `count`, or of as many as there are, oldest first."""
        count = min(count, self.seen, len(self._codes))
        return self._codes[np.arange(self.seen - count, self.seen) % len(self._codes)]


class RefitSchedule:
    """When to fit, and to how many signatures. Times are of any one clock, in seconds."""

    def __init__(self, interval_s: float, window_s: float) -> None:
        self.interval_s = interval_s
        self._window_s = window_s
        self._marks: deque[tuple[float, int]] = deque([(0.0, 0)])

    def newest(self, now_s: float, seen: int) -> int:
        """How many of the `seen` signatures are of the window that ends now, rounded up to whole intervals."""
        marks = self._marks
        while len(marks) > 1 and marks[1][0] <= now_s - self._window_s:
            marks.popleft()
        oldest = marks[0][1]
        marks.append((now_s, seen))
        return seen - oldest
