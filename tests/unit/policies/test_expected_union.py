"""Expected-union routing against direct computations: unions from probabilities, state from its running requests."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eldr.activation import ActivationModel
from eldr.cost import CostError, CostModel, MoeLayerCost, RestCost
from eldr.counts import ExpertCounts
from eldr.policies import PolicyError, PolicyOptions
from eldr.policies.base import DecodeRequest
from eldr.policies.expected_union import GUARD_EXPERT_SHARE, ExpectedUnion
from eldr.policies.request_model import first_means
from eldr.policies.unions import Geometry, RandomBatches, encode_exposure
from eldr.policies.worker_costs import LearnedCost
from tests.synthetic import make_trace

LAYERS, EXPERTS, TOP_K = 3, 8, 2
MOE_ONLY = CostModel("test", "none", "made up", MoeLayerCost(100.0, 10.0, 1.0))


class Given(ExpectedUnion):
    """With the profile given in place of a prediction: the request's id is its row."""

    def __init__(self, profiles: NDArray[np.float32], **options: Any) -> None:
        super().__init__(cost=MOE_ONLY, scope="moe", **options)
        self.profiles = profiles

    def predict(
        self, request: DecodeRequest, counts: ExpertCounts, frequency: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        return self.profiles[int(request.request_id)]


def counts_of(seed: int = 0, tokens: int = 20) -> ExpertCounts:
    rng = np.random.default_rng(seed)
    counts = np.zeros((LAYERS, EXPERTS), dtype=np.uint32)
    for layer in range(LAYERS):
        for _ in range(tokens):
            counts[layer, rng.choice(EXPERTS, TOP_K, replace=False)] += 1
    return ExpertCounts(counts, tokens, TOP_K)


def counts_of_kind(kind: int, tokens: int = 20) -> ExpertCounts:
    counts = np.zeros((LAYERS, EXPERTS), dtype=np.uint32)
    counts[:, 2 * kind : 2 * kind + 2] = tokens
    return ExpertCounts(counts, tokens, TOP_K)


def request(identity: int, counts: ExpertCounts | None = None, tokens: int = 20) -> DecodeRequest:
    return DecodeRequest(str(identity), tokens, counts if counts is not None else counts_of())


def one_hot_profiles() -> NDArray[np.float32]:
    """Two kinds of request, on experts 0, 1 and on experts 2, 3 of every layer."""
    first = np.zeros((LAYERS, EXPERTS), dtype=np.float32)
    second = first.copy()
    first[:, :2] = 0.9
    second[:, 2:4] = 0.9
    return np.array([first.reshape(-1), second.reshape(-1)] * 50)


def placement_costs(policy: Given, asked: DecodeRequest, load: dict[str, int]) -> dict[str, float]:
    """What the request would cost on each worker of `load`; the policy chooses the least."""
    costs = policy.costs(asked, load)
    assert costs is not None
    assert costs[policy.choose(asked, load).worker] == min(costs.values())
    return costs


def test_similar_requests_share_a_worker() -> None:
    policy = Given(one_hot_profiles(), anchor=0)
    for worker in ("a", "b"):
        policy.joined(worker)
    policy.started(request(0), "a")
    policy.started(request(1), "b")
    load = {"a": 1, "b": 1}
    assert policy.choose(request(2), load).worker == "a"
    assert policy.choose(request(3), load).worker == "b"
    assert policy.choose(request(3), {"a": 1}).worker == "a"


def test_the_cost_is_the_one_of_its_definition() -> None:
    """T + dT + weight * B * dT, with U and dU from the probabilities themselves."""
    rng = np.random.default_rng(3)
    profiles = rng.uniform(0.02, 0.7, (9, LAYERS * EXPERTS)).astype(np.float32)
    policy = Given(profiles, anchor=0, others_weight=0.7, tail_guard=np.inf)
    for worker in ("a", "b", "c"):
        policy.joined(worker)
    placed = {"a": [0, 1, 2], "b": [3, 4], "c": [5, 6, 7]}
    for worker, rows in placed.items():
        for row in rows:
            policy.started(request(row), worker)
    load = {worker: len(rows) for worker, rows in placed.items()}
    costs = {}
    for worker, rows in placed.items():
        survival = np.prod(1 - profiles[rows].astype(np.float64), axis=0)
        step_s = (LAYERS * (100 + len(rows)) + 10 * (1 - survival).sum()) * 1e-6
        added_s = (LAYERS * 1 + 10 * (survival * profiles[8]).sum()) * 1e-6
        costs[worker] = step_s + added_s + 0.7 * len(rows) * added_s
    found = placement_costs(policy, request(8), load)
    # Probabilities are kept in one byte: up to half a step of 2 sqrt(p) / 255.
    assert found == pytest.approx(costs, rel=5e-3)
    assert policy.choose(request(8), load).worker == min(costs, key=costs.__getitem__)


def test_the_anchor_draws_a_request_to_where_its_kind_went() -> None:
    policy = Given(one_hot_profiles(), anchor=0.2)
    for worker in ("a", "b"):
        policy.joined(worker)
    for row in range(40):
        policy.started(request(row, counts_of_kind(row % 2)), "ab"[row % 2])
        policy.finished(request(row, counts_of_kind(row % 2)), "ab"[row % 2])
    for _ in range(5):  # without the anchor two idle workers tie, and the first wins
        assert policy.choose(request(41, counts_of_kind(1)), {"a": 0, "b": 0}).worker == "b"
        assert policy.choose(request(40, counts_of_kind(0)), {"a": 0, "b": 0}).worker == "a"


def test_the_anchor_looks_at_what_is_predicted() -> None:
    """Prompts that are all alike, of requests that are predicted to decode with experts of two kinds."""
    policy = Given(one_hot_profiles(), anchor=0.2)
    for worker in ("a", "b"):
        policy.joined(worker)
    for row in range(40):
        policy.started(request(row), "ab"[row % 2])
        policy.finished(request(row), "ab"[row % 2])
    assert policy.choose(request(41), {"a": 0, "b": 0}).worker == "b"
    assert policy.choose(request(40), {"a": 0, "b": 0}).worker == "a"


def test_a_calibration_of_other_traffic_gives_way() -> None:
    """The fleet's mean and spread are those of the requests served, not of those that were recorded."""
    trace = make_trace(requests=40, layers=LAYERS, experts=EXPERTS)
    model = ActivationModel.fit(trace.prefill_counts, trace.prompt_tokens, trace.decode_profiles(), TOP_K)
    means = first_means(Geometry(LAYERS, EXPERTS), TOP_K, model, None, 1.0)
    assert means.spread == model.spread
    rng = np.random.default_rng(0)
    served = rng.dirichlet(np.ones(EXPERTS) * 0.1, (300, LAYERS)).reshape(300, -1).astype(np.float32) * TOP_K
    for frequency in served:
        means.move(frequency, frequency)
    # 20 of 320 requests are the calibration's.
    expected = (20 * model.mean_frequency + served.sum(axis=0)) / 320
    assert means.frequency == pytest.approx(expected, abs=1e-4)
    spread = float(((served - served.mean(axis=0)) ** 2).sum(axis=1).mean())
    assert means.spread == pytest.approx((20 * model.spread + 300 * spread) / 320, rel=0.05)
    assert model.share(means.spread) == pytest.approx(model.trust * min(1, model.spread / means.spread))


def test_the_tail_guard_is_the_one_of_its_definition() -> None:
    """Steps longer than the mean by more than guard * (what locality saves + a share of expert time) are left out."""
    rng = np.random.default_rng(1)
    profiles = rng.uniform(0.02, 0.4, (12, LAYERS * EXPERTS)).astype(np.float32)
    profiles[:6, : LAYERS * EXPERTS // 2] *= 2  # requests of two kinds
    placed = {"a": [0, 1, 2], "b": [6, 7], "c": [8, 9, 10]}
    load = {worker: len(rows) for worker, rows in placed.items()}
    left_out = []
    # Eight starts: the policy looks at the mean anew with the 1st, 2nd, 4th and 8th.
    assert sum(load.values()) == 8
    for guard in (0.0, 0.5, 1.0, 5.0):
        policy = Given(profiles, anchor=0, tail_guard=guard)
        for worker, rows in placed.items():
            policy.joined(worker)
            for row in rows:
                policy.started(request(row), worker)
        mean = profiles[np.concatenate(list(placed.values()))].astype(np.float64).mean(axis=0)
        longer_us, experts, at_random = [], [], []
        for rows in placed.values():
            with_it = (1 - np.prod(1 - profiles[[*rows, 11]].astype(np.float64), axis=0)).sum()
            experts.append(with_it)
            longer_us.append(LAYERS * (100 + len(rows) + 1) + 10 * with_it)
            at_random.append((1 - (1 - mean) ** (len(rows) + 1)).sum())
        saved_us = 10 * max(0.0, np.mean(at_random) - np.mean(experts))
        limit_us = np.mean(longer_us) + guard * (saved_us + GUARD_EXPERT_SHARE * 10 * np.mean(experts))
        found = placement_costs(policy, request(11), load)
        left_out.append(np.isinf(list(found.values())).tolist())
        assert left_out[-1] == (np.array(longer_us) > limit_us).tolist()
    assert left_out[0] != left_out[-1]


def test_experts_of_random_batches() -> None:
    """Against the mean union of batches drawn at random."""
    rng = np.random.default_rng(6)
    profiles = rng.uniform(0.0, 0.6, (400, LAYERS * EXPERTS))
    random_batches = RandomBatches(Geometry(LAYERS, EXPERTS))
    random_batches.set_mean(profiles.mean(axis=0).astype(np.float32))
    for batch in (3, 1, 6):
        drawn = profiles[rng.integers(0, 400, (20_000, batch))]
        union = (1 - np.prod(1 - drawn, axis=1)).sum(axis=1).mean()
        assert random_batches.experts(batch)[[batch, 0]] == pytest.approx([union, 0.0], rel=2e-3)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_experts_of_a_step(ranks: int) -> None:
    """Whether their number divides that of the experts (8) or not."""
    rng = np.random.default_rng(7)
    profiles = rng.uniform(0.02, 0.7, (6, LAYERS * EXPERTS)).astype(np.float32)
    policy = Given(profiles, anchor=0, ranks=ranks, tail_guard=np.inf)
    placed = {"a": [0, 1], "b": [2, 3, 4]}
    for worker, rows in placed.items():
        policy.joined(worker)
        for row in rows:
            policy.started(request(row), worker)

    def share(rows: list[int]) -> float:
        return float((1 - np.prod(1 - profiles[rows].astype(np.float64), axis=0)).sum()) / ranks

    found = placement_costs(policy, request(5), {"a": 2, "b": 3})
    expected = {}
    for worker, rows in placed.items():
        step_us = LAYERS * (100 + len(rows)) + 10 * share(rows)
        added_us = LAYERS + 10 * (share([*rows, 5]) - share(rows))
        expected[worker] = (step_us + added_us + len(rows) * added_us) * 1e-6
    assert found == pytest.approx(expected, rel=5e-3)


def test_steps_of_several_tokens() -> None:
    """Twice the tokens of a step: probabilities of activating an expert in either, and twice the token's cost."""
    asked = request(0)
    assert asked.counts is not None
    frequency = (asked.counts.counts / asked.counts.prompt_tokens).astype(np.float32).reshape(-1)
    one, two = (ExpectedUnion(step_tokens=tokens).predict(asked, asked.counts, frequency) for tokens in (1.0, 2.0))
    assert two == pytest.approx(1 - (1 - one) ** 2, abs=1e-6)
    profiles = one_hot_profiles()
    for tokens in (1.0, 2.0):
        policy = Given(profiles, anchor=0, step_tokens=tokens)
        policy.joined("a")
        cost_us = LAYERS * (100 + 1 * tokens) + 10 * profiles[0].sum()
        assert placement_costs(policy, request(0), {"a": 0}) == {"a": pytest.approx(cost_us * 1e-6)}


def test_the_tail_guard_leaves_out_a_worker_whose_steps_are_long() -> None:
    """a runs three kinds, 540 us a step; b one other kind, 390 us. Kind 0 adds no expert to a, six to b.

    Placed on a its requests cost least: 543 + 20 * 3 against 450 + 10 * 60 us. But 543 us is above the mean.
    """
    profiles = np.zeros((4, LAYERS, EXPERTS), dtype=np.float32)
    for kind in range(4):
        profiles[kind, :, 2 * kind : 2 * kind + 2] = 0.98
    kinds = profiles.reshape(4, -1)[[0, 2, 3, 0] * 5 + [1] * 10 + [0]]
    for guard, chosen in ((np.inf, "a"), (0.01, "b")):
        policy = Given(kinds, anchor=0, tail_guard=guard)
        policy.joined("a")
        policy.joined("b")
        for row in range(30):
            policy.started(request(row), "a" if row < 20 else "b")
        assert policy.choose(request(30), {"a": 20, "b": 10}).worker == chosen
        assert policy.choose(request(30), {"a": 20}).worker == "a"


def test_the_tail_guard_lets_a_step_pass_that_was_usual_when_the_fleet_was_busy() -> None:
    """Kind 0 runs on a, kind 1 on b. A second request of kind 0 adds little to a, and a lot to b, which is shorter.

    The guard is closed: no step may be longer than the mean. But the fleet has just been much busier.
    """
    kinds = one_hot_profiles()
    load = {"a": 1, "b": 1}
    for busy, chosen in ((False, "b"), (True, "a")):
        slower = CostModel("slower", "none", "made up", MoeLayerCost(120.0, 10.0, 1.0))
        policy = Given(kinds, anchor=0, tail_guard=0.0, worker_costs={"a": slower})
        policy.joined("a")
        policy.joined("b")
        policy.started(request(0), "a")
        policy.started(request(1), "b")
        crowd = range(2, 50) if busy else range(0)
        for row in crowd:
            policy.choose(request(row), {"a": row // 2, "b": row // 2})
            policy.started(request(row), "ab"[row % 2])
        for row in crowd:
            policy.finished(request(row), "ab"[row % 2])
        assert policy.choose(request(50), load).worker == chosen


def test_unequal_hardware() -> None:
    slow = CostModel("slow", "none", "made up", MoeLayerCost(1000.0, 100.0, 10.0))
    policy = ExpectedUnion(cost=MOE_ONLY, scope="moe", worker_costs={"a": slow})
    policy.joined("a")
    policy.joined("b")
    policy.started(request(0), "b")
    assert policy.choose(request(1), {"a": 0, "b": 1}).worker == "b"


def test_a_learned_step_time_is_as_good_as_a_configured_one() -> None:
    """Whether it comes before the model is known or after, and after rows have moved."""
    slow = CostModel("slow", "none", "made up", MoeLayerCost(1000.0, 100.0, 10.0))
    configured = ExpectedUnion(cost=MOE_ONLY, scope="moe", worker_costs={"c": slow})
    early, late = (ExpectedUnion(cost=MOE_ONLY, scope="moe") for _ in range(2))
    learned = LearnedCost(slow.step_cost(LAYERS, "moe"), 10.0)
    for policy in (configured, early, late):
        for worker in ("gone", "b", "c"):
            policy.joined(worker)
        if policy is early:
            policy.cost_learned("c", learned)
        policy.started(request(0), "b")
        policy.left("gone")  # the last row takes its place
    late.cost_learned("c", learned)
    load = {"b": 1, "c": 0}
    wanted = configured.costs(request(1), load)
    assert early.costs(request(1), load) == wanted
    assert late.costs(request(1), load) == wanted
    for policy in (configured, early):
        policy.left("c")
        policy.joined("c")
    plain = ExpectedUnion(cost=MOE_ONLY, scope="moe")
    for worker in ("b", "c"):
        plain.joined(worker)
    plain.started(request(0), "b")
    assert early.costs(request(1), load) == plain.costs(request(1), load)
    assert configured.costs(request(1), load) == wanted


def test_what_it_expects_of_a_step() -> None:
    profiles = one_hot_profiles()
    policy = Given(profiles)
    for worker in ("a", "b"):
        policy.joined(worker)
    assert policy.expected_step("a") is None
    policy.started(request(0, tokens=30), "b")
    policy.started(request(1, tokens=50), "b")
    step = policy.expected_step("b")
    assert step is not None
    assert step.experts == pytest.approx(4 * LAYERS, rel=0.15)  # no probability is 1
    assert (step.layers, step.experts_per_layer, step.context_tokens) == (LAYERS, EXPERTS, 80)
    idle = policy.expected_step("a")
    assert idle is not None
    assert idle.experts == 0


def test_context_counts_in_the_step_time() -> None:
    rest = RestCost(1.0, 0.0, 1.0, 0.0, 0.5)
    policy = ExpectedUnion(cost=CostModel("test", "none", "made up", MoeLayerCost(1.0, 0.001, 0.0), rest))
    policy.joined("a")
    policy.joined("b")
    policy.started(DecodeRequest("0", 4000, counts_of()), "a")
    policy.started(DecodeRequest("1", 10, counts_of()), "b")
    assert policy.choose(request(2), {"a": 1, "b": 1}).worker == "b"


def test_without_usable_counts() -> None:
    policy = ExpectedUnion(cost=MOE_ONLY, scope="moe")
    policy.joined("a")
    policy.joined("b")
    bare = DecodeRequest("0", 20)
    assert policy.choose(bare, {"a": 1, "b": 0}).worker == "b"
    assert policy.choose(bare, {"a": 1, "b": 0}).reason == "no_signature"
    policy.started(bare, "b")
    policy.finished(bare, "b")
    policy.started(request(1), "a")
    assert policy.choose(bare, {"a": 1, "b": 0}).worker == "b"
    other = ExpertCounts(np.full((2, 4), 5, dtype=np.uint32), 10, 2)
    decision = policy.choose(DecodeRequest("2", 10, other), {"a": 1, "b": 0})
    assert decision.reason == "wrong_geometry"
    assert decision.worker == "b"


def test_a_predictor_sets_the_geometry() -> None:
    trace = make_trace(requests=40, layers=LAYERS, experts=EXPERTS)
    model = ActivationModel.fit(trace.prefill_counts, trace.prompt_tokens, trace.decode_profiles(), TOP_K)
    policy = ExpectedUnion(model)
    policy.joined("a")
    counts = ExpertCounts(trace.prefill_counts[0], int(trace.prompt_tokens[0]), TOP_K)
    assert policy.choose(DecodeRequest("0", 5, counts), {"a": 0}).reason == "expected_union"
    wrong = ExpertCounts(np.full((2, 4), 5, dtype=np.uint32), 10, 2)
    assert policy.choose(DecodeRequest("1", 10, wrong), {"a": 0}).reason == "wrong_geometry"


def state(policy: Given, worker: str) -> tuple[NDArray[np.uint32], NDArray[np.uint16], np.float64, int]:
    unions, row = policy.unions, policy.row(worker)
    return unions.exposure[row], unions.survival[row], unions.union[row], unions.context[row]


def assert_state_of(policy: Given, running: dict[str, list[int]]) -> None:
    """The state is bit for bit that of a policy that only ever heard of what runs now."""
    fresh = Given(policy.profiles)
    for worker, rows in running.items():
        fresh.joined(worker)
        for row in rows:
            fresh.started(request(row), worker)
    if fresh.unions is None:
        return
    for worker in running:
        for one, other in zip(state(policy, worker), state(fresh, worker), strict=True):
            assert np.array_equal(np.asarray(one), np.asarray(other))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["start", "finish", "join", "leave"]), st.integers(0, 1000)), max_size=60))
