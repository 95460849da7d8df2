"""Refitting zones: the window, the schedule, the matching, the policy's part in it, and the log of it."""

import itertools
import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from eldr.calibration import fit_calibration
from eldr.counts import ExpertCounts
from eldr.policies import PolicyError, PolicyOptions, make_policy
from eldr.policies.base import DecodeRequest, Policy
from eldr.policies.locality_band import LocalityBand
from eldr.policies.logged import LoggedPolicy, LogHeader
from eldr.policies.refit import (
    LEAST_PER_ZONE,
    WANTED_PER_ZONE,
    Refit,
    RefitSchedule,
    RefitTask,
    SignatureWindow,
    decode_signatures,
    encode_signature,
)
from eldr.replay.decisions import Line, repeat_decisions
from eldr.replay.experiment import Laboratory, Settings
from eldr.zones import align_zones
from tests.synthetic import draw, make_calibration, make_trace

LAYERS, EXPERTS, TOP_K = 3, 8, 2


def units(rng: np.random.Generator, count: int, dimension: int) -> NDArray[np.float32]:
    vectors = rng.uniform(0, 1, (count, dimension)).astype(np.float32) ** 3
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# Signatures.


@given(st.integers(0, 2**32 - 1), st.integers(2, 3000))
def test_codes_keep_the_direction_of_a_signature(seed: int, dimension: int) -> None:
    signature = units(np.random.default_rng(seed), 1, dimension)[0]
    decoded = decode_signatures(encode_signature(signature)[None])[0]
    assert np.linalg.norm(decoded) == pytest.approx(1, abs=1e-5)
    assert decoded @ signature > 0.999


def test_a_zero_signature_stays_zero() -> None:
    assert not decode_signatures(encode_signature(np.zeros(5, np.float32))[None]).any()


@given(st.integers(1, 9), st.integers(0, 30), st.integers(1, 12))
def test_the_window_holds_the_newest(capacity: int, added: int, wanted: int) -> None:
    window = SignatureWindow(3, capacity)
    kept = []
    for number in range(added):
        signature = np.array([number % 7, number % 5, 1], np.float32) / np.float32(10)
        window.add(signature)
        kept.append(encode_signature(signature))
    expected = kept[-min(wanted, capacity) :]
    assert window.seen == added
    assert np.array_equal(window.newest(wanted), np.array(expected, np.uint8).reshape(-1, 3))


@given(
    st.lists(st.tuples(st.floats(0.5, 3), st.integers(0, 20)), min_size=1, max_size=40),
    st.sampled_from([1.0, 4.0, 9.0]),
)
def test_the_schedule_counts_what_came_within_the_window(ticks: list[tuple[float, int]], window_s: float) -> None:
    """Against a list of all that was seen: everything younger than the window, rounded up to whole intervals."""
    schedule = RefitSchedule(1.0, window_s)
    now_s, times = 100.0, []
    marks = [0.0]
    for gap_s, arrived in ticks:
        times += [now_s + gap_s / 2] * arrived
        now_s += gap_s
        begin_s = max(mark for mark in marks if mark <= now_s - window_s)
        marks.append(now_s)
        assert schedule.newest(now_s, len(times)) == sum(time_s > begin_s for time_s in times)


# Zones.


