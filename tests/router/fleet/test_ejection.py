"""Ejection and the retry budget as state machines: time is an argument, so nothing here waits."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.router.fleet.ejection import EjectionRules, Ejections, Standing
from eldr.router.request.attempts import RetryBudget

FOUR = ["a", "b", "c", "d"]


def fail(ejections: Ejections, worker: str, times: int, now_s: float = 0.0, up: list[str] = FOUR) -> list[str | None]:
    return [ejections.failed(worker, now_s, up) for _ in range(times)]


def eject(ejections: Ejections, worker: str, now_s: float = 0.0, up: list[str] = FOUR) -> None:
    assert fail(ejections, worker, 5, now_s, up)[-1] == "consecutive"


def test_failures_in_a_row_eject_and_a_success_between_them_does_not() -> None:
    ejections = Ejections(EjectionRules(consecutive=3, rate_requests=1000))
    for _ in range(50):
        assert fail(ejections, "a", 2) == [None, None]
        ejections.succeeded("a", 0.0)
    assert ejections.standing("a") is Standing.IN
    assert fail(ejections, "a", 3) == [None, None, "consecutive"]
    assert ejections.standing("a") is Standing.OUT
    assert fail(ejections, "a", 9) == [None] * 9  # what it still ran


@pytest.mark.parametrize(("failures_in_ten", "expected"), [(4, False), (5, True)])
def test_a_share_of_failures_ejects(failures_in_ten: int, expected: bool) -> None:
    ejections = Ejections(EjectionRules(consecutive=1000, rate=0.5, rate_requests=20, window_s=10.0))
    reasons = []
    for n in range(200):
        now_s = n * 0.1
        if n * failures_in_ten % 10 < failures_in_ten:  # spread evenly
            reasons.append(ejections.failed("a", now_s, FOUR))
        else:
            ejections.succeeded("a", now_s)
    assert ("rate" in reasons) == expected


def test_failures_of_long_ago_do_not_count() -> None:
    rules = EjectionRules(consecutive=1000, rate=0.5, rate_requests=20, window_s=10.0)
    ejections = Ejections(rules)
    assert fail(ejections, "a", 19, now_s=0.0) == [None] * 19
    assert fail(ejections, "a", 19, now_s=25.0) == [None] * 19
    assert fail(ejections, "a", 1, now_s=25.0) == ["rate"]


@given(st.floats(0.1, 10), st.floats(10, 200), st.floats(0, 0.5), st.integers(0, 2**32))
def test_each_ejection_lasts_twice_as_long_up_to_a_cap(base_s: float, max_s: float, jitter: float, seed: int) -> None:
    ejections = Ejections(EjectionRules(base_s=base_s, max_s=max_s, jitter=jitter), seed)
    now_s = 0.0
    eject(ejections, "a", now_s)
    for number in range(12):
        duration_s = min(base_s * 2**number, max_s)
        assert ejections.due(now_s + duration_s * (1 - jitter) * 0.999) == []
        now_s += duration_s * (1 + jitter) * 1.001
        assert ejections.due(now_s) == ["a"]
        assert ejections.began("a")
        assert fail(ejections, "a", 1, now_s) == ["trial"]


def test_a_worker_that_did_well_for_long_starts_anew() -> None:
    ejections = Ejections(EjectionRules(base_s=1.0, max_s=8.0, jitter=0.0))
    now_s = 0.0
    for wait_s, expected_s in ((0.0, 1.0), (7.0, 2.0), (7.0, 4.0), (9.0, 1.0)):
        now_s += wait_s
        eject(ejections, "a", now_s)
        assert ejections.due(now_s + expected_s - 0.01) == []
        now_s += expected_s
        assert ejections.due(now_s) == ["a"]
        ejections.began("a")
        assert ejections.succeeded("a", now_s)
        assert ejections.standing("a") is Standing.IN


def test_jitter_spreads_the_returns() -> None:
    ends = set()
    for seed in range(20):
        ejections = Ejections(EjectionRules(base_s=100.0, jitter=0.2), seed)
        eject(ejections, "a")
        ends.add(next(second for second in range(200) if ejections.due(float(second))))
    assert len(ends) > 5


def test_a_trial_is_one_request() -> None:
    ejections = Ejections(EjectionRules(base_s=1.0, jitter=0.0))
    assert not ejections.began("a")
    eject(ejections, "a")
    assert not ejections.began("a")
    assert ejections.due(1.0) == ["a"]
    assert ejections.began("a")
    assert not ejections.began("a")
    assert ejections.ended("a")  # its client left: no verdict
    assert ejections.began("a")
    assert ejections.succeeded("a", 2.0)
    assert not ejections.ended("a")
    assert not ejections.not_in


@pytest.mark.parametrize(("workers", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (16, 8)])
def test_at_most_half_of_the_workers_are_out(workers: int, most: int) -> None:
    up = [str(n) for n in range(workers)]
    ejections = Ejections(EjectionRules())
    for worker in up:
        fail(ejections, worker, 50, up=up)
    assert len(ejections.not_in) == most


def test_when_others_go_down_the_oldest_ejection_ends() -> None:
    ejections = Ejections(EjectionRules())
    eject(ejections, "b", 0.0)
    eject(ejections, "a", 1.0)
    assert ejections.relieve(2.0, FOUR) == []
    assert ejections.relieve(2.0, ["a", "b", "c"]) == ["b"]
    assert ejections.relieve(2.0, ["a"]) == ["a"]
    assert not ejections.not_in


STEPS = st.tuples(
    st.sampled_from(["failed", "succeeded", "began", "ended", "due", "up", "down", "forget"]),
    st.sampled_from(FOUR),
    st.floats(0, 20),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=200), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(1, 3))
def test_whatever_happens_enough_workers_stay_and_every_one_that_went_comes_back(
    steps: list[tuple[str, str, float]], share: float, consecutive: int
) -> None:
    rules = EjectionRules(consecutive=consecutive, share=share, rate_requests=4, base_s=2.0, max_s=30.0)
    ejections = Ejections(rules)
    up, now_s, trying = set(FOUR), 0.0, set()
    for action, worker, pause_s in steps:
        now_s += pause_s
        before = ejections.standing(worker)
        if action == "failed":
            why = ejections.failed(worker, now_s, up)
            assert (why is None) == (ejections.standing(worker) is before)
            assert before is not Standing.TRYING or why == "trial"
            assert before in (Standing.IN, Standing.TRYING) or why is None
        elif action == "succeeded":
            assert ejections.succeeded(worker, now_s) == (before is Standing.TRYING)
        elif action == "began":
            assert ejections.began(worker) == (before is Standing.TRIAL)
        elif action == "ended":
            assert ejections.ended(worker) == (before is Standing.TRYING)
        elif action == "due":
            for one in ejections.due(now_s):
                assert ejections.standing(one) is Standing.TRIAL
        elif action == "forget":
            ejections.forget(worker)
            assert ejections.standing(worker) is Standing.IN
        else:
            (up.add if action == "up" else up.discard)(worker)
            ejections.relieve(now_s, up)
            assert sum(one in up for one in ejections.not_in) <= math.floor(share * len(up))
        assert set(ejections.not_in) == {one for one in FOUR if ejections.standing(one) is not Standing.IN}
        trying = {one for one in FOUR if ejections.standing(one) is Standing.TRYING}
        assert trying <= set(ejections.not_in)
    ejections.due(now_s + rules.max_s * (1 + rules.jitter))
    for worker in list(ejections.not_in):
        assert ejections.began(worker) or worker in trying
        assert ejections.succeeded(worker, now_s + 100)
    assert not ejections.not_in


@given(st.floats(0, 1), st.integers(0, 50), st.lists(st.booleans(), max_size=300))
def test_retries_never_exceed_their_share(ratio: float, burst: int, wants: list[bool]) -> None:
    budget = RetryBudget(ratio, burst)
    retries = 0
    for requests, wanted in enumerate(wants, 1):
        budget.request()
        retries += wanted and budget.take()
        assert retries <= burst + ratio * requests + 1e-6
        assert budget.left <= burst


def test_a_budget_that_is_not_used_up_grants_every_retry() -> None:
    budget = RetryBudget(0.2, 10)
    assert [budget.take() for _ in range(11)] == [True] * 10 + [False]
    for _ in range(5):
        budget.request()
    assert [budget.take(), budget.take()] == [True, False]
