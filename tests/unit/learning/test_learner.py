"""Learning from finished requests: what is taken, when a fit is due, and which model is used afterwards."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from numpy.typing import NDArray

from eldr.counts import ExpertCounts
from eldr.learning.learner import CHOOSE_AGAIN, EVERY, FIRST, Learner, Taught
from eldr.learning.lessons import CAPACITY, LEAST_ROWS, Asked, Lesson, Lessons, decoded, share_codes
from eldr.learning.of_words import WordsTask, explained
from eldr.prompt.fit import Choice, fit_prompt_model
from eldr.prompt.model import PromptModel
from eldr.prompt.words import Words, words_of_text

LAYERS, EXPERTS, TOP_K = 2, 8, 2
KINDS = 3


def words_of(request: int) -> Words:
    """A prompt whose words tell its kind, request % KINDS, and what else it is about."""
    rng = np.random.default_rng([request, 1])
    own = "abcdefghij"[request % KINDS]
    return words_of_text(" ".join(own * int(n) + "x" for n in rng.integers(1, 9, 12)).encode())


@functools.cache
def report_of(kind: int, rows: int = 32, layers: int = LAYERS, experts: int = EXPERTS) -> ExpertCounts:
    """What a worker says of a request whose rows prefer the experts of its kind."""
    rng = np.random.default_rng([kind, rows])
    counts = np.zeros((layers, experts), dtype=np.uint32)
    for layer in range(layers):
        weights = np.where(np.arange(experts) // 2 == kind, 20.0, 1.0)
        for _ in range(rows):
            counts[layer, rng.choice(experts, TOP_K, replace=False, p=weights / weights.sum())] += 1
    return ExpertCounts(counts, rows, TOP_K)


def asked(request: int) -> Asked:
    return Asked(words_of(request))


def profile_of(decode: ExpertCounts) -> NDArray[np.float32]:
    return decode.counts.reshape(-1).astype(np.float32) / np.float32(decode.prompt_tokens)


def fill(learner: Learner, requests: int, first: int = 0, lie: bool = False) -> None:
    for request in range(first, first + requests):
        kind = int(np.random.default_rng([request, 2]).integers(KINDS)) if lie else request % KINDS
        assert learner.take(asked(request), report_of(kind))


def due(learner: Learner) -> WordsTask:
    task = learner.task()
    assert task is not None
    assert task.of_counts is None
    assert task.of_words is not None
    return task.of_words


def learn(learner: Learner) -> PromptModel | None:
    """One fit. Returns the new model, or None if nothing changes."""
    learned = learner.taught(Taught(due(learner).run(), None))
    return None if learned is None else learner.prompts


def fitted_model(requests: int = 60, lie: bool = False) -> PromptModel:
    kinds = np.arange(requests) % KINDS
    if lie:
        kinds = np.random.default_rng(0).permutation(kinds)
    profiles = np.stack([profile_of(report_of(int(kind))) for kind in kinds])
    return fit_prompt_model([words_of(request) for request in range(requests)], profiles, LAYERS, TOP_K)


def agreement(model: PromptModel, kind: int) -> float:
    """The share of the experts of a kind in what a model predicts for a prompt of it, from 0 to 1."""
    predicted = model.predict(words_of(9000 + kind)).reshape(LAYERS, EXPERTS)
    return float(predicted[:, 2 * kind : 2 * kind + 2].sum() / (LAYERS * TOP_K))


# Lessons.


def test_a_profile_is_the_share_of_steps_of_each_expert() -> None:
    counts = np.array([[4, 2, 2, 0], [0, 4, 1, 3]], dtype=np.uint32)
    found = decoded(share_codes(ExpertCounts(counts, 4, 2)))
    assert found.tolist() == pytest.approx([1, 0.5, 0.5, 0, 0, 1, 0.25, 0.75], abs=0.005)


def test_the_last_lessons_are_kept() -> None:
    lessons = Lessons(1, 4, 2, capacity=3)
    for number in range(5):
        lessons.add(asked(number), np.full(4, 51 * number, dtype=np.uint8))
    assert (len(lessons), lessons.taken) == (3, 5)
    words, profiles = lessons.with_words()
    kept = {int(row[0]) // 51: found for row, found in zip(profiles, words, strict=True)}
    assert set(kept) == {2, 3, 4}
    for number, found in kept.items():
        assert found.buckets.tolist() == words_of(number).buckets.tolist(), "words stand by their profile"


def test_profiles_lose_less_than_a_hundredth() -> None:
    counts = np.arange(1001, dtype=np.uint32)
    found, shares = decoded(share_codes(ExpertCounts(counts[None], 1000, 2))), counts / 1000
    assert np.abs(found - shares).max() < 0.005
    assert (found[0], found[-1]) == (0, 1)


def test_codes_do_not_change_with_later_lessons() -> None:
    """A task is sent to another process while lessons go on."""
    learner = Learner()
    fill(learner, FIRST)
    task = due(learner)
    before = task.profiles.copy()
    fill(learner, CAPACITY, first=FIRST)
    assert len(task.words) == FIRST
    assert np.array_equal(task.profiles, before)


# What is taken.


def test_what_says_nothing_is_not_taken() -> None:
    learner = Learner()
    assert not learner.take(asked(0), report_of(0, rows=LEAST_ROWS - 1))
    assert not learner.take(Asked(words_of_text(b" ")), report_of(0))
    assert learner.lessons is None
    assert learner.take(asked(0), report_of(0, rows=LEAST_ROWS))


@pytest.mark.parametrize("fitted", [None, fitted_model()])
def test_experts_of_another_model_are_not_taken(fitted: PromptModel | None) -> None:
    learner = Learner(fitted)
    assert learner.take(asked(0), report_of(0))
    assert not learner.take(asked(1), report_of(0, layers=LAYERS + 1))
    assert not learner.take(asked(1), report_of(0, experts=2 * EXPERTS))
    other = report_of(0)
    assert not learner.take(asked(1), ExpertCounts(other.counts, other.prompt_tokens, TOP_K + 1))
    assert learner.lessons is not None
    assert learner.lessons.taken == 1


def elsewhere(request: int, layers: int = LAYERS) -> Lesson:
    """What another router tells of a request."""
    decode = report_of(request % KINDS, layers=layers)
    return Lesson(decode.layers, decode.experts, decode.top_k, asked(request), share_codes(decode))


def test_lessons_of_others_are_used_once_an_own_one_shows_their_geometry() -> None:
    learner = Learner()
    for request in range(FIRST):
        assert learner.add(elsewhere(request))
    assert learner.task() is None
    assert learner.take(asked(FIRST), report_of(FIRST % KINDS))
    assert len(due(learner).words) == FIRST + 1


def test_lessons_of_others_do_not_keep_out_a_routers_own() -> None:
    learner = Learner()
    for request in range(FIRST):
        assert learner.add(elsewhere(request, layers=LAYERS + 1))
    fill(learner, FIRST)
    assert not learner.add(elsewhere(0, layers=LAYERS + 1))
    assert len(due(learner).words) == FIRST


# When a fit is due.


def test_fits_are_due_after_so_many_new_lessons() -> None:
    learner = Learner()
    assert learner.task() is None
    at = []
    for number in range(600):
        fill(learner, 1, first=number)
        if learner.task() is not None:
            at.append(number + 1)
    assert at[:4] == [FIRST, FIRST + EVERY, FIRST + 2 * EVERY, FIRST + 3 * EVERY]
    gaps = np.diff(at)
    assert gaps.tolist() == sorted(gaps.tolist())
    assert 40 < gaps[-1] < 60, "a tenth of what there is"


def test_a_choice_is_made_anew_now_and_then() -> None:
    """A choice takes most of a fit's time, so most fits use the last one."""
    learner = Learner()
    chosen = []
    for number in range(0, 3 * CAPACITY, 8):
        fill(learner, 8, first=number)
        task = learner.task()
        if task is not None:
            assert task.of_words is not None
            choice = task.of_words.choice
            if choice is None:
                chosen.append(number + 8)
            learner.taught(Taught((choice or Choice(0.1, True, 4, 0.5), None), None))
    assert chosen[0] == FIRST
    steps = np.divide(chosen[1:], chosen[:-1])
    assert (steps[:5] >= CHOOSE_AGAIN).all()
    assert (np.diff(chosen) <= 1.25 * CAPACITY).all()
    assert chosen[-1] > 2 * CAPACITY


