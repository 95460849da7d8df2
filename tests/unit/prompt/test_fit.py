"""Prompt models: against a dense regression with an intercept, a search by brute force, and a truth that is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eldr.activation import ActivationError
from eldr.kernels import WORD_BUCKETS
from eldr.prompt.fit import FOLDS, Choice, choose, fit_prompt_model, word_weights
from eldr.prompt.model import PromptModel
from eldr.prompt.words import Words, words_of_text

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
LAYERS, EXPERTS, TOP_K = 2, 8, 2


def make_words(counts: dict[int, int]) -> Words:
    return Words(np.array(list(counts), np.uint16), np.array(list(counts.values()), np.uint16))


def draw_prompts(rng: np.random.Generator, requests: int, kinds: int = 3, vocabulary: int = 40) -> list[Words]:
    """Prompts whose words tell their kind: request i is of kind i % kinds."""
    prompts = []
    for request in range(requests):
        own = 1000 * (request % kinds + 1) + rng.integers(0, vocabulary, 12)
        common = rng.integers(0, vocabulary, 12)
        found: dict[int, int] = {}
        for word in (*own.tolist(), *common.tolist()):
            found[word] = found.get(word, 0) + 1
        prompts.append(make_words(found))
    return prompts


def draw_profiles(rng: np.random.Generator, requests: int, kinds: int = 3, noise: float = 0.05) -> Floats:
    """Profiles that their kind decides, with layers that sum to TOP_K."""
    of_kind = rng.dirichlet(np.full(EXPERTS, 0.5), (kinds, LAYERS)) * TOP_K
    found = np.array([of_kind[request % kinds] for request in range(requests)])
    found += rng.normal(0, noise, found.shape)
    found = np.clip(found, 0.01, 0.99)
    found *= TOP_K / found.sum(axis=2, keepdims=True)
    return found.reshape(requests, -1).astype(np.float32)


def dense(prompts: Sequence[Words], idf: bool, of: Sequence[Words] | None = None) -> Doubles:
    """The features of prompts as a plain matrix: sqrt(count), by rarity among `of`, each row of length one."""
    known = prompts if of is None else of
    seen = np.zeros(WORD_BUCKETS)
    for words in known:
        seen[words.buckets] += 1
    weight = np.log((1 + len(known)) / (1 + seen)) + 1 if idf else np.ones(WORD_BUCKETS)
    weight = np.where(seen > 0, weight, 0)
    rows = np.zeros((len(prompts), WORD_BUCKETS))
    for row, words in zip(rows, prompts, strict=True):
        row[words.buckets] = np.sqrt(words.counts) * weight[words.buckets]
        if row.any():
            row /= np.linalg.norm(row)
    return rows


def regress(x: Doubles, y: Doubles, strength: float, rank: int) -> tuple[Doubles, Doubles, Doubles]:
    """Reduced-rank ridge regression with an intercept by its definition: coefficients, and the two means."""
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    used = np.flatnonzero(x.any(axis=0))
    centred, target = (x - x_mean)[:, used], y - y_mean
    # The strength is relative to the mean eigenvalue of the products.
    penalty = strength * np.linalg.eigvalsh(centred @ centred.T).clip(0).mean()
    solved = np.linalg.solve(centred.T @ centred + penalty * np.eye(len(used)), centred.T @ target)
    axes = np.linalg.svd(centred @ solved, full_matrices=False)[2][:rank]
    coefficients = np.zeros((x.shape[1], y.shape[1]))
    coefficients[used] = solved @ axes.T @ axes
    return coefficients, x_mean, y_mean


def raw_scores(model: PromptModel, prompts: Sequence[Words]) -> Doubles:
    """What a model predicts before scores become probabilities."""
    found = []
    for words in prompts:
        latent = model.words.latent(words)
        assert latent is not None
        found.append(model.profiles.mean + latent @ model.profiles.up)
    return np.array(found, dtype=np.float64)


@pytest.mark.parametrize("idf", [False, True])
@pytest.mark.parametrize(("rank", "strength"), [(32, 0.01), (32, 1.0), (2, 0.03), (1, 0.3)])
def test_a_model_is_the_dense_regression(rank: int, strength: float, idf: bool) -> None:
    rng = np.random.default_rng(7)
    prompts, profiles = draw_prompts(rng, 60), draw_profiles(rng, 60)
    new = draw_prompts(rng, 12)
    model = fit_prompt_model(prompts, profiles, LAYERS, TOP_K, choice=Choice(strength, idf, rank, 0.5))
    coefficients, x_mean, y_mean = regress(dense(prompts, idf), profiles.astype(np.float64), strength, rank)
    assert np.allclose(model.profiles.mean, y_mean, atol=1e-6)
    for asked in (prompts, new):
        expected = y_mean + (dense(asked, idf, of=prompts) - x_mean) @ coefficients
        # The table has 127 steps each way per column, so a score is off by less than this share of its spread.
        spread = np.abs(expected - y_mean).max()
        assert np.abs(raw_scores(model, asked) - expected).max() < 0.04 * spread
    assert (model.strength, model.idf, model.requests) == (strength, idf, 60)


def held_out_r2(prompts: Sequence[Words], profiles: Floats, strength: float, rank: int, idf: bool, seed: int) -> float:
    """The cross-validated r2 by fitting each fold."""
    fold = np.random.default_rng(seed).permutation(len(prompts)) % FOLDS
    x, y = dense(prompts, idf), profiles.astype(np.float64)
    error = spread = 0.0
    for held in range(FOLDS):
        train = fold != held
        coefficients, x_mean, y_mean = regress(x[train], y[train], strength, rank)
        # A model of the others knows their words alone, and a prompt with none of them is predicted the mean.
        known = np.where(x[train].any(axis=0), x[~train], 0)
        lengths = np.linalg.norm(known, axis=1, keepdims=True)
        asked = np.where(lengths > 0, known / np.where(lengths > 0, lengths, 1), x_mean)
        predicted = y_mean + (asked - x_mean) @ coefficients
        error += float(((predicted - y[~train]) ** 2).sum())
        spread += float(((y_mean - y[~train]) ** 2).sum())
    return 1 - error / spread


def test_the_choice_is_that_of_brute_force() -> None:
    rng = np.random.default_rng(3)
    prompts, profiles = draw_prompts(rng, 30, vocabulary=100), draw_profiles(rng, 32, noise=0.1)
    prompts += [make_words({60000 + number: 1 + number}) for number in range(2)]  # nobody else has their words
    ranks, strengths = (1, 2, 8), (0.03, 0.3, 3.0)
    found = choose(prompts, profiles, seed=5, ranks=ranks, strengths=strengths)
    by_hand = {
        (strength, rank, idf): held_out_r2(prompts, profiles, strength, rank, idf, 5)
        for strength in strengths
        for rank in ranks
        for idf in (False, True)
    }
    best = max(by_hand.values())
    assert found.r2 == pytest.approx(by_hand[found.strength, found.rank, found.idf], abs=1e-4)
    assert found.r2 == pytest.approx(best, abs=1e-4)
    assert found.r2 > 0.3, "the kinds are told apart"


def test_kinds_that_words_tell_are_predicted() -> None:
    rng = np.random.default_rng(4)
    of_kind = np.random.default_rng(9)
    prompts, profiles = draw_prompts(rng, 120), draw_profiles(of_kind, 120, noise=0.02)
    model = fit_prompt_model(prompts, profiles, LAYERS, TOP_K)
    assert model.r2 > 0.9
    means = [profiles[kind::3].mean(axis=0) for kind in range(3)]
    for number, words in enumerate(draw_prompts(rng, 9)):
        predicted = model.predict(words)
        distances = [float(np.abs(predicted - mean).sum()) for mean in means]
        assert int(np.argmin(distances)) == number % 3
        assert np.allclose(predicted.reshape(LAYERS, EXPERTS).sum(axis=1), TOP_K, atol=0.05)


def test_profiles_that_have_nothing_to_do_with_the_words_explain_nothing() -> None:
    rng = np.random.default_rng(2)
    for seed in range(5):
        prompts, profiles = draw_prompts(rng, 64), draw_profiles(rng, 64)
        found = choose(prompts, rng.permutation(profiles), seed=seed)
        assert found.r2 < 0.02


def test_too_few_requests_are_refused() -> None:
    rng = np.random.default_rng(0)
    prompts, profiles = draw_prompts(rng, 8), draw_profiles(rng, 8)
    with pytest.raises(ActivationError, match="7 prompts"):
        fit_prompt_model(prompts[:7], profiles[:7], LAYERS, TOP_K)
    assert fit_prompt_model(prompts, profiles, LAYERS, TOP_K).requests == 8


def test_the_same_input_gives_the_same_model() -> None:
    rng = np.random.default_rng(0)
    prompts, profiles = draw_prompts(rng, 40), draw_profiles(rng, 40)
    one, other = (fit_prompt_model(prompts, profiles, LAYERS, TOP_K, seed=3) for _ in range(2))
    assert (one.strength, one.idf, one.r2) == (other.strength, other.idf, other.r2)
    for name in ("weight", "table", "scale", "offset"):
        assert np.array_equal(getattr(one.words, name), getattr(other.words, name))
    assert np.array_equal(one.profiles.up, other.profiles.up)


def assert_sound(model: PromptModel, prompts: Sequence[Words]) -> None:
    for array in (*[getattr(model.words, name) for name in ("weight", "table", "scale", "offset")], model.profiles.up):
        assert np.isfinite(array).all()
    assert np.isfinite([model.r2, model.strength]).all()
    for words in prompts:
        predicted = model.predict(words)
        assert np.isfinite(predicted).all()
        assert (predicted > 0).all()
        assert (predicted < 1).all()


def test_identical_prompts_predict_the_mean() -> None:
    profiles = draw_profiles(np.random.default_rng(0), 20)
    prompts = [make_words({5: 2, 9: 1})] * 20
    model = fit_prompt_model(prompts, profiles, LAYERS, TOP_K)
    assert_sound(model, prompts)
    assert np.allclose(model.predict(prompts[0]), profiles.mean(axis=0), atol=0.01)


def test_identical_profiles_predict_themselves() -> None:
    prompts = draw_prompts(np.random.default_rng(0), 20)
    profiles = np.repeat(draw_profiles(np.random.default_rng(0), 1), 20, axis=0)
    model = fit_prompt_model(prompts, profiles, LAYERS, TOP_K)
    assert_sound(model, prompts)
    assert model.r2 == pytest.approx(0, abs=1e-6)
    assert np.allclose(model.predict(prompts[3]), profiles[0], atol=0.01)


def test_prompts_without_words_say_nothing() -> None:
    """They are as if they were not there, and are predicted the mean."""
    rng = np.random.default_rng(6)
    prompts, profiles = draw_prompts(rng, 40), draw_profiles(rng, 40)
    nothing = words_of_text(b" ")
    assert not len(nothing)
    mixed, of_mixed = list(prompts), profiles
    for at in (0, 17, 40):
        mixed.insert(at, nothing)
        of_mixed = np.insert(of_mixed, at, draw_profiles(rng, 1), axis=0)
    model, expected = (fit_prompt_model(*each, LAYERS, TOP_K) for each in ((mixed, of_mixed), (prompts, profiles)))
    assert_sound(model, mixed)
    assert (model.r2, model.requests) == (expected.r2, 40)
    assert np.array_equal(model.predict(prompts[1]), expected.predict(prompts[1]))
    assert np.allclose(model.predict(nothing), profiles.mean(axis=0), atol=0.01)
    with pytest.raises(ActivationError, match="0 prompts"):
        fit_prompt_model([nothing] * 40, profiles, LAYERS, TOP_K)


def test_words_that_no_prompt_had_are_predicted_the_mean() -> None:
    rng = np.random.default_rng(6)
    prompts, profiles = draw_prompts(rng, 40), draw_profiles(rng, 40)
    model = fit_prompt_model(prompts, profiles, LAYERS, TOP_K)
    assert model.words.latent(make_words({60000: 3})) is None
    assert np.allclose(model.predict(make_words({60000: 3})), profiles.mean(axis=0), atol=0.01)
    known = word_weights(prompts, idf=True)
    assert known[60000] == 0
    assert (known[prompts[0].buckets] >= 1).all()


rows = st.lists(
    st.dictionaries(st.integers(0, 40) | st.integers(0, 65535), st.integers(1, 65535), max_size=6),
    min_size=8,
    max_size=14,
)


@settings(max_examples=25, deadline=None)
@given(rows, st.integers(0, 5), st.sampled_from((0.0, 1e-6, 0.5, 1.0)))
def test_whatever_the_words_are_a_model_has_only_numbers(found: list[dict[int, int]], seed: int, spread: float) -> None:
    prompts = [make_words(counts) for counts in found]
    profiles = np.random.default_rng(seed).random((len(prompts), LAYERS * EXPERTS)).astype(np.float32) * np.float32(
        spread
    )
    try:
        model = fit_prompt_model(prompts, profiles, LAYERS, TOP_K, seed=seed)
    except ActivationError:
        assert sum(len(words) > 0 for words in prompts) < 2 * FOLDS
        return
    assert_sound(model, prompts)
