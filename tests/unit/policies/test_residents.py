"""What workers hold of the experts, against the cache of the replay and against sums over single experts."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eldr.errors import EldrError
from eldr.policies import PolicyOptions
from eldr.policies.base import DecodeRequest
from eldr.policies.residents import MISS_COSTS, MOVED, HostShare, Residents, miss_ratio
from eldr.policies.unions import Geometry
from tests.unit.policies.test_expected_union import Given, counts_of

LAYERS, EXPERTS = 2, 8
GEOMETRY = Geometry(LAYERS, EXPERTS)
FLAT = np.full(LAYERS * EXPERTS, 0.25, dtype=np.float32)


def survival_of(activity: NDArray[np.float64]) -> NDArray[np.uint16]:
    return np.rint((1 - activity) * 65535).astype(np.uint16)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    capacity=st.integers(1, EXPERTS - 1),
    events=st.lists(st.integers(0, 2), min_size=1, max_size=12),
)
def test_reads_are_sums_over_what_is_held_and_what_is_missing(seed: int, capacity: int, events: list[int]) -> None:
    rng = np.random.default_rng(seed)
    residents = Residents(Geometry(LAYERS, EXPERTS), HostShare(capacity / EXPERTS, "9"))
    use, activity = np.zeros((3, LAYERS, EXPERTS)), np.zeros((3, LAYERS, EXPERTS))
    for _ in range(3):
        residents.append()
    for row in events:
        activity[row] = rng.random((LAYERS, EXPERTS))
        use[row] += MOVED * (activity[row] - use[row])
        residents.changed(row, survival_of(activity[row].reshape(-1)), FLAT)
    profile = rng.random(LAYERS * EXPERTS).astype(np.float32)
    added = residents.added(profile)
    for row in range(3):
        reads = more = 0.0
        for layer in range(LAYERS):
            # Of a worker of which nothing is known, everything counts as held.
            held = set(np.argsort(-use[row, layer])[:capacity].tolist()) if row in events else set(range(EXPERTS))
            for expert, active in enumerate(activity[row, layer].tolist()):
                price = 1 if expert in held else 10
                reads += price * active
                more += price * (1 - active) * float(profile[layer * EXPERTS + expert])
        assert residents.reads[row] == pytest.approx(reads, rel=1e-3, abs=1e-3)
        assert added[row] == pytest.approx(more, rel=1e-3, abs=1e-3)


def test_rows_move_when_workers_leave() -> None:
    residents = Residents(GEOMETRY, HostShare(0.5, "pcie5"))
    rng = np.random.default_rng(1)
    for row in range(12):  # more than there are spare rows at first
        residents.append()
        residents.changed(row, survival_of(rng.random(LAYERS * EXPERTS)), FLAT)
    added, reads = residents.added(FLAT), residents.reads.copy()
    residents.remove(3)
    kept = [0, 1, 2, 11, *range(4, 11)]
    assert residents.added(FLAT).tolist() == added[kept].tolist()
    assert residents.reads.tolist() == reads[kept].tolist()
    residents.append()
    assert residents.reads[11] == 0
    assert residents.added(FLAT)[11] == pytest.approx(FLAT.sum())


def test_experts_that_the_host_computes_are_those_that_the_fleet_uses_least() -> None:
    residents = Residents(GEOMETRY, HostShare(0.25, "cpu"))
    residents.append()
    mean = np.tile(np.linspace(0.8, 0.1, EXPERTS), LAYERS).astype(np.float32)
    for _ in range(20):  # the worker's own requests use others
        residents.changed(0, survival_of(np.tile([0.0] * 6 + [0.5, 0.5], LAYERS)), mean)
    assert residents.reads[0] == pytest.approx(LAYERS * 2 * 0.5 * MISS_COSTS["cpu"], rel=1e-3)
    assert residents.all_reads == pytest.approx(LAYERS * (2 + 6 * 14))


@pytest.mark.parametrize(("cost", "missing"), [("pcie5", 61), ("pcie4", 121), ("cpu", 14), ("0", 1), ("2.5", 3.5)])
def test_a_copy_is_read_as_well_and_a_computed_expert_is_not(cost: str, missing: float) -> None:
    assert HostShare(0.5, cost).missing_reads == missing


@pytest.mark.parametrize("cost", ["pcie6", "-1", "inf", "nan", ""])
def test_other_miss_costs_are_refused(cost: str) -> None:
    with pytest.raises(EldrError, match="miss_cost"):
        miss_ratio(cost)
    with pytest.raises(EldrError, match="miss_cost"):
        PolicyOptions.from_settings({"miss_cost": cost})


def test_options_say_what_devices_hold() -> None:
    assert PolicyOptions().host is None
    host = PolicyOptions.from_settings({"resident": 0.25, "miss_cost": 30}).host
    assert host is not None
    assert (host.capacity(32), host.ratio, host.computed) == (8, 30.0, False)
    wire = PolicyOptions(resident=0.5, miss_cost="cpu").to_wire()
    assert PolicyOptions.from_wire(wire) == PolicyOptions(resident=0.5, miss_cost="cpu")


def test_a_request_goes_where_its_experts_are_still_held() -> None:
    """Two idle workers. One has served the request's kind before, the other a different kind."""
    first, second = (np.zeros((3, 8), dtype=np.float32) for _ in range(2))
    first[:, :2], second[:, 4:6] = 0.9, 0.9
    profiles = np.array([first.reshape(-1), second.reshape(-1)] * 10)
    chosen = []
    for host in (None, HostShare(0.25, "pcie5")):
        policy = Given(profiles, anchor=0, host=host)
        for worker in ("a", "b"):
            policy.joined(worker)
        for identity, worker in enumerate(("a", "b", "a", "b")):
            asked = DecodeRequest(str(identity), 20, counts_of())
            policy.started(asked, worker)
            policy.finished(asked, worker)
        costs = [policy.costs(DecodeRequest(str(kind), 20, counts_of()), {"a": 0, "b": 0}) for kind in (0, 1)]
        assert costs[0] is not None
        assert costs[1] is not None
        chosen.append([costs[kind]["b"] / costs[kind]["a"] for kind in (0, 1)])  # type: ignore[index]
    assert chosen[0] == pytest.approx([1, 1])
    assert chosen[1][0] > 2
    assert chosen[1][1] < 0.5