def test_the_state_is_exact_under_any_history(events: list[tuple[str, int]]) -> None:
    rng = np.random.default_rng(0)
    profiles = rng.uniform(0, 1, (64, LAYERS * EXPERTS)).astype(np.float32)
    policy = Given(profiles)
    policy.joined("w0")
    policy.started(request(63), "w0")
    running = {"w0": [63]}
    names, identities = 1, 0
    for kind, pick in events:
        workers = list(running)
        if kind == "join":
            policy.joined(f"w{names}")
            running[f"w{names}"] = []
            names += 1
        elif not workers:
            continue
        elif kind == "leave":
            worker = workers[pick % len(workers)]
            policy.left(worker)
            for row in running.pop(worker):
                policy.finished(request(row), worker)  # heard late, of a worker that is gone
        elif kind == "start":
            worker = workers[pick % len(workers)]
            policy.started(request(identities), worker)
            running[worker].append(identities)
            identities += 1
        else:
            busy = [worker for worker in workers if running[worker]]
            if busy:
                worker = busy[pick % len(busy)]
                policy.finished(request(running[worker].pop(pick % len(running[worker]))), worker)
    assert_state_of(policy, running)
    eligible = {worker: len(rows) for worker, rows in running.items()}
    if eligible:
        assert policy.choose(request(62), eligible).worker in eligible