@given(st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_zones_are_aligned_at_the_least_total_distance(k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    old, new = units(rng, k, 12), units(rng, k, 12)
    order = align_zones(old, new)
    assert sorted(order) == list(range(k))
    distance = 1 - old.astype(np.float64) @ new.T.astype(np.float64)
    rows, columns = linear_sum_assignment(distance)
    assert distance[np.arange(k), order].sum() == pytest.approx(distance[rows, columns].sum(), abs=1e-6)


def kinds(
    rng: np.random.Generator, count: int, per_kind: int, dimension: int = 24, noise: float = 0.05
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(directions [count, D], signatures [count * per_kind, D]): as many groups as `count`, far from each other."""
    directions = np.repeat(np.eye(count, dtype=np.float32), dimension // count, axis=1)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    points = np.repeat(directions, per_kind, axis=0) + rng.uniform(0, noise, (count * per_kind, dimension))
    return directions, (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def test_a_fit_finds_the_kinds_and_leaves_each_worker_the_nearest() -> None:
    rng = np.random.default_rng(0)
    directions, points = kinds(rng, 4, 20)
    codes = np.array([encode_signature(point) for point in points])
    for order in itertools.permutations(range(4)):
        old = directions[list(order)]
        task = pickle.loads(pickle.dumps(RefitTask(("a", "b", "c", "d"), old, codes, seed=1)))
        refit = task.run()
        similarity = refit.centroids.astype(np.float32) @ directions.T
        assert similarity.argmax(axis=1).tolist() == list(order)
        assert refit.moved == 0
        assert 0 <= refit.shift < 0.05


def test_zones_that_change_places_are_counted() -> None:
    """Both kinds are nearer to b's old zone, and one of them must go to a."""
    directions, _ = kinds(np.random.default_rng(0), 4, 1)
    between = (directions[0] + directions[1]) / np.sqrt(np.float32(2))
    codes = np.array([encode_signature(direction) for direction in directions[:2]] * 20)
    refit = RefitTask(("a", "b"), np.stack([directions[2], between]), codes, 0).run()
    assert refit.moved == 1
    assert refit.shift == pytest.approx((1 + 1 - np.sqrt(0.5)) / 2, abs=1e-3)


def test_a_refit_survives_the_wire() -> None:
    refit = Refit(("a", "b"), units(np.random.default_rng(0), 2, 5).astype(np.float16))
    read = Refit.from_wire(json.loads(json.dumps(refit.to_wire())))
    assert read.workers == refit.workers
    assert np.array_equal(read.centroids, refit.centroids)
    with pytest.raises(ValueError):
        Refit.from_wire({"workers": ["a", "b", "c"], "centroids": refit.to_wire()["centroids"]})
    with pytest.raises(ValueError):
        Refit.from_wire({"workers": ["a"], "centroids": "%"})


# The policy.


def request(rng: np.random.Generator, number: int = 0, kind: int | None = None) -> DecodeRequest:
    weights = np.zeros((LAYERS, EXPERTS))
    if kind is not None:
        weights[:, 2 * kind : 2 * kind + 2] = 4
    counts = np.zeros((LAYERS, EXPERTS), np.uint32)
    for layer, chosen in enumerate(draw(rng, weights, 10, TOP_K).swapaxes(0, 1)):
        counts[layer] = np.bincount(chosen.reshape(-1), minlength=EXPERTS)
    return DecodeRequest(f"r{number}", 10, ExpertCounts(counts, 10, TOP_K))


def policy_with(workers: str, calibration: None = None, remember: int = 64, **options: Any) -> LocalityBand:
    policy = LocalityBand(calibration or make_calibration(3), remember=remember, **options)
    for worker in workers:
        policy.joined(worker)
    assert isinstance(policy, LocalityBand)
    return policy


def test_without_memory_nothing_is_fitted() -> None:
    rng = np.random.default_rng(0)
    policy = policy_with("ab", remember=0)
    policy.choose(request(rng), {"a": 0})
    assert policy.signatures_seen == 0
    assert policy.refit_task(10) is None
    assert make_policy("jsq").refit_task(10) is None
    assert policy_of_options(PolicyOptions()).signatures_seen == 0
    assert policy_of_options(PolicyOptions(refit_interval_s=1)).signatures_seen == 1


def policy_of_options(options: PolicyOptions) -> LocalityBand:
    policy = make_policy("locality-band", options, calibration=make_calibration(3))
    policy.joined("a")
    policy.choose(request(np.random.default_rng(0)), {"a": 0})
    assert isinstance(policy, LocalityBand)
    return policy


def test_a_task_needs_enough_signatures_and_two_workers() -> None:
    rng = np.random.default_rng(0)
    policy, alone = policy_with("ab"), policy_with("a")
    for number in range(2 * LEAST_PER_ZONE - 1):
        policy.choose(request(rng, number), {"a": 0})
        alone.choose(request(rng, number), {"a": 0})
    assert policy.refit_task(100) is None
    policy.choose(DecodeRequest("none", 10), {"a": 0})  # without counts there is no signature
    assert policy.refit_task(100) is None
    policy.choose(request(rng), {"a": 0})
    assert len(policy.refit_task(100).codes) == 2 * LEAST_PER_ZONE
    for number in range(100):
        policy.choose(request(rng, number), {"a": 0})
        alone.choose(request(rng, number), {"a": 0})
    assert alone.refit_task(100) is None
    assert len(policy.refit_task(0).codes) == 2 * WANTED_PER_ZONE  # a quiet window is filled up with older ones
    assert len(policy.refit_task(50).codes) == 50
    assert len(policy.refit_task(500).codes) == 64


def served_by(policy: LocalityBand, workers: str, rng: np.random.Generator) -> list[str]:
    """Worker that a request of each of three kinds goes to, with nobody running anywhere."""
    return [policy.choose(request(rng, 0, kind), dict.fromkeys(workers, 0)).worker for kind in range(3)]


def test_a_refit_gives_each_kind_a_worker_and_keeps_it_there() -> None:
    rng = np.random.default_rng(0)
    policy = policy_with("abc", tau=0.0, remember=300)
    for number in range(150):
        policy.choose(request(rng, number, number % 3), dict.fromkeys("abc", 0))
    policy.refitted(policy.refit_task(150).run())
    first = served_by(policy, "abc", rng)
    assert sorted(first) == ["a", "b", "c"]
    for number in range(150):
        policy.choose(request(rng, number, number % 3), dict.fromkeys("abc", 0))
    policy.refitted(policy.refit_task(150).run())
    assert served_by(policy, "abc", rng) == first


def test_the_fleet_may_change_while_a_fit_runs() -> None:
    rng = np.random.default_rng(0)
    policy = policy_with("abc", tau=0.0, remember=300)
    for number in range(150):
        policy.choose(request(rng, number, number % 3), dict.fromkeys("abc", 0))
    task = policy.refit_task(150)
    policy.left("b")
    policy.joined("d")
    policy.joined("e")
    policy.refitted(task.run())
    assert sorted(served_by(policy, "acd", rng)) == ["a", "c", "d"]  # d has taken the zone that nobody had
    assert policy.refit_task(150).workers == ("a", "c", "d", "e")
    policy.refitted(policy.refit_task(150).run())
    for worker in "acde":
        assert policy.choose(request(rng, 0, 0), {worker: 0}).worker == worker
        policy.left(worker)
    policy.joined("f")
    assert policy.choose(request(rng, 0, 0), {"f": 0}).worker == "f"


def test_zones_of_another_geometry_are_refused_and_change_nothing() -> None:
    rng = np.random.default_rng(0)
    policy = policy_with("abc", tau=0.0)
    before = served_by(policy, "abc", np.random.default_rng(1))
    with pytest.raises(ValueError, match="zones have 5 entries"):
        policy.refitted(Refit(("a", "b"), units(rng, 2, 5).astype(np.float16)))
    assert served_by(policy, "abc", np.random.default_rng(1)) == before


@pytest.mark.parametrize("options", [{"refit_interval_s": 0}, {"refit_interval_s": np.nan}, {"refit_window_s": 0}])
def test_bad_intervals_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=next(iter(options))):
        PolicyOptions(**options)


def test_refits_are_repeated_from_the_log() -> None:
    rng = np.random.default_rng(0)
    options = PolicyOptions(tau=0.05, refit_interval_s=1)
    calibration = make_calibration(3)
    events = [LogHeader("locality-band", 0, options).to_wire()]
    logged = LoggedPolicy(make_policy("locality-band", options, calibration=calibration), events.append)
    for worker in "abc":
        logged.joined(worker)
    for number in range(200):
        logged.choose(request(rng, number, number % 3), {"a": number % 4, "b": number % 5, "c": number % 3})
        if number in (60, 120):
            logged.refitted(logged.refit_task(50).run())
    lines = [Line("log", number, json.dumps(event).encode()) for number, event in enumerate(events, 1)]

    def make(header: LogHeader) -> Policy:
        return make_policy(header.policy, header.options, calibration=calibration, seed=header.seed)

    assert repeat_decisions(lines, make).equal
    without = [line for line in lines if b'"refit"' not in line.text]
    assert not repeat_decisions(without, make).equal
    broken = [*lines[:100], Line("log", 101, b'{"event":"refit","workers":["a"],"centroids":"AAAA"}')]
    with pytest.raises(Exception, match="line 101: not an event"):
        repeat_decisions(broken, make)


# The replay.


def test_replayed_refits_change_choices_and_repeat_themselves() -> None:
    trace = make_trace(requests=150, layers=3, experts=16, kinds=3, steps=30)
    laboratory = Laboratory(trace, Settings(requests=400))
    runs = {}
    for name in ("locality-band", "locality-band-refit"):
        runs[name] = [laboratory.run(name, 3, 60.0, 2.0, seed=0).worker.tolist() for _ in range(2)]
        assert runs[name][0] == runs[name][1]
    assert runs["locality-band"] != runs["locality-band-refit"]
    policy = LocalityBand(fit_calibration(trace, 3))
    assert laboratory.run_policy(policy, 3, 60.0, 2.0, seed=0).tpot_s.min() > 0
