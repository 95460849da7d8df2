"""Signatures against the paper's formulas, written out in plain Python, and scipy's Spearman correlation."""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.distance import cosine
from scipy.stats import spearmanr

from eldr.signature import TRANSFORMS, SignatureError, SignatureModel, rho, sample_pairs
from eldr.trace import Trace
from tests.synthetic import make_trace

COUNT_TRANSFORMS = ("count_idf", "count", "sqrt_count", "binary")


@pytest.fixture(scope="module")
def trace() -> Trace:
    return make_trace(requests=30, layers=5, experts=12, seed=3)


def reference_entries(counts: NDArray[np.uint32], transform: str) -> NDArray[np.float64]:
    """[N][L][E] signature entries before the mask and the scaling."""
    requests, layers, experts = counts.shape
    used_by = [
        [sum(counts[n, layer, e] > 0 for n in range(requests)) for e in range(experts)] for layer in range(layers)
    ]
    formula: Callable[[Any, Any], float] = {
        "count_idf": lambda c, df: c * math.log((requests + 1) / (df + 1)),
        "count": lambda c, df: c,
        "sqrt_count": lambda c, df: math.sqrt(c),
        "binary": lambda c, df: 1 if c > 0 else 0,
    }[transform]
    return np.array(
        [
            [[formula(counts[n, layer, e], used_by[layer][e]) for e in range(experts)] for layer in range(layers)]
            for n in range(requests)
        ],
        dtype=np.float64,
    )


def reference_rho(entries: NDArray[np.float64], profiles: NDArray[Any]) -> float:
    pairs = list(combinations(range(len(entries)), 2))
    ours = [cosine(entries[i].ravel(), entries[j].ravel()) for i, j in pairs]
    theirs = [cosine(profiles[i].ravel(), profiles[j].ravel()) for i, j in pairs]
    return spearmanr(ours, theirs).statistic


def reference_mask(entries: NDArray[np.float64], profiles: NDArray[np.float32]) -> tuple[list[int], float]:
    """Greedy selection, every candidate from scratch."""
    chosen: list[int] = []
    best = -math.inf
    while True:
        rest = [layer for layer in range(entries.shape[1]) if layer not in chosen]
        reached = {layer: reference_rho(entries[:, sorted([*chosen, layer])], profiles) for layer in rest}
        if not reached or max(reached.values()) <= best:
            return chosen, best
        layer = max(reached, key=reached.__getitem__)
        chosen.append(layer)
        best = reached[layer]


@pytest.mark.parametrize("transform", COUNT_TRANSFORMS)
def test_signatures_follow_the_formulas(trace: Trace, transform: str) -> None:
    model = SignatureModel.fit(trace.prefill_counts, trace.decode_profiles(), transform=transform)
    signatures = model.transform(trace.prefill_counts)
    entries = reference_entries(trace.prefill_counts, transform)[:, model.layer_mask].reshape(30, -1)
    expected = entries / np.linalg.norm(entries, axis=1, keepdims=True)
    assert signatures.dtype == np.float32
    assert signatures.shape == (30, model.dimension)
    np.testing.assert_allclose(signatures, expected, atol=1e-6)


@pytest.mark.parametrize("transform", COUNT_TRANSFORMS)
def test_the_mask_is_the_greedy_one(trace: Trace, transform: str) -> None:
    profiles = trace.decode_profiles()
    model = SignatureModel.fit(trace.prefill_counts, profiles, transform=transform)
    chosen, best = reference_mask(reference_entries(trace.prefill_counts, transform), profiles)
    assert np.flatnonzero(model.layer_mask).tolist() == sorted(chosen)
    # Small counts give pairs at equal distance; rounding ranks them one way here and another way there.
    assert model.rho == pytest.approx(best, abs=2e-4)


def test_a_useless_layer_is_left_out() -> None:
    trace = make_trace(requests=30, layers=3, seed=1)
    counts = trace.prefill_counts.copy()
    rng = np.random.default_rng(0)
    for request in counts:  # layer 1 says nothing of the decode any more
        rng.shuffle(request[1])
    model = SignatureModel.fit(counts, trace.decode_profiles(), transform="count")
    assert not model.layer_mask[1]


def test_rho_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(6, 15))[rng.integers(6, size=40)]
    signatures = kinds + rng.normal(size=(40, 15))
    profiles = (kinds + rng.normal(size=(40, 15))).reshape(40, 3, 5)
    reached = rho(signatures, profiles)
    assert reached > 0.2
    assert reached == pytest.approx(reference_rho(signatures, profiles), abs=1e-12)


def test_rho_averages_tied_ranks() -> None:
    rng = np.random.default_rng(0)
    signatures = np.eye(4)[rng.integers(4, size=20)]  # distances are 0 or 1 only
    profiles = rng.integers(0, 2, (20, 1, 3)) + np.array([1.0, 0, 0])
    assert rho(signatures, profiles) == pytest.approx(reference_rho(signatures, profiles), abs=1e-12)


