"""The fleet: which workers may be chosen, and what they run."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.router.fleet.workers import Fleet, FleetError, Worker


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=80))
def test_the_eligible_view_is_what_a_fresh_look_gives(steps: list[tuple[int, int]]) -> None:
    fleet = Fleet()
    workers = [fleet.add(f"http://d:{n}", "decode", 2) for n in range(4)]
    for action, index in steps:
        worker = workers[index]
        if action == 0:
            fleet.set_healthy(worker, True)
        elif action == 1:
            fleet.set_healthy(worker, False)
        elif action == 2 and worker.in_flight < 2:
            fleet.started(worker)
        elif action == 3 and worker.in_flight > 0:
            fleet.finished(worker)
        elif action in (4, 5):
            fleet.set_draining(worker, action == 4)
        expected = {w.url: w.in_flight for w in workers if w.healthy and not w.draining and w.in_flight < 2}
        assert fleet.eligible == expected
        assert fleet.decode_slots == sum(2 for w in workers if w.healthy and not w.draining)


def test_a_removed_worker_is_gone_even_when_its_last_request_ends_later() -> None:
    fleet = Fleet()
    worker = fleet.add("http://d:1", "decode", 2)
    fleet.set_healthy(worker, True)
    fleet.started(worker)
    fleet.remove(worker)
    fleet.finished(worker)
    assert fleet.eligible == {}
    with pytest.raises(FleetError):
        fleet.remove(worker)


def test_one_url_may_have_both_roles_but_not_one_twice() -> None:
    fleet = Fleet()
    fleet.add("http://w:1", "prefill", 1)
    fleet.add("http://w:1", "decode", 1)
    with pytest.raises(FleetError, match="http://w:1"):
        fleet.add("http://w:1", "decode", 1)


def test_a_worker_that_left_says_nothing_about_the_one_that_took_its_url() -> None:
    fleet = Fleet()
    old = fleet.add("http://d:1", "decode", 2)
    fleet.started(old)
    fleet.remove(old)
    new = fleet.add("http://d:1", "decode", 2)
    fleet.set_healthy(new, True)
    told: list[Worker] = []
    fleet.on_change(told.append)
    # What its last request may still do: it fails to connect, its trial ends, and it is over.
    fleet.set_healthy(old, False)
    fleet.set_ejected(old, True)
    fleet.set_draining(old, True)
    fleet.set_limit(old, 1)
    fleet.finished(old)
    assert told == []
    assert fleet.eligible == {"http://d:1": 0}


def test_listeners_hear_of_a_worker_that_left_while_they_were_to_be_told_together() -> None:
    fleet = Fleet()
    here: dict[str, bool] = {}
    fleet.on_change(lambda worker: here.update({worker.url: fleet.has(worker)}))
    stays, leaves = fleet.add("http://p:1", "prefill", 2), fleet.add("http://p:2", "prefill", 2)
    with suppress(RuntimeError), fleet.told_together():
        fleet.set_healthy(stays, True)
        fleet.remove(leaves)
        raise RuntimeError("a probe")
    assert here == {"http://p:1": True, "http://p:2": False}
