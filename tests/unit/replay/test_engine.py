"""The replay against a plain simulator: one event per decode step, Python sets, no bit tricks, no runs of steps."""

import dataclasses
import heapq
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.cost import StepCost
from eldr.policies import make_policy
from eldr.policies.base import Decision, DecodeRequest, Policy
from eldr.replay.engine import Engine
from eldr.replay.errors import ReplayError
from eldr.replay.fleet import FleetSpec
from eldr.replay.packed import pack_rows, pack_trace, union_rows
from eldr.replay.replicas import alone
from eldr.replay.worker import WorkerLimits
from eldr.replay.workload import Workload
from eldr.trace import Trace
from tests.synthetic import make_trace

COST = StepCost(1e-3, 1e-4, 2e-4, 1e-6)
MOE = StepCost(5e-4, 1e-4, 1e-4)


class Listed(Policy):
    """The worker of a list, arrival by arrival; keeps what it heard."""

    name = "listed"

    def __init__(self, placements: list[int]) -> None:
        self.placements = placements
        self.heard: list[Any] = []
        self.loads: list[Any] = []

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        self.loads.append(dict(in_flight))
        return Decision(f"w{self.placements[int(request.request_id.split('.')[0])]}", "listed")

    def started(self, request: DecodeRequest, worker: str) -> None:
        self.heard.append(("started", request.request_id, worker))

    def finished(self, request: DecodeRequest, worker: str) -> None:
        self.heard.append(("finished", request.request_id, worker))


def simulate(
    trace: Trace,
    arrivals: list[float],
    requests: list[int],
    placements: list[int],
    workers: int,
    cost: StepCost,
    limits: WorkerLimits,
) -> tuple[list[float], list[float], list[tuple[Any, ...]]]:
    """Finish time and experts of every step, step by step with sets.

    Returns (finish [n], start [n], list of (end time, batch size, distinct experts) of all steps).
    """
    rows = [
        [{(layer, int(e)) for layer in range(trace.meta.layers) for e in step[layer]} for step in
         trace.decode_experts[trace.decode_offsets[i] : trace.decode_offsets[i + 1]]]
        for i in range(trace.requests)
    ]  # fmt: skip
    batch: list[list[Any]] = [[] for _ in range(workers)]
    waiting: list[list[Any]] = [[] for _ in range(workers)]
    finish, start, steps = {}, {}, []
    events: list[Any] = []
    order = 0

    def begin(worker: int, now: float) -> None:
        nonlocal order
        while waiting[worker]:
            arrival = waiting[worker][0]
            need = int(trace.prompt_tokens[requests[arrival]]) + len(rows[requests[arrival]])
            held = sum(int(trace.prompt_tokens[requests[a]]) + len(rows[requests[a]]) for a, _ in batch[worker])
            if len(batch[worker]) >= limits.max_num_seqs:
                break
            if limits.kv_tokens is not None and held + need > limits.kv_tokens:
                break
            batch[worker].append((waiting[worker].pop(0), 0))
            start[arrival] = now
        if not batch[worker]:
            return
        union = set().union(*(rows[requests[a]][done] for a, done in batch[worker]))
        context = sum(int(trace.prompt_tokens[requests[a]]) + done + 1 for a, done in batch[worker])
        size = len(batch[worker])
        took = cost.base_s + cost.per_expert_s * len(union) + cost.per_token_s * size
        took += cost.per_context_token_s * context
        steps.append((now + took, size, len(union)))
        order += 1
        heapq.heappush(events, (now + took, order, worker))

    def step_ends(now: float, worker: int) -> None:
        batch[worker] = [(a, done + 1) for a, done in batch[worker]]
        for a, done in batch[worker]:
            if done == len(rows[requests[a]]):
                finish[a] = now
        batch[worker] = [(a, done) for a, done in batch[worker] if a not in finish]
        begin(worker, now)

    for arrival, now in enumerate(arrivals):
        while events and events[0][0] <= now:
            end, _, worker = heapq.heappop(events)
            step_ends(end, worker)
        worker = placements[arrival]
        waiting[worker].append(arrival)
        if not batch[worker]:
            begin(worker, now)
    while events:
        end, _, worker = heapq.heappop(events)
        step_ends(end, worker)
    count = len(arrivals)
    return [finish[a] for a in range(count)], [start[a] for a in range(count)], steps


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    workers=st.integers(1, 3),
    arrivals=st.integers(1, 14),
    gap_s=st.sampled_from([1e-4, 3e-3, 2e-2]),
    max_num_seqs=st.sampled_from([1, 2, 100]),
    kv_tokens=st.sampled_from([None, 45, 80]),
)
def test_equals_a_step_by_step_simulation(
    seed: int, workers: int, arrivals: int, gap_s: float, max_num_seqs: int, kv_tokens: int | None
) -> None:
    rng = np.random.default_rng(seed)
    trace = make_trace(requests=14, layers=2, experts=40, top_k=3, seed=seed % 7, steps=15)
    arrival_s = np.cumsum(rng.exponential(gap_s, arrivals))
    requests = rng.permutation(14)[:arrivals]
    placements = rng.integers(0, workers, arrivals).tolist()
    limits = WorkerLimits(max_num_seqs, kv_tokens)
    policy = Listed(placements)
    engine = Engine(
        pack_trace(trace),
        Workload(arrival_s, requests, range(arrivals)),
        FleetSpec((COST,) * workers, (MOE,) * workers, limits),
        alone(policy),
    )
    result = engine.run()
    finish, start, steps = simulate(trace, arrival_s.tolist(), requests.tolist(), placements, workers, COST, limits)
    lengths = np.diff(trace.decode_offsets)[requests]
    assert result.tpot_s == pytest.approx((np.array(finish) - arrival_s) / lengths, rel=1e-9)
    assert result.wait_s == pytest.approx(np.array(start) - arrival_s, rel=1e-9, abs=1e-12)
    counted = [(size, experts) for end, size, experts in steps if end >= arrival_s[0]]
    assert result.steps == len(counted)
    assert result.tokens == sum(size for size, _ in counted) == lengths.sum()
    assert result.active_experts_mean == pytest.approx(np.mean([experts for _, experts in counted]) / 2, rel=1e-12)
    assert result.batch_mean == pytest.approx(np.mean([size for size, _ in counted]))
    assert result.request.tolist() == requests.tolist()
    assert result.worker.tolist() == placements


