"""Zones: cluster expert signatures with balanced spherical K-means, one centroid per decode worker.

The algorithm follows Malinen and Fränti (Balanced K-Means for Clustering, S+SSPR 2014). Each iteration finds the
cheapest assignment of all points in which no cluster exceeds its cap, then moves each centroid to the mean of its
points. The paper solves the assignment with the Hungarian method on an N x N matrix. Assigning N points to K
capacities is a transportation problem, whose residual graph needs only the K clusters as nodes: the edge from a to b
is the cheapest move of any point from a to b. Successive shortest paths with prices (Ahuja, Magnanti and Orlin,
Network Flows, 1993, chapter 9.7) on that graph reach the same optimum in O(N K) memory. Prices are kept between
iterations of K-means, so only a few points are out of place after the first one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.errors import EldrError

MAX_ITERATIONS = 50
# A single k-means++ start can end 10 % above the best result. A few starts make that rare at little cost.
STARTS = 4
SAMPLE_POINTS = 4096
# The cosine distance that float32 rounding can leave between equal unit vectors.
DUPLICATE_DISTANCE = 1e-6
# Costs are rounded to multiples of 1 / COST_UNITS, so the assignment uses exact integer arithmetic: ties are real and
# no tolerance is needed. 2**40 is far finer than the float32 products behind the costs, and path sums cannot overflow.
COST_UNITS = 2**40
UNREACHABLE = 2**61
SETTLED = 2**62


class ZonesError(EldrError):
    """Raised when signatures cannot be clustered. The message gives the reason."""


@dataclass(frozen=True, slots=True, eq=False)
class Zones:
    """The result of clustering N signatures of dimension D into K zones.

    centroids: float32 [K, D], unit vectors.
    labels: int64 [N], the zone of each signature. No zone has more than ceil(N / K).
    mean_distance: the mean cosine distance between a signature and its centroid.
    """

    centroids: NDArray[np.float32]
    labels: NDArray[np.int64]
    mean_distance: float

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Number of signatures in each zone, int64 [K]."""
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
    """Cluster signatures with balanced spherical K-means. The same seed gives the same zones.

    Centroids start from k-means++ and move to normalised means. The assignment is exact under the cap.

    signatures: [N, D], unit vectors. Zero vectors are allowed and are equally far from every centroid.
    k: the number of zones.
    seed: the seed of the random draws.
    starts: how many trial runs are made, on the non-zero signatures or on a sample of SAMPLE_POINTS of them. The final
        run covers all signatures and starts from the centroids of the best trial (after Bradley and Fayyad, Refining
        Initial Points for K-Means Clustering, 1998).
    max_iterations: the iteration limit of each run.
    cap: the largest zone allowed. None means ceil(N / K). N or more gives plain spherical K-means.
    Raises ZonesError if there are fewer signatures than zones, or if signatures are not unit vectors, not finite, or
    all zero.
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
    """Indices of the non-zero points. Raises ZonesError for points that cannot be clustered."""
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
    """Choose k points as first centroids, each with probability proportional to its squared distance to those chosen.

    This is the k-means++ of Arthur and Vassilvitskii (2007). Between unit vectors the squared distance is twice the
    cosine distance. A point is chosen twice only if there are too few others.
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
    """Cosine distances, int64 [N, K], in units of 1 / COST_UNITS."""
    return np.rint((1 - (points @ centroids.T).astype(np.float64)) * COST_UNITS).astype(np.int64)


def _update_sums(
    sums: NDArray[np.float64], points: NDArray[np.float32], old: NDArray[np.int64], new: NDArray[np.int64]
) -> None:
    """Update each cluster's sum of points, [K, D], from labels `old` (-1: none) to `new`.

    In late iterations few points move, so this is cheaper than summing again.
    """
    moved = np.flatnonzero(old != new)
    clusters = np.arange(len(sums))[:, None]
    change = (clusters == new[moved]).astype(np.float32) - (clusters == old[moved])
    sums += change.astype(np.float32) @ (points if len(moved) == len(points) else points[moved])


def _unit_centroids(sums: NDArray[np.float64], previous: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit vectors along `sums` [K, D]. A cluster whose points sum to zero keeps its previous centroid."""
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return np.where(norms > 1e-4, sums / np.maximum(norms, 1e-4), previous).astype(np.float32)


def align_zones(old: NDArray[np.float32], new: NDArray[np.float32]) -> NDArray[np.int64]:
    """Match new zones to old ones at the least total cosine distance.

    Returns int64 [K], the index of the new centroid that replaces each old one.

    old, new: [K, D], unit vectors.
    """
    return BalancedAssignment(len(old), len(new), cap=1).solve(_costs(old, new))[0]


class BalancedAssignment:
    """Finds least-cost assignments of N points to K clusters of at most `cap` points. Keeps its prices between solves.

    Free places are filled with dummy points that cost nothing in any cluster, so every cluster is exactly full and a
    price may have either sign. Every point sits where cost + price is lowest. A cluster with too many points sends one
    along the cheapest path of moves to a cluster with too few, and prices rise to preserve that invariant. Integer
    costs make the result exact. One path costs O(K^2) plus a scan of the points in the clusters on it.
    """

    def __init__(self, points: int, k: int, cap: int) -> None:
        if k * cap < points:
            raise ValueError(f"{points} points do not fit {k} clusters of {cap}")
        self._points, self._k, self._cap = points, k, cap
        self._prices = np.zeros(k, dtype=np.int64)
        self._labels = np.zeros(k * cap, dtype=np.int64)

    def solve(self, costs: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Find an optimal assignment. Returns labels, int64 [N], and the total cost.

        costs: int64 [N, K], |cost| <= 2**44.
        """
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
        """Move each point to the cluster with the lowest cost + price. On a tie with its old cluster it stays."""
        priced = self._costs + self._prices
        least = priced.argmin(axis=1)
        rows = np.arange(len(priced))
        self._labels = np.where(priced[rows, self._labels] <= priced[rows, least], self._labels, least)

    def _find_movers(self, origin: int, targets: NDArray[np.int64]) -> None:
        """For each target, find the point of `origin` that is cheapest to move there."""
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
        """Find the clusters on the cheapest path from one above the cap to one below it, and update the prices.

        Uses Dijkstra's algorithm on reduced costs. They are never negative, because every point sits at its lowest
        price.
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
        """Move one point and update the cheapest moves out of both clusters."""
        self._labels[point] = target
        extra = self._costs[point] - self._costs[point, target]
        cheaper = extra < self._move_cost[target]
        cheaper[target] = False
        self._move_cost[target, cheaper] = extra[cheaper]
        self._mover[target, cheaper] = point
        self._find_movers(origin, np.flatnonzero(self._mover[origin] == point))