# Which model is used.


def test_kinds_are_learned_from_nothing() -> None:
    learner = Learner()
    fill(learner, 48)
    model = learn(learner)
    assert model is not None
    assert learner.r2 > 0.5
    for kind in range(KINDS):
        assert agreement(model, kind) > 0.6


def test_reports_that_have_nothing_to_do_with_prompts_change_nothing() -> None:
    learner = Learner()
    for first in range(0, 400, 50):
        fill(learner, 50, first=first, lie=True)
        if (task := learner.task()) is not None:
            assert learner.taught(task.run()) is None
    assert learner.prompts is None
    assert learner.r2 < 0.02


def test_reports_that_are_all_the_same_change_nothing() -> None:
    learner = Learner()
    for request in range(60):
        assert learner.take(asked(request), report_of(1))
    assert learn(learner) is None
    assert learner.prompts is None


def test_a_fitted_model_stays_if_it_is_better() -> None:
    fitted = fitted_model(200)
    learner = Learner(fitted)
    fill(learner, 24)
    assert learn(learner) is None
    assert learner.prompts is fitted


def test_a_fitted_model_that_knows_less_is_beaten() -> None:
    fitted = fitted_model(60, lie=True)
    learner = Learner(fitted)
    fill(learner, 96)
    model = learn(learner)
    assert model is not None
    assert model is not fitted
    assert agreement(model, 1) > 0.6 > agreement(fitted, 1)


@pytest.mark.parametrize("truths", [24, 96])
def test_noise_after_the_truth_never_misleads(truths: int) -> None:
    """A model fades while noise takes over its lessons, and is never worse than the mean."""
    learner = Learner()
    fill(learner, truths)
    assert learn(learner) is not None
    asked = [words_of(5001 + request) for request in range(90)]
    true = np.stack([profile_of(report_of((5001 + request) % KINDS)) for request in range(90)])
    for first in range(truths, truths + 400, 20):
        fill(learner, 20, first=first, lie=True)
        if (task := learner.task()) is not None:
            learner.taught(task.run())
        assert learner.prompts is not None
        assert explained(learner.prompts, asked, true) > 0
    assert learner.r2 < 0.1


def test_a_task_gives_the_same_result_each_time() -> None:
    learner = Learner(seed=3)
    fill(learner, 60)
    task = due(learner)
    (choice, one), (again, other) = task.run(), task.run()
    assert choice == again
    assert one is not None
    assert other is not None
    assert np.array_equal(one.words.table, other.words.table)
