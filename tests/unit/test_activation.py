"""The predictor against a plain primal regression, on traffic with a structure that can be predicted."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eldr.activation import (
    LEAST,
    MOST,
    ActivationError,
    ActivationModel,
    busiest_rank_experts,
    effective_tokens,
    expected_union,
    of_a_step,
    own_frequencies,
    to_probabilities,
)
from eldr.calibration import CalibrationError, fit_calibration, load_calibration
from eldr.counts import ExpertCounts
from eldr.fileio import write_npz
from eldr.trace import Trace
from tests.synthetic import make_trace


def counts_of(trace: Trace, request: int) -> ExpertCounts:
    return ExpertCounts(trace.prefill_counts[request], int(trace.prompt_tokens[request]), trace.meta.top_k)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return make_trace(requests=120, layers=3, experts=16, top_k=2, kinds=4, seed=5, steps=30)


def fit(trace: Trace, **options: Any) -> ActivationModel:
    return ActivationModel.fit(
        trace.prefill_counts, trace.prompt_tokens, trace.decode_profiles(), trace.meta.top_k, **options
    )


def test_own_frequencies_are_shrunk_to_the_mean(trace: Trace) -> None:
    counts = counts_of(trace, 0)
    mean = np.full(48, 0.125, dtype=np.float32)
    found = own_frequencies(counts, mean, prior_tokens=10)
    expected = (counts.counts.reshape(-1) + 10 * 0.125) / (counts.prompt_tokens + 10)
    assert found == pytest.approx(expected)
    assert found.reshape(3, 16).sum(axis=1) == pytest.approx([2, 2, 2])


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.sampled_from([16, 64]))
def test_probabilities_are_in_range_and_sum_to_top_k(seed: int, top_k: int, experts: int) -> None:
    scores = np.random.default_rng(seed).normal(top_k / experts, 0.1, (3, 2 * experts)).astype(np.float32)
    found = to_probabilities(scores, 2, top_k)
    assert found.min() >= LEAST
    assert found.max() <= np.float32(MOST)
    sums = found.reshape(3, 2, experts).sum(axis=2)
    assert sums == pytest.approx(np.full((3, 2), top_k), rel=0.02)


def test_the_fit_is_diagonal_plus_ridge() -> None:
    """Against the primal form: slopes by loops, then (x'x + s I)^-1 x' residual, at full rank."""
    trace = make_trace(requests=60, layers=2, experts=6, top_k=2, kinds=3, seed=1, steps=20)
    model = fit(trace, ranks=(12,), strengths=(0.3,))
    tokens = trace.prompt_tokens.astype(float)[:, None]
    raw = trace.prefill_counts.reshape(60, -1).astype(float)
    mean = (raw / tokens).mean(axis=0)
    frequencies = (raw + 4 * mean) / (tokens + 4)
    x = frequencies - frequencies.mean(axis=0)
    profiles = trace.decode_profiles().reshape(60, -1).astype(float)
    y = profiles - profiles.mean(axis=0)
    products, squares = (x * y).sum(axis=0), (x * x).sum(axis=0)
    prior = 20 / 60 * squares.mean()
    slope = (products + prior * products.sum() / squares.sum()) / (squares + prior)
    assert model.slope == pytest.approx(slope, rel=1e-3, abs=1e-4)
    gram = x.T @ x
    strength = 0.3 * np.trace(gram) / 60
    weights = np.linalg.solve(gram + strength * np.eye(12), x.T @ (y - slope * x))
    assert model.down.T @ model.up == pytest.approx(weights, abs=2e-3)


def test_it_predicts_held_out_requests_better_than_their_own_frequencies(trace: Trace) -> None:
    train = np.arange(60)
    model = ActivationModel.fit(
        trace.prefill_counts[train], trace.prompt_tokens[train], trace.decode_profiles()[train], trace.meta.top_k
    )
    profiles = trace.decode_profiles().reshape(120, -1)
    held = [request for request in range(60, 120) if profiles[request].any()]
    mean = profiles[train].mean(axis=0)
    errors = {"fitted": 0.0, "own": 0.0, "mean": 0.0}
    for request in held:
        counts = counts_of(trace, request)
        own = own_frequencies(counts, mean)
        for name, predicted in (("fitted", model.predict(counts)), ("own", own), ("mean", mean)):
            errors[name] += float(((predicted - profiles[request]) ** 2).sum())
    assert errors["fitted"] < errors["own"] < errors["mean"]
    assert model.r2 == pytest.approx(1 - errors["fitted"] / errors["mean"], abs=0.1)


def test_the_same_seed_gives_the_same_model(trace: Trace) -> None:
    one, other = fit(trace, seed=3), fit(trace, seed=3)
    assert np.array_equal(one.down, other.down)
    assert (one.rank, one.strength, one.r2) == (other.rank, other.strength, other.r2)


def test_too_few_requests_are_refused() -> None:
    with pytest.raises(ActivationError, match="6 requests with decode steps are too few"):
        fit(make_trace(requests=6))


def test_expected_union_of_independent_steps() -> None:
    """Monte Carlo: experts drawn independently with the given probabilities."""
    rng = np.random.default_rng(0)
    profiles = rng.uniform(0, 0.5, (5, 2 * 10))
    drawn = rng.random((20_000, 5, 20)) < profiles
    assert expected_union(profiles, 2) == pytest.approx(drawn.any(axis=1).sum(axis=1).mean() / 2, rel=0.01)


def test_round_trip_in_the_calibration_file(trace: Trace, tmp_path: Path) -> None:
    calibration = fit_calibration(trace, 3)
    calibration.save(tmp_path / "c.npz")
    loaded = load_calibration(tmp_path / "c.npz").predictor
    assert calibration.predictor is not None
    assert loaded is not None
    for field in dataclasses.fields(loaded):
        assert np.array_equal(getattr(loaded, field.name), getattr(calibration.predictor, field.name)), field.name
    counts = counts_of(trace, 0)
    assert np.array_equal(loaded.predict(counts), calibration.predictor.predict(counts))


def test_a_calibration_without_predictor_stays_one(tmp_path: Path) -> None:
    calibration = fit_calibration(make_trace(requests=6), 2)
    assert calibration.predictor is None
    calibration.save(tmp_path / "c.npz")
    assert load_calibration(tmp_path / "c.npz").predictor is None


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "no up": ({"activation_up": None}, "activation_up has shape None"),
    "other rank": ({"activation_up": np.zeros((1, 48), np.float32)}, "activation_up has shape"),
    "short slope": ({"activation_slope": np.zeros(7, np.float32)}, "activation_slope has shape"),
    "NaN": ({"activation_slope": np.full(48, np.nan, np.float32)}, "activation_slope holds NaN"),
    "no down": ({"activation_down": None}, "predictor is incomplete"),
}


@pytest.mark.parametrize("case", DAMAGE, ids=list(DAMAGE))
def test_a_damaged_predictor_is_refused(trace: Trace, tmp_path: Path, case: str) -> None:
    change, message = DAMAGE[case]
    fit_calibration(trace, 3).save(tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as file:
        arrays = {**file, **change}
    write_npz(tmp_path / "c.npz", {name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(CalibrationError, match=message):
        load_calibration(tmp_path / "c.npz")


@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 4, 2), (3, 12, 3), (2, 6, 6), (4, 8, 1)]))
def test_the_busiest_rank_is_the_one_with_most_active_experts(seed: int, geometry: tuple[int, int, int]) -> None:
    layers, experts, ranks = geometry
    active = np.random.default_rng(seed).random((5, layers, experts)) < 0.4
    share = experts // ranks
    expected = [
        sum(max(sum(layer[rank * share : (rank + 1) * share]) for rank in range(ranks)) for layer in step)
        for step in active.tolist()
    ]
    assert busiest_rank_experts(active.reshape(5, -1), layers, ranks).tolist() == expected


def test_a_step_of_several_tokens_activates_what_any_of_them_does() -> None:
    """Against the frequency in drawn steps of three independent tokens."""
    rng = np.random.default_rng(2)
    token = np.array([0.02, 0.2, 0.5, 0.9], dtype=np.float32)
    drawn = (rng.random((200_000, 3, 4)) < token).any(axis=1).mean(axis=0)
    assert of_a_step(token, 3.0) == pytest.approx(drawn, abs=0.005)
    assert of_a_step(token, 1.0) is token


def test_effective_tokens_of_independent_and_of_equal_neighbours() -> None:
    rng = np.random.default_rng(3)
    layers, experts, top_k, rows = 4, 16, 2, 4000
    independent = rng.random((rows, layers, experts)).argsort(axis=2)[..., :top_k].astype(np.uint8)
    pairs = np.repeat(independent[: rows // 2], 2, axis=0)
    offsets = np.array([0, rows], dtype=np.int64)
    profile = np.full((1, layers, experts), top_k / experts, dtype=np.float32)
    # Two of 16 experts without replacement: 2 - 2 * 2 / 16 = 1.75 distinct ones a pair of draws and expert.
    assert effective_tokens(independent, offsets, profile, 2) == pytest.approx(2, abs=0.05)
    assert effective_tokens(pairs, offsets, profile, 2) == pytest.approx(1, abs=0.02)
    assert np.isnan(effective_tokens(independent[:9], np.array([0, 9]), profile, 2))
