"""Which workers serve which name, through all that may happen to a fleet."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.router.config.endpoint import LEGS, ROLES, Role
from eldr.router.fleet.workers import Fleet, Worker

BASES = ("m1", "m2", "m3")
ADAPTERS = ("x", "y")


def cards(bases: set[str], adapters: set[str]) -> list[dict[str, Any]]:
    parent = min(bases)
    return [{"id": name, "parent": None} for name in sorted(bases)] + [
        {"id": name, "parent": parent} for name in sorted(adapters)
    ]


def join(
    fleet: Fleet,
    url: str,
    role: Role,
    bases: set[str] | None,
    adapters: set[str] = frozenset(),  # type: ignore[assignment]
) -> Worker:
    worker = fleet.add(url, role, 4)
    fleet.set_models(worker, None if bases is None else cards(bases, adapters), 0.0)
    fleet.set_healthy(worker, True)
    return worker


steps = st.lists(
    st.tuples(
        st.sampled_from(["join", "join", "join", "list", "list", "leave", "down", "up", "start", "finish"]),
        st.integers(0, 5),
        st.none() | st.sets(st.sampled_from(BASES), min_size=1, max_size=2),
        st.sets(st.sampled_from(ADAPTERS)),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(steps)
def test_every_name_leads_to_the_workers_that_list_it(steps: list[Any]) -> None:
    fleet = Fleet()
    workers: dict[int, Worker] = {}
    asked_s = 0.0
    for what, number, bases, adapters in steps:
        role = ROLES[number % 3]
        worker = workers.get(number)
        asked_s += 1
        if what == "join" and worker is None:
            workers[number] = join(fleet, f"http://w:{number}", role, bases, adapters)
        elif worker is None:
            continue
        elif what == "leave":
            fleet.remove(workers.pop(number))
        elif what == "list":
            fleet.set_models(worker, None if bases is None else cards(bases, adapters), asked_s)
        elif what in ("down", "up"):
            fleet.set_healthy(worker, what == "up")
        elif what == "start" and worker.in_flight < 4:
            fleet.started(worker)
        elif what == "finish" and worker.in_flight:
            fleet.finished(worker)
        check(fleet, list(workers.values()))


def check(fleet: Fleet, workers: list[Worker]) -> None:
    groups = fleet.groups
    assert groups
    grouped = [worker for group in groups for worker in group.members()]
    assert len(grouped) == len({worker.url for worker in grouped})
    for worker in grouped:
        assert worker in workers
        group = fleet.group(worker)
        assert group in groups
        assert group is not None
        assert group.has(worker)
    for group in groups:
        decode = group.workers["decode"].values()
        assert group.eligible == {w.url: w.in_flight for w in decode if w.available and w.in_flight < 4}
        assert group.free == sum(4 - load for load in group.eligible.values())
        roles = {worker.role for worker in group.members()}
        assert not roles or group.aggregated == ("aggregated" in roles)
        available = {worker.leg for worker in group.members() if worker.available}
        assert group.ready == (available >= set(group.legs))
    for group in groups:
        assert connected([worker.bases for worker in group.members() if worker.models is not None])
    # Workers with a base model in common are together.
    in_service = [worker for worker in workers if worker.available]
    for one in in_service:
        for other in in_service:
            if one.bases & other.bases:
                assert fleet.group(one) is fleet.group(other)
    for name in (*BASES, *ADAPTERS):
        served = fleet.served(name)
        listing = {worker.url for worker in in_service if worker.leg == "decode" and name in (worker.models or ())}
        if served is None:
            assert not listing
            continue
        for role in LEGS:
            for worker in served.workers(role):
                assert worker.models is None or name in worker.models
                assert fleet.group(worker) is served.group
        if name in BASES:
            assert listing <= {worker.url for worker in served.workers("decode")}
        else:  # adapters of two base models may have the same name, which stands for one of them
            own = {worker.url for worker in in_service if fleet.group(worker) is served.group}
            assert listing & own <= {worker.url for worker in served.workers("decode")}


def connected(sets: list[frozenset[str]]) -> bool:
    """Whether one can get from each set to each other over elements in common."""
    reached = set(sets[0]) if sets else set()
    for _ in sets:
        for names in sets:
            if reached & names:
                reached |= names
    return all(names <= reached for names in sets)


def test_groups_that_one_worker_made_one_part_again() -> None:
    for leaves in (False, True):
        fleet = Fleet()
        ones = [join(fleet, f"http://{role}:1", role, {"m1"}) for role in LEGS]
        others = [join(fleet, f"http://{role}:2", role, {"m2"}) for role in LEGS]
        between = join(fleet, "http://between", "decode", {"m1", "m2"})
        assert len(fleet.groups) == 1
        assert fleet.served(None) is not None
        served = fleet.served("m2")
        assert served is not None
        served.requests += 1
        served.promise()
        told: list[Worker] = []
        fleet.on_change(told.append)
        if leaves:
            fleet.remove(between)
        else:
            fleet.set_models(between, cards({"m1"}, set()), 1.0)
        assert fleet.served(None) is None  # nobody knows which one is meant
        groups = [{fleet.group(worker) for worker in workers} for workers in (ones, others)]
        assert [len(found) for found in groups] == [1, 1]
        assert groups[0] != groups[1]
        (group,) = groups[1]
        assert fleet.served("m2") is served
        assert served.group is group
        assert group is not None
        assert group.bases == {"m2"}
        assert (group.free, group.promised) == (4, 1)
        assert {*others, between} <= set(told)


def test_an_older_answer_does_not_undo_a_newer_one() -> None:
    fleet = Fleet()
    worker = join(fleet, "http://d:1", "decode", {"m1"})
    fleet.set_models(worker, cards({"m1"}, {"x"}), 5.0)
    fleet.set_models(worker, cards({"m1"}, set()), 4.0)
    assert fleet.served("x") is not None
    fleet.set_models(worker, cards({"m1"}, set()), 6.0)
    assert fleet.served("x") is None


def test_a_worker_with_the_names_of_two_groups_makes_them_one() -> None:
    fleet = Fleet()
    told: list[str] = []
    one, other = join(fleet, "http://d:1", "decode", {"m1"}), join(fleet, "http://d:2", "decode", {"m2"})
    assert fleet.group(one) is not fleet.group(other)
    fleet.on_change(lambda worker: told.append(worker.url))
    fleet.started(other)
    join(fleet, "http://d:3", "decode", {"m1", "m2"})
    (group,) = fleet.groups
    assert group.bases == {"m1", "m2"}
    assert (group.free, group.eligible) == (11, {"http://d:1": 0, "http://d:2": 1, "http://d:3": 0})
    assert set(told) == {"http://d:2", "http://d:3"}
    served = fleet.served("m1")
    assert served is not None
    assert [worker.url for worker in served.workers("decode")] == ["http://d:1", "http://d:3"]


def test_a_group_keeps_its_place_while_its_workers_are_replaced() -> None:
    """The policy's state hangs on the group."""
    fleet = Fleet()
    first = join(fleet, "http://d:1", "decode", {"m1"})
    group = fleet.group(first)
    fleet.remove(first)
    again = join(fleet, "http://d:2", "decode", {"m1", "alias"})
    assert fleet.group(again) is group
    fleet.set_models(again, cards({"alias"}, set()), 1.0)
    assert fleet.group(again) is group
    fleet.set_models(again, cards({"m2"}, set()), 2.0)
    assert fleet.group(again) is not group
    assert len(fleet.groups) == 1


