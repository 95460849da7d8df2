"""Zones: balanced spherical K-means over expert signatures, one centroid for each decode worker.

Balanced K-means after Malinen and Fränti (Balanced K-Means for Clustering, S+SSPR 2014): every iteration assigns all
points at the least total cost with no cluster above its cap, then moves each centroid to the mean of its points.
They solve the assignment with the Hungarian method on an N x N matrix. N points to K capacities is a transportation
problem, and its residual graph needs only the K clusters as nodes: an edge from a to b is the cheapest move of any
point from a to b. Successive shortest paths with prices (Ahuja, Magnanti and Orlin, Network Flows, 1993, chapter 9.7)
on that graph give the same optimum in O(N K) memory. Prices carry over from one iteration of K-means to the next, so
that after the first only a few points are out of place.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.errors import EldrError

MAX_ITERATIONS = 50
# One k-means++ start can end a tenth above the best; a few make that rare at little cost.
STARTS = 4
SAMPLE_POINTS = 4096
# Cosine distance that float32 leaves between equal unit vectors.
DUPLICATE_DISTANCE = 1e-6
# Costs are rounded to 1 / COST_UNITS, so that the assignment is exact integer arithmetic: no tolerance, real ties.
# 2**40 is far finer than the float32 products behind the costs, and leaves path sums far from overflow.
COST_UNITS = 2**40
UNREACHABLE = 2**61
SETTLED = 2**62


class ZonesError(EldrError):
    """Signatures that cannot be clustered; says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Zones:
    """K zones over N signatures of dimension D.

    centroids: float32 [K, D], unit vectors. labels: int64 [N], zone of each signature; no zone has more than
    ceil(N / K). mean_distance: mean cosine distance of a signature to its centroid.
    """

    centroids: NDArray[np.float32]
    labels: NDArray[np.int64]
    mean_distance: float

    @property
    def sizes(self) -> NDArray[np.int64]:
        """int64 [K]: signatures in each zone."""
        return np.bincount(self.labels, minlength=len(self.centroids))


def balanced_kmeans(
    signatures: NDArray[np.floating[Any]],
    k: int,
    *,
    seed: int = 0,
    starts: int = STARTS,
    max_iterations: int = MAX_ITERATIONS,
    cap: int | None = None,
) -> Zones:
    """Balanced spherical K-means: k-means++ start, exact assignment capped at ceil(N / K), normalised means.

    signatures: [N, D], unit vectors; zero vectors are allowed and are equally far from every centroid.
    starts: that many runs are made on the signatures that are not zero, or on a sample of SAMPLE_POINTS of them; a run
        over all signatures sets out from the centroids of the best (after Bradley and Fayyad, Refining Initial Points
        for K-Means Clustering, 1998).
    max_iterations: of each run. The same seed gives the same zones.
    cap: the largest zone allowed; None for ceil(N / K), N or more for plain spherical K-means.
    Raises ZonesError where there are fewer signatures than zones, or where signatures are not unit vectors, not
    finite, or all zero.
    """
    points = np.ascontiguousarray(signatures, dtype=np.float32)
    seen = _check_points(points, k)
    rng = np.random.default_rng(seed)
    if len(seen) > max(SAMPLE_POINTS, 4 * k):
        seen = np.sort(rng.choice(seen, max(SAMPLE_POINTS, 4 * k), replace=False))
    sample = points[seen]
    runs = (_one_run(sample, _kmeans_plus_plus(sample, k, rng), max_iterations, cap) for _ in range(starts))
    best = min(runs, key=lambda zones: zones.mean_distance)
    return _one_run(points, best.centroids, max_iterations, cap)