def test_the_window_counts_its_own_steps_and_requests() -> None:
    trace = make_trace(requests=20, layers=2, experts=16, seed=1, steps=9)
    rng = np.random.default_rng(0)
    arrival_s = np.cumsum(rng.exponential(2e-3, 20))
    requests = rng.permutation(20)
    placements = rng.integers(0, 2, 20).tolist()
    workload = Workload(arrival_s, requests, range(5, 14))
    result = Engine(pack_trace(trace), workload, FleetSpec((COST,) * 2, (MOE,) * 2), alone(Listed(placements))).run()
    _, _, steps = simulate(trace, arrival_s.tolist(), requests.tolist(), placements, 2, COST, WorkerLimits())
    inside = [(size, experts) for end, size, experts in steps if arrival_s[5] <= end < arrival_s[14]]
    assert (result.steps, result.tokens) == (len(inside), sum(size for size, _ in inside))
    assert result.active_experts_mean == pytest.approx(np.mean([experts for _, experts in inside]) / 2)
    assert result.request.tolist() == requests[5:14].tolist()


def test_moe_time_of_a_request_is_that_of_its_own_steps() -> None:
    """Two requests, the second joins after the first's only shared steps are known by hand."""
    trace = make_trace(requests=2, layers=2, experts=16, seed=4, steps=6)
    workload = Workload(np.array([0.0, 1000.0]), np.array([0, 1]), range(2))
    result = Engine(pack_trace(trace), workload, FleetSpec((COST,), (MOE,)), alone(Listed([0, 0]))).run()
    # Alone every step activates top-k experts a layer.
    step_s = MOE.base_s + MOE.per_token_s + MOE.per_expert_s * 2 * trace.meta.top_k
    assert result.moe_tpot_s == pytest.approx([step_s, step_s])


def test_the_policy_hears_every_start_and_finish_and_the_true_load() -> None:
    trace = make_trace(requests=12, layers=2, experts=16, seed=1, steps=9)
    arrival_s = np.arange(12, dtype=np.float64) * 1e-3
    policy = Listed([0, 1] * 6)
    Engine(pack_trace(trace), Workload(arrival_s, np.arange(12), range(12)), FleetSpec((COST,) * 2, (MOE,) * 2), alone(policy)).run()  # noqa: E501  # fmt: skip
    started = [event[1:] for event in policy.heard if event[0] == "started"]
    finished = [event[1:] for event in policy.heard if event[0] == "finished"]
    assert [name for name, _ in started] == [f"{at}.{at}" for at in range(12)]
    assert sorted(started) == sorted(finished)
    open_now = {"w0": 0, "w1": 0}
    loads = iter(policy.loads)
    for kind, _, worker in policy.heard:
        if kind == "started":
            assert next(loads) == open_now
        open_now[worker] += 1 if kind == "started" else -1


