"""What is learned about counts: from traffic whose rule is known, and what no report may talk it into."""

from __future__ import annotations

import functools
import pickle
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from eldr.activation import PRIOR_TOKENS, TRUST, TRUST_LESSONS, ActivationModel, deserved_trust
from eldr.counts import ExpertCounts
from eldr.learning.learner import FIRST, Learner, LearnTask
from eldr.learning.lessons import Asked, share_codes
from eldr.learning.of_counts import LEAST_AGREEMENT, CountsTask, agreement
from eldr.prompt.words import words_of_text

LAYERS, EXPERTS, TOP_K, TOKENS, ROWS = 2, 12, 3, 400, 300
D = LAYERS * EXPERTS
SHIFT = np.roll(np.eye(EXPERTS), 1, axis=1)


def draw(shares: NDArray[np.float64], rows: int, rng: np.random.Generator) -> ExpertCounts:
    """Rows that each choose TOP_K experts of a layer, which are drawn in proportion to their share of it."""
    counts = np.zeros((LAYERS, EXPERTS), np.uint32)
    for layer, wanted in zip(counts, shares, strict=True):
        for _ in range(rows):
            layer[np.argsort(-(np.log(wanted) + rng.gumbel(size=EXPERTS)))[:TOP_K]] += 1
    return ExpertCounts(counts, rows, TOP_K)


@functools.cache
def lesson(request: int, turned: float) -> tuple[ExpertCounts, ExpertCounts]:
    """The counts of a prompt and of its decode. Of the decode, this share goes by another rule than the prompt's."""
    rng = np.random.default_rng(request)
    preferred = np.exp(rng.normal(0, 1, (LAYERS, EXPERTS)))
    return draw(preferred, TOKENS, rng), draw((1 - turned) * preferred + turned * preferred @ SHIFT, ROWS, rng)


def task(turned: float, requests: int = 100, fitted: ActivationModel | None = None, first: int = 0) -> CountsTask:
    prompts, decodes = zip(*(lesson(first + request, turned) for request in range(requests)), strict=True)
    return CountsTask(
        np.full(requests, TOKENS),
        np.stack([share_codes(counts) for counts in prompts]),
        np.stack([share_codes(counts) for counts in decodes]),
        LAYERS,
        TOP_K,
        None,
        fitted,
        0,
    )


def learned(of: CountsTask) -> ActivationModel:
    _, model = of.run()
    assert model is not None
    return model


def error(model: ActivationModel | None, turned: float) -> float:
    """The mean squared error of predictions for requests that nobody has learned from."""
    found = []
    for request in range(500, 540):
        prompt, decode = lesson(request, turned)
        frequency = (prompt.counts.reshape(-1) / TOKENS).astype(np.float32)
        mean = np.full(D, TOP_K / EXPERTS, np.float32)
        predicted = frequency if model is None else model.predict(frequency, mean, model.trust)
        found.append(float(((predicted - decode.counts.reshape(-1) / ROWS) ** 2).mean()))
    return float(np.mean(found))


def test_a_rule_is_learned_and_trusted_where_decodes_differ_from_prompts() -> None:
    model = learned(task(turned=0.5))
    assert model.trust > 0.75
    assert error(model, 0.5) < 0.6 * error(None, 0.5)


def test_little_is_corrected_where_prompts_say_it_all() -> None:
    model = learned(task(turned=0.0))
    assert error(model, 0.0) < 1.15 * error(None, 0.0)


def test_the_trust_is_what_least_squares_give() -> None:
    rng = np.random.default_rng(1)
    x, corrections = rng.normal(size=(2, 60, D)).astype(np.float32)
    y = (x + 0.8 * corrections + rng.normal(0, 0.5, (60, D))).astype(np.float32)
    best = minimize_scalar(
        lambda share: float(((x + share * corrections - y) ** 2).sum()), bounds=(0, 1), method="bounded"
    )
    expected = (60 * best.x + TRUST_LESSONS * TRUST) / (60 + TRUST_LESSONS)
    assert deserved_trust(x, corrections, y) == pytest.approx(expected, abs=1e-3)
    assert deserved_trust(x, np.zeros_like(x), y) == TRUST


def test_a_fitted_model_that_is_right_stays_with_the_trust_that_it_deserves() -> None:
    fitted = replace(learned(task(turned=0.5, requests=300)), trust=0.1)
    model = learned(task(turned=0.5, requests=30, fitted=fitted, first=1000))
    assert np.array_equal(model.up, fitted.up)
    assert model.trust > 0.5


def test_a_fitted_model_of_other_traffic_gives_way() -> None:
    fitted = learned(task(turned=0.0, requests=300))
    model = learned(task(turned=0.6, requests=200, fitted=fitted, first=1000))
    assert not np.array_equal(model.slope, fitted.slope)
    assert error(model, 0.6) < error(replace(fitted, trust=1.0), 0.6)


