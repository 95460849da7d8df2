"""Experts in host memory, against a cache that a list and a few loops keep, and against counting by hand."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eldr.cost import StepCost
from eldr.policies import PolicyOptions, make_policy
from eldr.policies.residents import HostShare
from eldr.replay.engine import Engine
from eldr.replay.errors import ReplayError
from eldr.replay.experiment import Laboratory, Settings
from eldr.replay.fleet import FleetSpec
from eldr.replay.host_memory import (
    HALVE_EVERY,
    CacheShape,
    HostComputed,
    HostLayout,
    HostMemory,
    most_used,
)
from eldr.replay.packed import pack_trace
from eldr.replay.reading import Reading
from eldr.replay.replicas import alone
from eldr.replay.split import Mix
from eldr.replay.workload import Workload
from tests.synthetic import make_trace

Steps = list[list[set[int]]]


def drawn(rng: np.random.Generator, steps: int, layers: int, experts: int) -> Steps:
    """The experts that each layer of each step activates. Some are far more popular than others."""
    popular = rng.random((layers, experts)) ** 3
    return [[set(np.flatnonzero(rng.random(experts) < row).tolist()) for row in popular] for _ in range(steps)]


def as_words(steps: Steps, experts: int) -> NDArray[np.uint64]:
    layers = len(steps[0])
    flags = np.zeros((len(steps), -(-layers * experts // 64) * 64), dtype=np.uint8)
    for step, of_layers in enumerate(steps):
        for layer, active in enumerate(of_layers):
            flags[step, [layer * experts + expert for expert in active]] = 1
    return np.packbits(flags, axis=1, bitorder="little").view(np.uint64)


def least_recently_used(steps: Steps, layer: int, capacity: int) -> list[int]:
    """Misses of each step in a layer: the active experts move to the end in order, and the first ones go."""
    held = OrderedDict.fromkeys(range(capacity))
    misses = []
    for of_layers in steps:
        active = sorted(of_layers[layer])
        misses.append(len(set(active) - set(held)))
        for expert in active:
            held.pop(expert, None)
            held[expert] = None
        while len(held) > capacity:
            held.popitem(last=False)
    return misses


def least_often_used(steps: Steps, layer: int, capacity: int, experts: int) -> list[int]:
    held, uses, last = set(range(capacity)), [0] * experts, [0] * experts
    misses = []
    for number, of_layers in enumerate(steps, start=1):
        active = of_layers[layer]
        if number % HALVE_EVERY == 0:
            uses = [count // 2 for count in uses]
        misses.append(len(active - held))
        for expert in active:
            uses[expert], last[expert] = uses[expert] + 1, number
        held |= active
        while len(held) > capacity:
            held.remove(min(held, key=lambda expert: (expert in active, uses[expert], last[expert], expert)))
    return misses


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    layers=st.integers(1, 3),
    experts=st.sampled_from([1, 5, 32, 70]),
    capacity=st.integers(1, 70),
    by_frequency=st.booleans(),
    runs=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6),
)
def test_misses_are_those_of_a_plain_cache(
    seed: int, layers: int, experts: int, capacity: int, by_frequency: bool, runs: list[tuple[int, int]]
) -> None:
    capacity = min(capacity, experts)
    made = sum(min(run) for run in runs)
    steps = drawn(np.random.default_rng(seed), made + 6, layers, experts)
    words = as_words(steps, experts)
    misses = np.zeros(len(steps))
    for layer in range(layers):
        misses += (
            least_often_used(steps, layer, capacity, experts)
            if by_frequency
            else least_recently_used(steps, layer, capacity)
        )
    distinct = [sum(map(len, of_layers)) for of_layers in steps]
    reading = HostMemory(CacheShape(layers, experts, capacity, by_frequency), 10.0)
    first = 0
    for planned, cut in runs:  # of the steps that were planned, only the first ones may be made
        found = reading.of_batch(words[first : first + planned])
        assert found.tolist() == (10 * misses + distinct)[first : first + planned].tolist()
        count = min(planned, cut)
        reading.made(words[first : first + count])
        first += count
        assert (reading.resident.sum(axis=1) == capacity).all()


def test_uses_of_long_ago_are_forgotten() -> None:
    experts, steps = 4, HALVE_EVERY + 20
    # Experts 2 and 3 come late. At once they are used twice as often as 0 and 1 ever were in the same time.
    active = [[{0, 1}] if step < HALVE_EVERY - 10 else [{2, 3}] for step in range(steps)]
    reading = HostMemory(CacheShape(1, experts, 3, by_frequency=True), 1.0)
    reading.made(as_words(active, experts))
    assert least_often_used(active, 0, 3, experts)[-1] == 0
    assert reading.resident[0].tolist()[2:] == [True, True]


def test_everything_resident_is_as_if_there_were_no_host() -> None:
    words = as_words(drawn(np.random.default_rng(1), 20, 2, 16), 16)
    reading = HostMemory(CacheShape(2, 16, 16), 60.0)
    assert reading.of_batch(words).tolist() == np.bitwise_count(words).sum(axis=1).tolist()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), capacity=st.integers(1, 15))
def test_a_larger_cache_of_recent_use_never_misses_more(seed: int, capacity: int) -> None:
    words = as_words(drawn(np.random.default_rng(seed), 30, 2, 16), 16)
    smaller, larger = (HostMemory(CacheShape(2, 16, held), 5.0) for held in (capacity, capacity + 1))
    for reading in (smaller, larger):
        reading.made(words[:10])
    assert (larger.of_batch(words[10:]) <= smaller.of_batch(words[10:])).all()


def test_expected_experts_cost_what_they_would_now() -> None:
    reading = HostMemory(CacheShape(2, 4, 2), 10.0)
    reading.made(as_words([[{1, 3}, {0, 2}]], 4))
    probability = np.array([[0.5, 0.25, 0.125, 1.0, 0.0, 1.0, 0.5, 0.5]])
    held = [[1, 3], [0, 2]]
    expected = sum(
        p * (1 if expert in held[layer] else 11)
        for layer, row in enumerate(probability.reshape(2, 4).tolist())
        for expert, p in enumerate(row)
    )
    assert reading.of_expected(probability) == pytest.approx([expected])


def test_a_layer_waits_for_the_slower_of_device_and_host() -> None:
    resident = np.array([[True, True, False, False], [False, True, True, False]])
    reading = HostComputed(resident, 3.0)
    steps: Steps = [[{0, 1}, {1, 2}], [{0, 1, 2}, {0, 3}], [{2, 3}, {0, 1, 2}], [set(), {3}]]
    expected = [2 + 2, max(2, 3) + 6, 6 + max(2, 3), 0 + 3]
    words = as_words(steps, 4)
    assert reading.of_batch(words).tolist() == expected
    reading.made(words)
    assert reading.of_batch(words).tolist() == expected


def test_the_most_used_experts_stay() -> None:
    uses = np.array([[3.0, 1.0, 2.0, 3.0], [0.0, 0.0, 5.0, 0.0]])
    assert most_used(uses, 2).tolist() == [[True, False, False, True], [True, False, True, False]]


@pytest.mark.parametrize(("share", "experts", "held"), [(0.5, 32, 16), (0.01, 32, 1), (1.0, 7, 7), (0.26, 10, 3)])
def test_a_share_is_of_every_layer(share: float, experts: int, held: int) -> None:
    assert HostShare(share, "pcie5").capacity(experts) == held


def test_a_worker_keeps_its_cache_over_runs_that_arrivals_cut() -> None:
    trace = make_trace(requests=6, layers=3, experts=16, seed=1, steps=30)
    readings: list[HostMemory] = []

    def make(worker: int) -> Reading:
        readings.append(HostMemory(CacheShape(3, 16, 6), 10.0))
        return readings[-1]

    cost = StepCost(0.0, 1e-3, 0.0)
    arrival_s = np.linspace(0.0, 0.25, 6)
    workload = Workload(arrival_s, np.arange(6), range(6))
    result = Engine(
        pack_trace(trace), workload, FleetSpec((cost,), (cost,), reading=make), alone(make_policy("jsq"))
    ).run()
    # The same, step by step: who runs follows from when steps end.
    now, rows = 0.0, dict.fromkeys(range(6), 0)
    lengths = np.diff(trace.decode_offsets)
    steps: Steps = []
    ended_s = [0.0] * 6
    while rows:
        there = [request for request in rows if arrival_s[request] <= now]
        if not there:
            now = min(float(arrival_s[request]) for request in rows)
            continue
        active = [
            {int(e) for r in there for e in trace.decode_experts[trace.decode_offsets[r] + rows[r], layer]}
            for layer in range(3)
        ]
        steps.append(active)
        missed = sum(least_recently_used(steps, layer, 6)[-1] for layer in range(3))
        now += 1e-3 * (sum(map(len, active)) + 10 * missed)
        for request in there:
            rows[request] += 1
            if rows[request] == lengths[request]:
                ended_s[request] = now
                del rows[request]
    assert (result.arrival_s + result.request_s) == pytest.approx(np.array(ended_s))
    assert result.expert_reads_mean > result.active_experts_mean


def test_workers_hold_what_calibration_requests_used() -> None:
    trace = make_trace(requests=40, layers=2, experts=16, seed=2, steps=20)
    host = HostLayout(HostShare(0.25, "cpu"))
    laboratory = Laboratory(trace, Settings(requests=10, host_memory=host))
    chosen = laboratory.split(3).calibrate
    uses = trace.decode_profiles()[chosen].sum(axis=0).reshape(2, 16)
    reading = laboratory.reading(7.0, seed=3)(0)
    for layer in range(2):
        for expert in range(16):
            one = np.zeros((1, 32))
            one[0, 16 * layer + expert] = 1.0
            # Ties apart, the four with the most uses are computed on the device.
            more = int((uses[layer] > uses[layer, expert]).sum())
            assert reading.of_expected(one)[0] == (1.0 if more < 4 else 14.0)


def test_without_calibration_requests_nobody_knows_what_to_hold() -> None:
    trace = make_trace(requests=40, steps=20)
    settings = Settings(requests=10, mix=Mix(0.0), host_memory=HostLayout(HostShare(0.5, "cpu")))
    with pytest.raises(ReplayError, match="calibration requests, and there are none"):
        Laboratory(trace, settings).reading(7.0, seed=0)


def test_locality_pays_more_where_misses_are_dear() -> None:
    trace = make_trace(requests=120, layers=4, experts=32, top_k=2, kinds=4, seed=3, steps=60)
    gains = []
    for host in (None, HostLayout(HostShare(0.5, "pcie5"))):
        settings = Settings(requests=200, host_memory=host, options=PolicyOptions(cost_scope="moe"))
        laboratory = Laboratory(trace, settings)
        means = [
            np.mean([laboratory.run(name, 4, None, 4.0, seed).tpot_s.mean() for seed in range(2)])
            for name in ("jsq", "expected-union")
        ]
        gains.append(1 - means[1] / means[0])
    assert gains[1] > gains[0] + 0.1 > 0.1