def test_no_request_is_in_flight_twice() -> None:
    trace = make_trace(requests=6, layers=2, experts=16, seed=1, steps=9)
    trace = dataclasses.replace(trace)
    policy = Listed([0] * 30)
    wanted = np.array([0, 0, 1, 1, 2, 3, 4, 5, 0, 1] * 3)
    arrival_s = np.arange(30, dtype=np.float64) * 5e-3
    Engine(pack_trace(trace), Workload(arrival_s, wanted, range(30)), FleetSpec((COST,), (MOE,)), alone(policy)).run()
    running = set()
    for kind, identity, _ in policy.heard:
        index = identity.split(".")[1]
        if kind == "started":
            assert index not in running
            running.add(index)
        else:
            running.remove(index)


def test_a_load_beyond_the_trace_is_refused() -> None:
    trace = make_trace(requests=6, layers=2, experts=16, seed=1, steps=9)
    workload = Workload(np.arange(30, dtype=np.float64) * 1e-6, np.arange(30) % 6, range(30))
    with pytest.raises(ReplayError, match="needs more than the 6 requests"):
        Engine(pack_trace(trace), workload, FleetSpec((COST,), (MOE,)), alone(make_policy("jsq"))).run()


def test_a_request_larger_than_the_kv_cache_is_refused() -> None:
    trace = make_trace(requests=6, layers=2, experts=16, seed=1, steps=9)
    workload = Workload(np.array([0.0]), np.array([0]), range(1))
    fleet = FleetSpec((COST,), (MOE,), WorkerLimits(kv_tokens=4))
    with pytest.raises(ReplayError, match="a worker has only 4"):
        Engine(pack_trace(trace), workload, fleet, alone(make_policy("jsq"))).run()


@pytest.mark.parametrize(("layers", "experts", "top_k"), [(1, 3, 1), (3, 40, 4), (5, 64, 8), (2, 300, 7)])
def test_unions_hold_distinct_experts(layers: int, experts: int, top_k: int) -> None:
    rng = np.random.default_rng(layers)
    ids = rng.random((50, layers, experts)).argsort(axis=2)[..., :top_k].astype(np.uint16)
    words = pack_rows(ids, experts)
    sizes = np.bitwise_count(union_rows(words, [0, 20, 33], 9)).sum(axis=1)
    expected = [
        sum(len({int(e) for start in (0, 20, 33) for e in ids[start + step, layer]}) for layer in range(layers))
        for step in range(9)
    ]
    assert sizes.tolist() == expected
    assert np.bitwise_count(union_rows(words, [7], 2)).sum(axis=1).tolist() == [layers * top_k] * 2


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), workers=st.integers(1, 3), in_flight=st.integers(1, 6))
def test_a_closed_loop_is_the_open_one_whose_arrivals_follow_ends(seed: int, workers: int, in_flight: int) -> None:
    rng = np.random.default_rng(seed)
    trace = pack_trace(make_trace(requests=14, layers=2, experts=40, top_k=3, seed=seed % 7, steps=15))
    requests = rng.permutation(14)
    placements = rng.integers(0, workers, 14).tolist()
    fleet = FleetSpec((COST,) * workers, (MOE,) * workers)
    closed = Engine(
        trace, Workload(None, requests, range(14), in_flight=in_flight), fleet, alone(Listed(placements))
    ).run()
    ended_s = closed.arrival_s + closed.request_s
    assert (closed.arrival_s[:in_flight] == 0).all()
    for arrival in range(in_flight, 14):
        # It arrives when a request ends, and none could have arrived before.
        later_s = ended_s[:arrival] - closed.arrival_s[arrival]
        assert (np.abs(later_s) < 1e-9).any()
        assert (later_s > 1e-9).sum() < in_flight <= (later_s > -1e-9).sum()
    same = Engine(trace, Workload(closed.arrival_s, requests, range(14)), fleet, alone(Listed(placements))).run()
    assert same.tpot_s == pytest.approx(closed.tpot_s)
    assert (same.steps, same.tokens, same.active_experts_mean) == (
        closed.steps,
        closed.tokens,
        closed.active_experts_mean,
    )