def test_no_drift_in_a_million_events() -> None:
    rng = np.random.default_rng(1)
    profiles = rng.uniform(0, 1, (200, LAYERS * EXPERTS)).astype(np.float32)
    policy = Given(profiles)
    policy.joined("a")
    policy.started(request(0), "a")
    unions, row = policy.unions, policy.row("a")
    entries = [encode_exposure(profile) for profile in profiles]
    running: list[int] = []
    for pick in rng.integers(0, 200, 1_000_000).tolist():
        if len(running) > 100 or (running and pick < 100):
            unions.add(row, entries[running.pop(pick % len(running))], 7, -1)
        else:
            unions.add(row, entries[pick], 7, 1)
            running.append(pick)
    for pick in running:
        unions.add(row, entries[pick], 7, -1)
    assert_state_of(policy, {"a": [0]})


def test_choosing_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    policy = Given(rng.uniform(0, 1, (9, LAYERS * EXPERTS)).astype(np.float32))
    policy.joined("a")
    policy.joined("b")
    policy.started(request(0), "a")
    first = policy.choose(request(1), {"a": 1, "b": 0})
    for row in (2, 3, 4):
        policy.choose(request(row), {"a": 1, "b": 0})
    assert policy.choose(request(1), {"a": 1, "b": 0}) == first
    assert_state_of(policy, {"a": [0], "b": []})


