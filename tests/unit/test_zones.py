"""Balanced K-means: assignments against scipy's Hungarian method, the objective against k-means-constrained."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from k_means_constrained import KMeansConstrained
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from eldr.zones import SAMPLE_POINTS, BalancedAssignment, ZonesError, balanced_kmeans


def unit(rng: np.random.Generator, points: int, dimension: int, kinds: int = 5) -> NDArray[np.float64]:
    """Non-negative unit vectors of unequally many kinds."""
    centres = rng.random((kinds, dimension)) ** 4
    drawn = centres[rng.choice(kinds, points, p=rng.dirichlet(np.full(kinds, 0.7)))]
    drawn = drawn * rng.random((points, dimension)) + 1e-3
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def mean_distance(points: NDArray[np.float64], labels: NDArray[Any], k: int) -> float:
    """Mean cosine distance to the normalised mean of the own cluster; zero vectors are at distance 1."""
    return float(1 - sum(np.linalg.norm(points[labels == zone].sum(axis=0)) for zone in range(k)) / len(points))


@st.composite
def transportation_problems(draw: st.DrawFn) -> tuple[int, int, int, list[NDArray[np.int64]]]:
    k = draw(st.integers(1, 7))
    points = draw(st.integers(1, 24))
    cap = -(-points // k) + draw(st.integers(0, 2))
    largest = draw(st.sampled_from([1, 3, 2**41]))  # 1 and 3: nearly everything is a tie
    solves = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return k, points, cap, [rng.integers(-largest, largest + 1, (points, k)) for _ in range(solves)]


@settings(max_examples=400, deadline=None)
@given(transportation_problems())
def test_assignments_are_optimal_at_every_solve(problem: tuple[int, int, int, list[NDArray[np.int64]]]) -> None:
    k, points, cap, all_costs = problem
    assignment = BalancedAssignment(points, k, cap)
    for costs in all_costs:  # later solves start from the prices of earlier ones
        labels, cost = assignment.solve(costs)
        places = np.repeat(costs, cap, axis=1)
        rows, columns = linear_sum_assignment(places)
        assert np.bincount(labels, minlength=k).max() <= cap
        assert costs[np.arange(points), labels].sum() == cost == places[rows, columns].sum()


@pytest.mark.parametrize(("points", "k"), [(1, 1), (7, 7), (40, 1), (300, 40), (500, 3)])
def test_assignments_of_larger_problems_are_optimal(points: int, k: int) -> None:
    costs = np.random.default_rng(points).integers(0, 2**40, (points, k))
    costs[:, 0] //= 8  # everybody wants cluster 0
    cap = -(-points // k)
    _, cost = BalancedAssignment(points, k, cap).solve(costs)
    places = np.repeat(costs, cap, axis=1)
    assert cost == places[linear_sum_assignment(places)].sum()


def test_too_many_points_for_the_places() -> None:
    with pytest.raises(ValueError, match="7 points do not fit 2 clusters of 3"):
        BalancedAssignment(7, 2, 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.data())
def test_sizes_stay_within_the_cap_and_centroids_are_unit(points: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, points))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    signatures = unit(rng, points, 6)
    signatures[rng.random(points) < data.draw(st.sampled_from([0, 0.5]))] = signatures[0]  # duplicates
    signatures[1:][rng.random(points - 1) < data.draw(st.sampled_from([0, 0.5, 1]))] = 0
    zones = balanced_kmeans(signatures, k, seed=1)
    assert zones.labels.shape == (points,)
    assert zones.sizes.sum() == points
    assert zones.sizes.max() <= -(-points // k)
    assert zones.centroids.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(zones.centroids, axis=1), 1, atol=1e-5)


def test_centroids_are_normalised_means_and_the_distance_is_theirs() -> None:
    signatures = unit(np.random.default_rng(0), 100, 20)
    zones = balanced_kmeans(signatures, 6)
    for zone in range(6):
        mean = signatures[zones.labels == zone].mean(axis=0)
        np.testing.assert_allclose(zones.centroids[zone], mean / np.linalg.norm(mean), atol=1e-5)
    assert zones.mean_distance == pytest.approx(mean_distance(signatures, zones.labels, 6), abs=1e-6)


def test_the_end_is_a_fixed_point() -> None:
    """With the centroids returned, no other assignment within the cap is nearer."""
    signatures = unit(np.random.default_rng(4), 90, 20)
    zones = balanced_kmeans(signatures, 4)
    distances = 1 - signatures @ zones.centroids.T.astype(float)
    places = np.repeat(distances, 23, axis=1)
    best = places[linear_sum_assignment(places)].sum()
    assert distances[np.arange(90), zones.labels].sum() == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize(("points", "k", "dimension"), [(200, 4, 30), (301, 6, 80), (400, 16, 40)])
def test_as_good_as_k_means_constrained(points: int, k: int, dimension: int) -> None:
    """Its objective is the Euclidean one; on unit vectors the same partitions are good for both."""
    signatures = unit(np.random.default_rng(points), points, dimension, kinds=8)
    other = KMeansConstrained(k, size_max=-(-points // k), n_init=10, random_state=0).fit_predict(signatures)
    ours = balanced_kmeans(signatures, k).mean_distance
    assert ours <= 1.01 * mean_distance(signatures, other, k)


def test_finds_kinds_that_are_there() -> None:
    rng = np.random.default_rng(0)
    kinds = np.repeat(np.arange(4), 10)
    signatures = np.eye(4)[kinds] + rng.uniform(0, 0.1, (40, 4))
    signatures /= np.linalg.norm(signatures, axis=1, keepdims=True)
    labels = balanced_kmeans(signatures, 4).labels
    assert len(set(zip(kinds.tolist(), labels.tolist(), strict=True))) == 4


def test_one_seed_one_result() -> None:
    signatures = unit(np.random.default_rng(0), 200, 16, kinds=20)
    first, second = (balanced_kmeans(signatures, 8, seed=3) for _ in range(2))
    assert np.array_equal(first.labels, second.labels)
    assert np.array_equal(first.centroids, second.centroids)
    others = [balanced_kmeans(signatures, 8, seed=seed).labels for seed in range(4, 8)]
    assert not all(np.array_equal(first.labels, other) for other in others)


def test_beyond_the_sample_every_signature_is_clustered() -> None:
    points = SAMPLE_POINTS + 500
    signatures = unit(np.random.default_rng(0), points, 8)
    zones = balanced_kmeans(signatures, 5)
    assert zones.sizes.sum() == points
    assert zones.sizes.max() <= -(-points // 5)
    assert zones.mean_distance == pytest.approx(mean_distance(signatures, zones.labels, 5), abs=1e-5)


def test_refuses_what_cannot_be_clustered() -> None:
    signatures = unit(np.random.default_rng(0), 5, 4)
    with pytest.raises(ZonesError, match="5 calibration requests are too few for 6 zones"):
        balanced_kmeans(signatures, 6)
    with pytest.raises(ZonesError, match="at least one"):
        balanced_kmeans(signatures, 0)
    with pytest.raises(ZonesError, match="NaN"):
        balanced_kmeans(np.where(np.eye(5, 4) > 0, np.nan, signatures), 2)
    with pytest.raises(ZonesError, match="unit vectors"):
        balanced_kmeans(2 * signatures, 2)
    with pytest.raises(ZonesError, match="every signature is zero"):
        balanced_kmeans(0 * signatures, 2)
    with pytest.raises(ZonesError, match=r"\[N, D\]"):
        balanced_kmeans(signatures[0], 1)