def test_reports_that_contradict_the_prompts_are_not_believed() -> None:
    honest = task(turned=0.2)
    for profiles in (
        np.random.default_rng(0).permutation(honest.profiles),
        np.broadcast_to(honest.profiles[0], honest.profiles.shape),
        np.zeros_like(honest.profiles),
    ):
        assert replace(honest, profiles=np.ascontiguousarray(profiles)).run() == (None, None)
    assert honest.run()[1] is not None


def test_agreement_is_a_correlation() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.random((2, 9, D)).astype(np.float32)
    centred_x, centred_y = x - x.mean(axis=0), y - y.mean(axis=0)
    expected = np.corrcoef(centred_x.reshape(-1), centred_y.reshape(-1))[0, 1]
    assert agreement(x, y) == pytest.approx(expected, abs=1e-5)
    assert agreement(x, x) == pytest.approx(1, abs=1e-5)
    assert agreement(x, np.ones_like(x)) == 0
    assert 0 < LEAST_AGREEMENT < 0.5


def test_own_frequencies_are_shrunk_as_a_policy_shrinks_them() -> None:
    """With few prompt tokens, the mean weighs as much as PRIOR_TOKENS of them."""
    codes = np.array([[255, 0], [0, 255]], np.uint8)
    of = CountsTask(np.array([4, 12]), codes, codes, 1, 1, None, None, 0)
    weight = [4 / (4 + PRIOR_TOKENS), 12 / (12 + PRIOR_TOKENS)]
    expected = [
        [weight[0] + (1 - weight[0]) / 2, (1 - weight[0]) / 2],
        [(1 - weight[1]) / 2, weight[1] + (1 - weight[1]) / 2],
    ]
    assert of.own_frequencies() == pytest.approx(np.array(expected), abs=1e-6)


def test_a_task_and_its_result_survive_the_way_to_another_process() -> None:
    of = task(turned=0.3, requests=40, fitted=learned(task(turned=0.3, requests=30)))
    model = learned(of)
    found = pickle.loads(pickle.dumps(model))
    for name in ("mean_frequency", "mean_profile", "slope", "down", "up"):
        assert np.array_equal(getattr(found, name), getattr(model, name))
    assert (found.trust, found.gain, found.layers, found.top_k) == (model.trust, model.gain, LAYERS, TOP_K)
    again = learned(pickle.loads(pickle.dumps(of)))
    assert np.array_equal(again.up, model.up)


# By a learner.


def fill(learner: Learner, requests: int, first: int = 0) -> None:
    for request in range(first, first + requests):
        prompt, decode = lesson(request, 0.3)
        assert learner.take(Asked(None, TOKENS, share_codes(prompt)), decode)


def due(learner: Learner) -> LearnTask:
    found = learner.task()
    assert found is not None
    return found


def test_a_learner_takes_counts_without_words() -> None:
    learner = Learner()
    fill(learner, FIRST)
    found = due(learner)
    assert found.of_words is None
    told = learner.taught(found.run())
    assert told is not None
    assert told.activation is learner.activation is not None
    assert (told.profiles, told.words) == (None, None)


def test_a_lesson_teaches_each_model_what_it_has() -> None:
    learner = Learner()
    prompt, decode = lesson(0, 0.3)
    for _ in range(FIRST):
        assert learner.take(Asked(words_of_text(b"some words")), decode)
    assert due(learner).of_counts is None
    fill(learner, FIRST - 1)
    assert learner.take(Asked(words_of_text(b"other words"), TOKENS, share_codes(prompt)), decode)
    found = due(learner)
    assert found.of_words is not None
    assert found.of_counts is not None
    assert len(found.of_words.words) == FIRST + 1
    assert len(found.of_counts.profiles) == FIRST


def test_what_a_policy_does_not_use_is_not_learned() -> None:
    prompt, decode = lesson(0, 0.3)
    assert not Learner(counts=False).take(Asked(None, TOKENS, share_codes(prompt)), decode)
    assert not Learner(words=False).take(Asked(words_of_text(b"some words")), decode)


def test_reports_that_turn_into_lies_take_back_what_was_learned() -> None:
    learner = Learner()
    fill(learner, 60)
    assert learner.taught(due(learner).run()) is not None
    order = np.random.default_rng(0).permutation(2000)
    for request in range(1100):
        prompt, _ = lesson(request, 0.3)
        _, decode = lesson(int(order[request]), 0.3)
        learner.take(Asked(None, TOKENS, share_codes(prompt)), decode)
    told = learner.taught(due(learner).run())
    assert told is not None
    assert told.activation is learner.activation is None