@given(st.integers(0, 2**32 - 1))
def test_codes_are_near_their_probabilities(seed: int) -> None:
    profile = np.random.default_rng(seed).uniform(0, 1, 50).astype(np.float32)
    decoded = 1 - 0.02 ** ((encode_exposure(profile) / 255.0) ** 2)
    # Half a step of x = -log(1 - p), sqrt(x log 50) / 255, makes at most 0.0034 of p.
    assert np.abs(decoded - np.minimum(profile, 0.98)).max() <= 0.0035


def test_bad_weights_are_refused() -> None:
    with pytest.raises(PolicyError, match="others_weight is -1"):
        PolicyOptions(others_weight=-1.0)
    with pytest.raises(PolicyError, match="anchor is nan"):
        PolicyOptions(anchor=float("nan"))
    with pytest.raises(PolicyError, match="tail_guard is nan"):
        PolicyOptions(tail_guard=float("nan"))


def test_a_cost_without_the_rest_of_a_step_is_refused_before_anything_is_routed() -> None:
    with pytest.raises(CostError, match="covers only the MoE layers"):
        PolicyOptions(cost=MOE_ONLY)
    with pytest.raises(CostError, match="covers only the MoE layers"):
        PolicyOptions(worker_costs={"a": MOE_ONLY})
    assert PolicyOptions(cost=MOE_ONLY, cost_scope="moe").cost is MOE_ONLY