def test_fit_and_rho_agree_on_a_sample_of_pairs(trace: Trace) -> None:
    profiles = trace.decode_profiles()
    model = SignatureModel.fit(trace.prefill_counts, profiles, seed=5, pairs=100)
    signatures = model.transform(trace.prefill_counts)
    assert rho(signatures, profiles, seed=5, pairs=100) == pytest.approx(model.rho, abs=1e-5)
    assert rho(signatures, profiles, seed=6, pairs=100) != pytest.approx(model.rho, abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.integers(3, 60), st.integers(1, 400), st.integers(0, 5))
def test_sampled_pairs_are_distinct_and_ordered(requests: int, pairs: int, seed: int) -> None:
    first, second = sample_pairs(requests, pairs, seed)
    total = requests * (requests - 1) // 2
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == len(first) == min(pairs, total)
    assert (first >= 0).all()
    assert (first < second).all()
    assert (second < requests).all()
    again = sample_pairs(requests, pairs, seed)
    assert np.array_equal(first, again[0])
    assert np.array_equal(second, again[1])


def test_sampled_pairs_reach_the_last_of_many_requests() -> None:
    first, second = sample_pairs(20_000, 30_000, 0)
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == 30_000
    assert second.max() > 19_900
    assert (first < second).all()
    # Uniform pairs i < j: the mean of the smaller is a third of the range, of the larger two thirds.
    assert first.mean() / 20_000 == pytest.approx(1 / 3, abs=0.01)
    assert second.mean() / 20_000 == pytest.approx(2 / 3, abs=0.01)


def test_requests_without_decode_steps_count_for_the_idf_only(trace: Trace) -> None:
    profiles = trace.decode_profiles()
    silent = np.zeros((3, 5, 12), dtype=np.uint32)
    silent[:, :, 0] = 7
    counts = np.concatenate([trace.prefill_counts, silent])
    with_silent = SignatureModel.fit(counts, np.concatenate([profiles, np.zeros((3, 5, 12), dtype=np.float32)]))
    entries = reference_entries(counts, "count_idf")
    _, best = reference_mask(entries[:30], profiles)
    assert with_silent.rho == pytest.approx(best, abs=2e-4)


def test_gate_transforms_take_scores(trace: Trace) -> None:
    profiles = trace.decode_profiles()
    logits = np.log(trace.prefill_counts + 0.5).astype(np.float32)
    model = SignatureModel.fit(logits, profiles, transform="gate_logit")
    flat = logits[:, model.layer_mask].reshape(30, -1)
    np.testing.assert_allclose(model.transform(logits), flat / np.linalg.norm(flat, axis=1, keepdims=True), atol=1e-6)
    assert {name: kind.source for name, kind in TRANSFORMS.items() if kind.source != "counts"} == {
        "gate_prob": "prefill_gate_prob",
        "gate_logit": "prefill_gate_logit",
    }


def test_nothing_left_to_weigh_gives_a_zero_signature() -> None:
    model = SignatureModel("count_idf", np.array([[0, 1]], dtype=np.float32), np.array([True]), 0.5)
    assert model.transform(np.array([[3, 0]], dtype=np.uint32)).tolist() == [0, 0]
    assert model.transform(np.array([[[3, 0]], [[3, 2]]], dtype=np.uint32)).tolist() == [[0, 0], [0, 1]]


def test_transform_does_not_change_its_input(trace: Trace) -> None:
    model = SignatureModel("count", np.ones((5, 12), dtype=np.float32), np.ones(5, dtype=bool), 0.5)
    scores = trace.prefill_counts.astype(np.float32)
    before = scores.copy()
    model.transform(scores)
    assert np.array_equal(scores, before)


def test_refuses_what_cannot_be_fitted(trace: Trace) -> None:
    counts, profiles = trace.prefill_counts, trace.decode_profiles()
    with pytest.raises(SignatureError, match="unknown transform 'counts'; choose from count_idf"):
        SignatureModel.fit(counts, profiles, transform="counts")
    with pytest.raises(SignatureError, match=r"not both \[N, L, E\]"):
        SignatureModel.fit(counts, profiles[:, :4])
    with pytest.raises(SignatureError, match="2 requests with decode steps are too few"):
        SignatureModel.fit(counts[:2], profiles[:2])
    with pytest.raises(SignatureError, match="0 requests with decode steps"):
        SignatureModel.fit(counts, np.zeros_like(profiles))
    with pytest.raises(SignatureError, match="try the transform count"):
        SignatureModel.fit(counts + 1, profiles)  # every expert used by all: every IDF weight is zero
    with pytest.raises(SignatureError, match="NaN"):
        SignatureModel.fit(np.full(counts.shape, np.nan, dtype=np.float32), profiles, transform="gate_prob")
    with pytest.raises(SignatureError, match="equally far apart"):
        rho(np.ones((30, 4)), profiles)
