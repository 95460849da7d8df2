"""What is measured of a trace, against brute force on small ones."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from eldr.synthetic import measure
from eldr.synthetic.statistics import (
    lag_overlap,
    layers_together,
    nearest_overlap,
    own_overlap,
    profiles_of,
    rows_of,
    spectrum,
    union_of_steps,
)
from eldr.trace import Trace
from tests.synthetic import make_trace


@pytest.fixture
def trace() -> Trace:
    return make_trace(requests=30, layers=2, experts=8, top_k=2, steps=40)


def every(trace: Trace) -> NDArray[np.int64]:
    return np.arange(trace.requests)


def shared(left: NDArray[Any], right: NDArray[Any]) -> float:
    """The share of experts that two steps share, mean over layers."""
    return float(np.mean([len(set(a.tolist()) & set(b.tolist())) / len(a) for a, b in zip(left, right, strict=True)]))


def test_overlaps_of_steps(trace: Trace) -> None:
    found = {one.name: one.value for one in measure(trace)}
    decoded = [rows_of(trace, one) for one in range(trace.requests)]
    decoded = [rows for rows in decoded if len(rows) >= 2]
    for lag in (1, 4):
        pairs = [shared(rows[at], rows[at + lag]) for rows in decoded for at in range(len(rows) - lag)]
        assert lag_overlap(trace, every(trace), lag) == pytest.approx(np.mean(pairs))
        assert found[f"overlap lag {lag}"] == pytest.approx(np.mean(pairs))
    of_pairs = [np.mean([shared(a, b) for a in left for b in right]) for left, right in combinations(decoded, 2)]
    assert found["overlap random"] == pytest.approx(np.mean(of_pairs), rel=1e-5)
    own = [np.mean([shared(a, b) for a in rows[: len(rows) // 2] for b in rows[len(rows) // 2 :]]) for rows in decoded]
    assert found["overlap own"] == pytest.approx(np.mean(own), rel=1e-5)


def test_the_spectrum_sums_to_what_distinguishes_requests(trace: Trace) -> None:
    profiles = profiles_of(trace, every(trace))
    n = len(profiles.first)
    products = np.einsum("nle,mle->nm", profiles.first, profiles.second) / (2 * 2)
    beyond = products.trace() / n - products.mean()
    assert spectrum(profiles, 2).sum() == pytest.approx(beyond, rel=1e-4)
    assert own_overlap(profiles.first, profiles.second, 2) == pytest.approx(products.trace() / n, rel=1e-5)


def test_similar_requests_are_found(trace: Trace) -> None:
    """Requests of one kind have favourite experts in common."""
    found = {one.name: one.value for one in measure(trace)}
    assert found["overlap random"] < found["overlap kind"] < found["overlap own"] + 0.02
    profiles = profiles_of(trace, every(trace))
    assert nearest_overlap(profiles, 2) > found["overlap random"] + 0.5 * (
        found["overlap kind"] - found["overlap random"]
    )
    assert found["union alike 7"] < found["union random 7"]


def test_distinct_experts_of_successive_steps() -> None:
    """Of a request that chooses 0, 1 and then 2, 3, and so on by turns."""
    trace = make_trace(requests=8, layers=1, experts=8, top_k=2, steps=9)
    turns = np.arange(len(trace.decode_experts))[:, None, None] % 3 * 2 + np.arange(2)
    trace.decode_experts[:] = turns
    rng = np.random.default_rng(0)
    assert [union_of_steps(trace, every(trace), steps, rng) for steps in (1, 2, 4)] == [2, 4, 6]


def test_layers_that_vary_together() -> None:
    trace = make_trace(requests=12, layers=4, experts=8, top_k=2, steps=200, kinds=1)
    alone = layers_together(trace, every(trace), np.random.default_rng(0))
    assert alone == pytest.approx(1, abs=0.2)
    trace.decode_experts[:] = trace.decode_experts[:, :1]
    together = layers_together(trace, every(trace), np.random.default_rng(0))
    assert together == pytest.approx(4, rel=1e-6)