def test_what_a_worker_lists_is_kept_until_it_is_in_service() -> None:
    fleet = Fleet()
    slow = fleet.add("http://d:1", "decode", 4)
    fleet.set_models(slow, cards({"m1"}, {"x"}), 0.0)
    join(fleet, "http://d:2", "decode", {"m2"})  # while it is still checked
    fleet.set_healthy(slow, True)
    served = fleet.served("x")
    assert served is not None
    assert (served.card, served.adapter) == ({"id": "x", "parent": "m1"}, True)
    reloaded = {"id": "x", "parent": "m1", "root": "/elsewhere"}
    fleet.set_models(slow, [*cards({"m1"}, set()), reloaded], 1.0)
    assert served.card == reloaded


def test_workers_that_list_nothing_may_serve_anything() -> None:
    fleet = Fleet()
    assert fleet.served("m1") is None
    join(fleet, "http://d:1", "decode", None)
    served = fleet.served("m1")
    assert served is not None
    assert [worker.url for worker in served.workers("decode")] == ["http://d:1"]
    join(fleet, "http://d:2", "decode", {"m1"})
    for name, urls in (("m1", ["http://d:1", "http://d:2"]), ("m2", ["http://d:1"])):
        served = fleet.served(name)
        assert served is not None
        assert [worker.url for worker in served.workers("decode")] == urls


def test_how_long_the_workers_of_an_adapter_have_been_gone() -> None:
    fleet = Fleet()
    has, lacks = join(fleet, "http://d:1", "decode", {"m1"}, {"x"}), join(fleet, "http://d:2", "decode", {"m1"})
    served = fleet.served("x")
    assert served is not None
    assert served.gone_for_s("decode") is None
    assert served.gone_for_s("prefill") == math.inf
    fleet.set_ejected(has, True)
    gone_s = served.gone_for_s("decode")
    assert gone_s is not None
    assert 0 <= gone_s < 60
    assert fleet.groups[0].whole.gone_for_s("decode") is None
    assert lacks.available
