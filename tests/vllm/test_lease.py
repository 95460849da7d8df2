"""The lease: deadlines and what the guard makes of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eldr.engines.vllm.lease import PullGuard, deadline_unix_s, grant

times = st.floats(0, 1e10)


def test_deadline_of_a_lease_seen_at_once() -> None:
    assert deadline_unix_s(grant(30, 1000.0), 1000.0, 2.0) == 1028.0


@given(left=st.floats(0, 1e4), sent=times, delay=st.floats(0, 1e4), margin=st.floats(0, 10))
def test_time_on_the_way_counts(left: float, sent: float, delay: float, margin: float) -> None:
    deadline = deadline_unix_s({"left_s": left, "unix_s": sent}, sent + delay, margin)
    assert deadline == pytest.approx(sent + left - margin)


@given(left=st.floats(0, 1e4), now=times, ahead=st.floats(0, 1e4))
def test_a_sender_whose_clock_is_ahead_cannot_lengthen_the_lease(left: float, now: float, ahead: float) -> None:
    deadline = deadline_unix_s({"left_s": left, "unix_s": now + ahead}, now, 0.0)
    assert deadline is not None
    assert deadline <= now + left


@pytest.mark.parametrize(
    "wire",
    [None, 30, [], {}, {"left_s": 30}, {"unix_s": 1.0}, {"left_s": "30", "unix_s": 1.0}, {"left_s": True, "unix_s": 1},
     {"left_s": float("nan"), "unix_s": 1.0}, {"left_s": float("inf"), "unix_s": 1.0}, {"left_s": 30, "unix_s": None}],
)  # fmt: skip
def test_what_is_no_lease(wire: object) -> None:
    assert deadline_unix_s(wire, 1000.0, 2.0) is None


def pull() -> SimpleNamespace:
    return SimpleNamespace(local_block_ids=([1, 2],), awaiting_kvs=True)


def results(finished: set[str] = frozenset(), failed: set[str] = frozenset()) -> SimpleNamespace:  # type: ignore[assignment]
    return SimpleNamespace(finished_recving=set(finished), failed_recving=set(failed))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_pull_within_its_lease_is_left_alone() -> None:
    guard = PullGuard(Clock())
    pulls = {"a": pull(), "notify-only": pull()}
    guard.admit(pulls, {"a": 101.0})
    assert pulls == {"a": pull(), "notify-only": pull()}
    done = results({"a"})
    guard.settle(done)
    assert done == results({"a"})
    assert not guard.events


def test_a_pull_that_would_start_too_late_is_failed_without_starting() -> None:
    guard = PullGuard(Clock())
    pulls = {"late": pull(), "good": pull()}
    guard.admit(pulls, {"late": 100.0, "good": 100.1})
    assert list(pulls) == ["good"]
    for expected in (results({"late"}, {"late"}), results()):  # reported once
        done = results()
        guard.settle(done)
        assert done == expected
    assert guard.events == {"expired_before_pull": 1}


def test_a_pull_without_a_lease_only_tells_the_prefill_worker() -> None:
    guard = PullGuard(Clock())
    pulls = {"a": pull()}
    guard.admit(pulls, {"a": None})
    assert pulls["a"] == SimpleNamespace(local_block_ids=(), awaiting_kvs=False)
    done = results()
    guard.settle(done)
    assert done == results({"a"}, {"a"})
    assert guard.events == {"no_lease": 1}


def test_a_pull_that_ends_too_late_is_discarded() -> None:
    clock = Clock()
    guard = PullGuard(clock)
    guard.admit({"a": pull(), "b": pull(), "c": pull()}, {"a": 101.0, "b": 103.0, "c": 101.0})
    clock.now = 102.0
    done = results({"a", "b", "c", "other"}, {"c"})  # c failed for a reason of its own
    guard.settle(done)
    assert done == results({"a", "b", "c", "other"}, {"a", "c"})
    assert guard.events == {"expired_during_pull": 1}
