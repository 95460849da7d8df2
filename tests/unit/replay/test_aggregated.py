"""Aggregated serving against a plain simulator: one event per step, one loop over tokens' budgets, no runs of steps."""

import heapq
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.cost import StepCost
from eldr.policies import make_policy
from eldr.policies.base import DecodeRequest
from eldr.replay.engine import Engine
from eldr.replay.fleet import FleetSpec
from eldr.replay.packed import pack_trace
from eldr.replay.prompts import Prompts, RecordedPrompts
from eldr.replay.replicas import alone
from eldr.replay.worker import WorkerLimits
from eldr.replay.workload import Workload
from eldr.trace import Trace
from tests.synthetic import make_trace
from tests.unit.replay.test_engine import Listed

COST = StepCost(1e-3, 1e-4, 2e-4, 1e-6)
MOE = StepCost(5e-4, 1e-4, 1e-4)
BLOCK = 16


class PlainWorker:
    """One worker. It makes its steps one by one, and knows requests by their arrival."""

    def __init__(self, trace: Trace, requests: list[int], tokens: list[int], limits: WorkerLimits) -> None:
        self.trace, self.requests, self.tokens, self.limits = trace, requests, tokens, limits
        self.running: list[int] = []  # in order of admission, prompts and decodes alike
        self.waiting: list[int] = []
        self.to_compute: dict[int, int] = {}
        self.made: dict[int, int] = {}
        self.used: list[tuple[int, ...]] = []  # blocks of the cache, each as the chain up to its end
        self.busy = False

    def steps_of(self, arrival: int) -> int:
        offsets = self.trace.decode_offsets
        return int(offsets[self.requests[arrival] + 1] - offsets[self.requests[arrival]])

    def arrives(self, arrival: int, blocks: tuple[int, ...]) -> int:
        """Returns the tokens found in the cache."""
        chains = [blocks[: end + 1] for end in range(len(blocks))]
        found = 0
        while found < len(chains) and chains[found] in self.used and (found + 1) * BLOCK < self.tokens[arrival]:
            found += 1
        self.used = [chain for chain in self.used if chain not in chains] + chains[::-1]
        if self.limits.kv_tokens is not None:
            self.used = self.used[max(len(self.used) - self.limits.kv_tokens // BLOCK, 0) :]
        self.waiting.append(arrival)
        self.made[arrival] = 0
        self.to_compute[arrival] = self.tokens[arrival] - found * BLOCK
        return found * BLOCK

    def step(self) -> tuple[dict[int, int], float, float, int, int]:
        """Admits and plans a step. Returns (tokens of each prompt, experts, context, decodes, chunk's tokens)."""
        held = sum(self.tokens[arrival] + self.steps_of(arrival) for arrival in self.running)
        decodes = [arrival for arrival in self.running if not self.to_compute[arrival]]
        budget = self.limits.prefill_chunk - len(decodes)
        chunk = {}
        for arrival in self.running:
            if self.to_compute[arrival]:
                chunk[arrival] = min(budget, self.to_compute[arrival])
                budget -= chunk[arrival]
        while self.waiting and budget > 0 and len(self.running) < self.limits.max_num_seqs:
            arrival = self.waiting[0]
            held += self.tokens[arrival] + self.steps_of(arrival)
            if self.limits.kv_tokens is not None and held > self.limits.kv_tokens:
                break
            self.running.append(self.waiting.pop(0))
            chunk[arrival] = min(budget, self.to_compute[arrival])
            budget -= chunk[arrival]
        experts, meta = 0.0, self.trace.meta
        for layer in range(meta.layers):
            for expert in range(meta.experts):
                unused = 1.0
                for arrival in decodes:
                    request = self.requests[arrival]
                    row = self.trace.decode_experts[self.trace.decode_offsets[request] + self.made[arrival]]
                    unused *= expert not in row[layer]
                for arrival, tokens in chunk.items():
                    request = self.requests[arrival]
                    used = self.trace.prefill_counts[request, layer, expert] / self.trace.prompt_tokens[request]
                    for _ in range(tokens):
                        unused *= 1 - used
                experts += 1 - unused
        context = sum(self.tokens[arrival] + self.made[arrival] + 1 for arrival in decodes)
        context += sum(self.tokens[arrival] - self.to_compute[arrival] + tokens for arrival, tokens in chunk.items())
        return chunk, experts, context, len(decodes), sum(chunk.values())

    def stepped(self, chunk: dict[int, int]) -> tuple[list[int], list[int]]:
        """Returns the arrivals that had their first and their last token."""
        first, last = [], []
        for arrival in list(self.running):
            if arrival in chunk:
                self.to_compute[arrival] -= chunk[arrival]
                if not self.to_compute[arrival]:
                    first.append(arrival)
            else:
                self.made[arrival] += 1 if not self.to_compute[arrival] else 0
                if self.made[arrival] == self.steps_of(arrival):
                    last.append(arrival)
                    self.running.remove(arrival)
        return first, last


def simulate(
    trace: Trace,
    arrivals: list[float],
    requests: list[int],
    prompts: list[tuple[int, tuple[int, ...]]],
    placements: list[int],
    workers: int,
    limits: WorkerLimits,
) -> dict[str, Any]:
    """prompts: tokens and blocks by arrival."""
    fleet = [PlainWorker(trace, requests, [tokens for tokens, _ in prompts], limits) for _ in range(workers)]
    count = len(arrivals)
    first, finish, began, moe = [0.0] * count, [0.0] * count, [-1.0] * count, [0.0] * count
    cached, steps = [0] * count, []
    events: list[tuple[float, int, int, dict[int, int]]] = []

    def begin(worker: int, now: float) -> None:
        chunk, experts, context, decodes, computed = fleet[worker].step()
        fleet[worker].busy = bool(decodes or chunk)
        if not fleet[worker].busy:
            return
        for arrival in chunk:
            began[arrival] = now if began[arrival] < 0 else began[arrival]
        took = COST.base_s + COST.per_expert_s * experts + COST.per_token_s * (decodes + computed)
        took += COST.per_context_token_s * context
        moe_s = MOE.base_s + MOE.per_expert_s * experts + MOE.per_token_s * (decodes + computed)
        for arrival in fleet[worker].running:
            if arrival not in chunk and not fleet[worker].to_compute[arrival]:
                moe[arrival] += moe_s
        steps.append((took, decodes, computed, experts))
        heapq.heappush(events, (now + took, len(steps), worker, chunk))

    def until(time: float) -> None:
        while events and events[0][0] <= time:
            now, _, worker, chunk = heapq.heappop(events)
            had_first, had_last = fleet[worker].stepped(chunk)
            for arrival in had_first:
                first[arrival] = now
            for arrival in had_last:
                finish[arrival] = now
            begin(worker, now)

    for arrival, now in enumerate(arrivals):
        until(now)
        worker = placements[arrival]
        cached[arrival] = fleet[worker].arrives(arrival, prompts[arrival][1])
        if not fleet[worker].busy:
            begin(worker, now)
    until(float("inf"))
    return {"first": first, "finish": finish, "began": began, "moe": moe, "cached": cached, "steps": steps}


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    workers=st.integers(1, 2),
    arrivals=st.integers(1, 12),
    gap_s=st.sampled_from([1e-4, 3e-3, 2e-2]),
    max_num_seqs=st.sampled_from([1, 2, 8]),
    kv_tokens=st.sampled_from([None, 130, 300]),
    prefill_chunk=st.sampled_from([8, 13, 40, 1000]),
    own_lengths=st.booleans(),
)
def test_equals_a_step_by_step_simulation(
    seed: int,
    workers: int,
    arrivals: int,
    gap_s: float,
    max_num_seqs: int,
    kv_tokens: int | None,
    prefill_chunk: int,
    own_lengths: bool,
) -> None:
    rng = np.random.default_rng(seed)
    trace = make_trace(requests=12, layers=2, experts=20, top_k=3, seed=seed % 7, steps=15)
    arrival_s = np.cumsum(rng.exponential(gap_s, arrivals))
    requests = rng.permutation(12)[:arrivals].tolist()
    placements = rng.integers(0, workers, arrivals).tolist()
    limits = WorkerLimits(max_num_seqs, kv_tokens, prefill_chunk)
    # Prompts of some kinds, which begin alike.
    tokens, kinds = rng.integers(1, 110, arrivals), rng.integers(0, 3, arrivals)
    blocks = [
        tuple(range(100 * kind, 100 * kind + length // BLOCK)) for kind, length in zip(kinds, tokens, strict=True)
    ]
    prompts: Prompts | None = Prompts(RecordedPrompts(tokens, tuple(blocks)), block_tokens=BLOCK)
    prompts_of: list[tuple[int, tuple[int, ...]]] = list(zip(tokens.tolist(), blocks, strict=True))
    if own_lengths:
        prompts, prompts_of = None, [(int(trace.prompt_tokens[request]), ()) for request in requests]
    workload = Workload(arrival_s, np.array(requests), range(arrivals), aggregated=True, prompts=prompts)
    fleet = FleetSpec((COST,) * workers, (MOE,) * workers, limits)
    result = Engine(pack_trace(trace), workload, fleet, alone(Listed(placements))).run()
    expected = simulate(trace, arrival_s.tolist(), requests, prompts_of, placements, workers, limits)
    lengths = np.diff(trace.decode_offsets)[requests]
    first, finish = np.array(expected["first"]), np.array(expected["finish"])
    assert result.ttft_s == pytest.approx(first - arrival_s, rel=1e-9)
    assert result.request_s == pytest.approx(finish - arrival_s, rel=1e-9)
    assert result.tpot_s == pytest.approx((finish - first) / lengths, rel=1e-9)
    assert result.wait_s == pytest.approx(np.array(expected["began"]) - arrival_s, rel=1e-9, abs=1e-12)
    assert result.moe_tpot_s == pytest.approx(np.array(expected["moe"]) / lengths, rel=1e-9)
    assert result.cached_tokens.tolist() == expected["cached"]
    assert result.prompt_tokens.tolist() == [tokens for tokens, _ in prompts_of]
    steps = expected["steps"]
    assert result.steps == len(steps)
    assert result.tokens == sum(decodes for _, decodes, _, _ in steps) == lengths.sum()
    assert result.active_experts_mean == pytest.approx(np.mean([experts for *_, experts in steps]) / 2)
    with_chunk = sum(took for took, _, computed, _ in steps if computed)
    assert result.chunk_step_share == pytest.approx(np.mean([computed > 0 for _, _, computed, _ in steps]), abs=1e-12)
    assert result.chunk_time_share == pytest.approx(with_chunk / sum(took for took, *_ in steps), abs=1e-12)


class Hears(Listed):
    """Keeps what it hears of prompts."""

    def __init__(self, placements: list[int]) -> None:
        super().__init__(placements)
        self.asked: list[DecodeRequest] = []
        self.lengths: list[int | None] = []

    def choose(self, request: DecodeRequest, in_flight: Any) -> Any:
        self.asked.append(request)
        return super().choose(request, in_flight)

    def prompt_computed(self, request: DecodeRequest, worker: str) -> None:
        self.heard.append(("computed", request.request_id, worker))

    def finished(self, request: DecodeRequest, worker: str) -> None:
        super().finished(request, worker)
        self.lengths.append(request.generated_tokens)


def test_the_policy_hears_of_prompts() -> None:
    trace = make_trace(requests=4, layers=2, experts=16, seed=1, steps=9)
    tokens, blocks = np.array([40, 40, 40, 16]), ((1, 2), (1, 2), (1, 3), (1,))
    workload = Workload(
        np.array([0.0, 10.0, 20.0, 30.0]),
        np.arange(4),
        range(4),
        aggregated=True,
        prompts=Prompts(RecordedPrompts(tokens, blocks)),
    )
    policy = Hears([0, 1, 0, 1])
    Engine(pack_trace(trace), workload, FleetSpec((COST,) * 2, (MOE,) * 2), alone(policy)).run()
    for arrival in range(4):
        name, worker = f"{arrival}.{arrival}", f"w{arrival % 2}"
        assert policy.heard[3 * arrival : 3 * arrival + 3] == [
            (kind, name, worker) for kind in ("started", "computed", "finished")
        ]
    assert [request.cached_tokens for request in policy.asked] == [{}, {"w0": 32}, {"w0": 16, "w1": 16}, {}]
    assert all(request.computes_prompt for request in policy.asked)
    assert [request.prompt_tokens for request in policy.asked] == tokens.tolist()
    assert policy.lengths == (np.diff(trace.decode_offsets) + 1).tolist()


def test_without_aggregation_nothing_is_heard_of_prompts() -> None:
    trace = make_trace(requests=2, layers=2, experts=16, seed=1, steps=9)
    policy = Hears([0, 0])
    Engine(pack_trace(trace), Workload(np.array([0.0, 1.0]), np.arange(2), range(2)), FleetSpec((COST,), (MOE,)), alone(policy)).run()  # noqa: E501  # fmt: skip
    assert {kind for kind, *_ in policy.heard} == {"started", "finished"}
    assert all(request.cached_tokens is None and not request.computes_prompt for request in policy.asked)


@pytest.mark.parametrize("name", ["jsq", "prefix-affinity", "expected-union"])
def test_every_request_ends_under_every_policy(name: str) -> None:
    trace = make_trace(requests=40, layers=2, experts=16, seed=1, steps=9)
    workload = Workload(np.arange(40, dtype=np.float64) / 1000, np.arange(40), range(40), aggregated=True)
    fleet = FleetSpec((COST,) * 3, (MOE,) * 3, WorkerLimits(8, None, 16))
    result = Engine(pack_trace(trace), workload, fleet, alone(make_policy(name))).run()
    assert np.isfinite(result.request_s).all()