@pytest.mark.parametrize("guard", [0.0, math.inf])
def test_missing_experts_that_cost_nothing_change_nothing(guard: float) -> None:
    profiles = np.random.default_rng(3).random((30, 24)).astype(np.float32) * 0.6
    costs = []
    for host in (None, HostShare(0.5, "0")):
        policy = Given(profiles, tail_guard=guard, host=host)
        for worker in ("a", "b", "c"):
            policy.joined(worker)
        for identity in range(9):
            policy.started(DecodeRequest(str(identity), 20, counts_of()), "abbcccccc"[identity])
        found = policy.costs(DecodeRequest("20", 20, counts_of()), {"a": 1, "b": 2, "c": 6})
        assert found is not None
        costs.append(list(found.values()))
    assert costs[1] == pytest.approx(costs[0], rel=1e-3)
    assert np.isinf(costs[0]).any() == (guard == 0)


def test_what_a_step_reads_for_each_of_its_experts() -> None:
    """Two requests activate 4 x 0.96 + 4 x 0.64 experts of each layer. The latter are not held, each is 14 reads."""
    profile = np.tile(np.repeat([0.8, 0.4], 4), 3).astype(np.float32)
    policy = Given(np.stack([profile] * 2), anchor=0, host=HostShare(0.5, "cpu"))
    policy.joined("a")
    asked = [DecodeRequest(identity, 20, counts_of()) for identity in ("0", "1")]
    for request in asked:
        policy.started(request, "a")
    step = policy.expected_step("a")
    assert step is not None
    assert step.reads_per_expert == pytest.approx((3.84 + 14 * 2.56) / 6.4, rel=0.01)
    for request in asked:
        policy.finished(request, "a")
    idle = policy.expected_step("a")
    assert idle is not None
    assert idle.reads_per_expert == 1