def _one_run(
    points: NDArray[np.float32], centroids: NDArray[np.float32], max_iterations: int, cap: int | None
) -> Zones:
    k = len(centroids)
    least = -(-len(points) // k)
    assignment = BalancedAssignment(len(points), k, cap=least if cap is None else min(max(cap, least), len(points)))
    labels = np.full(len(points), -1)
    sums = np.zeros(centroids.shape)
    best_cost = np.iinfo(np.int64).max
    for _ in range(max_iterations):
        new_labels, cost = assignment.solve(_costs(points, centroids))
        if cost >= best_cost or np.array_equal(new_labels, labels):
            break
        _update_sums(sums, points, labels, new_labels)
        labels, best_cost = new_labels, cost
        centroids = _unit_centroids(sums, centroids)
    distances = np.take_along_axis(_costs(points, centroids), labels[:, None], axis=1)
    return Zones(centroids, labels, float(distances.mean()) / COST_UNITS)


def _check_points(points: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Indices of the points that are not zero; raises ZonesError for what cannot be clustered."""
    if points.ndim != 2:
        raise ZonesError(f"signatures have shape {points.shape}, expected [N, D]")
    if k < 1:
        raise ZonesError(f"{k} zones: at least one is needed")
    if len(points) < k:
        raise ZonesError(f"{len(points)} calibration requests are too few for {k} zones; record at least {k}")
    norms = np.sqrt(np.einsum("nd,nd->n", points, points))
    if not np.isfinite(norms).all():
        raise ZonesError("signatures hold NaN or infinity")
    if (np.abs(norms - 1) > 1e-3)[norms > 0].any():
        raise ZonesError("signatures are not unit vectors")
    if not norms.any():
        raise ZonesError("every signature is zero: there is nothing to tell requests apart by")
    return np.flatnonzero(norms)


def _kmeans_plus_plus(points: NDArray[np.float32], k: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """k points as first centroids, each drawn in proportion to its squared distance to those drawn before.

    k-means++ of Arthur and Vassilvitskii (2007); between unit vectors the squared distance is twice the cosine
    distance. A point is drawn twice only where there are too few others.
    """
    distance = np.ones(len(points))
    chosen: list[int] = []
    for _ in range(k):
        total = distance.sum()
        chosen.append(int(rng.choice(len(points), p=distance / total if total > 0 else None)))
        to_chosen = (1 - points @ points[chosen[-1]]).astype(np.float64)
        to_chosen[to_chosen < DUPLICATE_DISTANCE] = 0
        distance = np.minimum(distance, to_chosen)
    return points[chosen]


def _costs(points: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.int64]:
    """int64 [N, K]: cosine distance in units of 1 / COST_UNITS."""
    return np.rint((1 - (points @ centroids.T).astype(np.float64)) * COST_UNITS).astype(np.int64)


def _update_sums(
    sums: NDArray[np.float64], points: NDArray[np.float32], old: NDArray[np.int64], new: NDArray[np.int64]
) -> None:
    """Bring each cluster's sum of points, [K, D], from labels `old` (-1: none) to `new`: late on, few points move."""
    moved = np.flatnonzero(old != new)
    clusters = np.arange(len(sums))[:, None]
    change = (clusters == new[moved]).astype(np.float32) - (clusters == old[moved])
    sums += change.astype(np.float32) @ (points if len(moved) == len(points) else points[moved])


def _unit_centroids(sums: NDArray[np.float64], previous: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit vectors along `sums` [K, D]; a cluster whose points sum to nothing keeps its previous centroid."""
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(norms > 1e-4, sums / np.maximum(norms, 1e-4), previous).astype(np.float32)


def align_zones(old: NDArray[np.float32], new: NDArray[np.float32]) -> NDArray[np.int64]:
    """int64 [K]: the new centroid that takes the place of each old one, both [K, D] unit vectors, at the least total
    cosine distance."""
    return BalancedAssignment(len(old), len(new), cap=1).solve(_costs(old, new))[0]


class BalancedAssignment:
    """Least-cost assignments of N points to K clusters of at most `cap` points; keeps its prices between solves.

    The free places become dummy points that cost nothing anywhere, so that every cluster is exactly full and a
    price may have any sign. Every point sits where cost + price is least; a cluster with too many points sends one
    along the cheapest path of moves to a cluster with too few, and prices rise so that this stays so. Integers make
    it exact for the costs given. One path costs O(K^2) plus a look at the points of the clusters on it.
    """

    def __init__(self, points: int, k: int, cap: int) -> None:
        if k * cap < points:
            raise ValueError(f"{points} points do not fit {k} clusters of {cap}")
        self._points, self._k, self._cap = points, k, cap
        self._prices = np.zeros(k, dtype=np.int64)
        self._labels = np.zeros(k * cap, dtype=np.int64)

    def solve(self, costs: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Labels int64 [N] and total cost of an optimal assignment under costs int64 [N, K], |cost| <= 2**44."""
        free = np.zeros((self._k * self._cap - self._points, self._k), dtype=np.int64)
        self._costs = np.concatenate((costs, free))
        self._place_at_least_price()
        sizes = np.bincount(self._labels, minlength=self._k)
        self._move_cost = np.full((self._k, self._k), UNREACHABLE, dtype=np.int64)
        self._mover = np.full((self._k, self._k), -1, dtype=np.int64)
        if (sizes > self._cap).any():
            for cluster in range(self._k):
                self._find_movers(cluster, np.arange(self._k))
        while (sizes > self._cap).any():
            path = self._shortest_path(sizes)
            for origin, target in pairwise(path):
                self._move(int(self._mover[origin, target]), origin, target)
            sizes[path[0]] -= 1
            sizes[path[-1]] += 1
        labels = self._labels[: self._points].copy()
        return labels, int(np.take_along_axis(costs, labels[:, None], axis=1).sum())

    def _place_at_least_price(self) -> None:
        """Each point to the cluster where cost + price is least; where its old one is as good, it stays."""
        priced = self._costs + self._prices
        least = priced.argmin(axis=1)
        rows = np.arange(len(priced))
        self._labels = np.where(priced[rows, self._labels] <= priced[rows, least], self._labels, least)

    def _find_movers(self, origin: int, targets: NDArray[np.int64]) -> None:
        """For each target the point of `origin` that moves there at least extra cost."""
        members = np.flatnonzero(self._labels == origin)
        targets = targets[targets != origin]
        if not len(members):
            self._move_cost[origin, targets] = UNREACHABLE
            return
        extra = self._costs[members[:, None], targets] - self._costs[members, origin][:, None]
        least = extra.argmin(axis=0)
        self._mover[origin, targets] = members[least]
        self._move_cost[origin, targets] = extra[least, np.arange(len(targets))]

    def _shortest_path(self, sizes: NDArray[np.int64]) -> list[int]:
        """Clusters on the cheapest path from one above the cap to one below it; updates the prices.

        Dijkstra's algorithm on reduced costs, which are never negative because every point sits at its least price.
        """
        reduced = self._move_cost + self._prices - self._prices[:, None]
        distance = np.where(sizes > self._cap, 0, UNREACHABLE)
        previous = np.full(self._k, -1)
        unsettled = distance.copy()
        while True:
            cluster = int(unsettled.argmin())
            if sizes[cluster] < self._cap:
                break
            unsettled[cluster] = SETTLED
            through = distance[cluster] + reduced[cluster]
            better = (through < distance) & (unsettled < SETTLED)
            distance[better] = unsettled[better] = through[better]
            previous[better] = cluster
        self._prices -= np.minimum(distance, distance[cluster])
        self._prices -= self._prices.min()
        path = [cluster]
        while previous[path[-1]] >= 0:
            path.append(int(previous[path[-1]]))
        return path[::-1]

    def _move(self, point: int, origin: int, target: int) -> None:
        """Move one point and mend the cheapest moves out of both clusters."""
        self._labels[point] = target
        extra = self._costs[point] - self._costs[point, target]
        cheaper = extra < self._move_cost[target]
        cheaper[target] = False
        self._move_cost[target, cheaper] = extra[cheaper]
        self._mover[target, cheaper] = point
        self._find_movers(origin, np.flatnonzero(self._mover[origin] == point))
