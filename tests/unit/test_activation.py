"""The predictor against a plain primal regression, on traffic with a structure that can be predicted."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eldr.activation import (
    LEAST,
    MOST,
    TRUST,
    ActivationError,
    ActivationModel,
    effective_tokens,
    expected_union,
    of_a_step,
    overlap_gain,
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


@pytest.fixture(scope="module")
def model(trace: Trace) -> ActivationModel:
    return fit(trace)


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
    errors = {"fitted": 0.0, "half": 0.0, "own": 0.0, "mean": 0.0}
    for request in held:
        own = own_frequencies(counts_of(trace, request), model.mean_frequency)
        for name, predicted in (
            ("fitted", model.predict(own, model.mean_frequency, 1.0)),
            ("half", model.predict(own, model.mean_frequency, 0.5)),
            ("own", own),
            ("mean", mean),
        ):
            errors[name] += float(((predicted - profiles[request]) ** 2).sum())
    assert errors["fitted"] < errors["half"] < errors["own"] < errors["mean"]
    assert model.r2 == pytest.approx(1 - errors["fitted"] / errors["mean"], abs=0.1)


@given(st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_a_prediction_is_the_one_of_its_definition(
    trace: Trace, model: ActivationModel, share: float, seed: int
) -> None:
    """Own frequencies, shifted from prompts to decode steps, plus a share of what the map says beyond them."""
    rng = np.random.default_rng(seed)
    fleet = rng.dirichlet(np.ones(16), 3).reshape(-1).astype(np.float32) * 2
    own = own_frequencies(counts_of(trace, int(rng.integers(120))), fleet)
    x = (own - fleet).astype(float)
    map_alone = [
        fleet[i]
        + model.mean_profile[i]
        - model.mean_frequency[i]
        + model.slope[i] * x[i]
        + sum(model.up[r, i] * float(model.down[r].astype(float) @ x) for r in range(model.rank))
        for i in range(48)
    ]
    middle = fleet + model.mean_profile - model.mean_frequency
    shifted = own + model.mean_profile - model.mean_frequency
    scores = middle + model.gain * ((1 - share) * shifted + share * np.array(map_alone) - middle)
    expected = to_probabilities(scores.astype(np.float32), 3, 2)
    assert model.predict(own, fleet, share) == pytest.approx(expected, abs=2e-5)


def test_a_fleet_with_a_larger_spread_gets_less_of_the_correction() -> None:
    """Against the regression that such a fleet would fit: prompts are decode profiles with noise of one size.

    The variance of what requests have in common with their prompts grows by 6, the noise stays. The best slope goes
    from 1 / (1 + 1) to 6 / (6 + 1).
    """
    rng = np.random.default_rng(8)
    true, noise = rng.normal(size=(4000, 48)) * 0.02, rng.normal(size=(4000, 48)) * 0.02
    base = np.full(48, 0.125)
    narrow, wide = true + base, true * 6**0.5 + base
    model = ActivationModel.fit_lessons(
        (narrow + noise).astype(np.float32), narrow.astype(np.float32), 3, 2, ranks=(0,), strengths=(1.0,)
    )
    model = dataclasses.replace(model, trust=1.0)
    assert model.slope.mean() == pytest.approx(1 / 2, abs=0.02)
    x = wide + noise - (wide + noise).mean(axis=0)
    y = wide - wide.mean(axis=0)
    best = float((x * y).sum() / (x * x).sum())
    share = model.share(float((x * x).sum(axis=1).mean()))
    assert 1 - share + share * float(model.slope.mean()) == pytest.approx(best, abs=0.02)
    assert model.share(0.5 * model.spread) == model.share(model.spread) == 1.0


def test_the_gain_is_the_one_of_all_pairs() -> None:
    """Against a loop over pairs, and against the factor by which predictions were shrunk."""
    rng = np.random.default_rng(4)
    recorded = rng.uniform(0, 0.3, (9, 12)).astype(np.float32)
    predicted = (0.8 * recorded + rng.uniform(0, 0.02, (9, 12))).astype(np.float32)
    p, r = (profiles.astype(float) - profiles.astype(float).mean(axis=0) for profiles in (predicted, recorded))
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    products = sum((p[i] @ p[j]) * (r[i] @ r[j]) for i, j in pairs)
    squares = sum((p[i] @ p[j]) ** 2 for i, j in pairs)
    assert overlap_gain(predicted, recorded) == pytest.approx((products / squares) ** 0.5, rel=1e-4)
    for shrunk, gain in ((0.8, 1.25), (1.0, 1.0), (1.1, 1 / 1.1), (0.1, 2**0.5), (3.0, 2**-0.5), (0.0, 1.0)):
        assert overlap_gain(recorded * np.float32(shrunk), recorded) == pytest.approx(gain, rel=1e-4)


def test_the_gain_makes_up_for_shrunk_overlaps() -> None:
    """Profiles of a few topics, prompts with noise in each expert: regression of each shrinks, their sum is clear."""
    rng = np.random.default_rng(5)
    topics = rng.normal(size=(3, 96)) * 0.03
    mixed = rng.normal(size=(600, 3)) @ topics + 0.1
    noisy = (mixed + rng.normal(size=mixed.shape) * 0.06).astype(np.float32)
    model = ActivationModel.fit_lessons(noisy, mixed.astype(np.float32), 6, 2, ranks=(0,), strengths=(1.0,))
    slope = float(model.slope.mean())
    assert slope < 0.6
    # Overlaps keep slope^2 of the signal, and little of the noise: 96 experts are averaged.
    assert model.gain == pytest.approx(min(1 / slope, 2**0.5), abs=0.1)


def test_lessons_move_the_trust(trace: Trace, model: ActivationModel) -> None:
    """Lessons that follow the map raise it towards 1, lessons that follow own frequencies lower it towards 0."""
    assert model.trust == TRUST
    flat = trace.prefill_counts.reshape(120, -1).astype(np.float32)
    own = ((flat + 4 * model.mean_frequency) / (trace.prompt_tokens[:, None] + 4)).astype(np.float32)
    x = own - own.mean(axis=0)
    by_map = model.slope * x + x @ model.down.T @ model.up

    def trust(share: float) -> float:
        return model.judged(own, (share * by_map + (1 - share) * x).astype(np.float32)).trust

    # Each share with the weight of 120 lessons, and TRUST with that of 20.
    assert [trust(share) for share in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(
        [10 / 140, 40 / 140, 0.5, 130 / 140], abs=1e-3
    )
    assert (trust(3.0), trust(-1.0)) == (1.0, 0.0)


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
    frequency = own_frequencies(counts_of(trace, 0), loaded.mean_frequency)
    predicted = [model.predict(frequency, frequency * 0 + 0.1, 0.3) for model in (loaded, calibration.predictor)]
    assert np.array_equal(predicted[0], predicted[1])


def test_a_calibration_without_predictor_stays_one(tmp_path: Path) -> None:
    calibration = fit_calibration(make_trace(requests=6), 2)
    assert calibration.predictor is None
    calibration.save(tmp_path / "c.npz")
    assert load_calibration(tmp_path / "c.npz").predictor is None


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "no up": ({"activation_up": None}, "predictor is incomplete"),
    "other rank": ({"activation_up": np.zeros((1, 48), np.float32)}, "activation_up has shape"),
    "short slope": ({"activation_slope": np.zeros(7, np.float32)}, "activation_slope has shape"),
    "NaN": ({"activation_slope": np.full(48, np.nan, np.float32)}, "activation_slope holds NaN"),
    "trust": ({"trust": 1.5}, "predictor's trust is 1.5"),
    "spread": ({"spread": "wide"}, "predictor's spread is 'wide'"),
    "gain": ({"gain": 3.0}, "predictor's gain is 3.0"),
    "no down": ({"activation_down": None}, "predictor is incomplete"),
}


@pytest.mark.parametrize("case", DAMAGE, ids=list(DAMAGE))
def test_a_damaged_predictor_is_refused(trace: Trace, tmp_path: Path, case: str) -> None:
    change, message = DAMAGE[case]
    fit_calibration(trace, 3).save(tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as file:
        arrays = {**file}
    if set(change) <= {"trust", "spread", "gain"}:
        meta = json.loads(str(arrays["meta"]))
        meta["activation"] |= change
        change = {"meta": np.array(json.dumps(meta))}
    arrays |= change
    write_npz(tmp_path / "c.npz", {name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(CalibrationError, match=message):
        load_calibration(tmp_path / "c.npz")


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
