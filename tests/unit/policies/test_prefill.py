"""What expected-union charges for prompts that the workers compute, against a loop over chunks and requests."""

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.cost import CostModel, MoeLayerCost, RestCost
from eldr.counts import ExpertCounts
from eldr.kernels import FleetState, PrefillTerms
from eldr.policies.base import DecodeRequest
from eldr.policies.expected_union import ExpectedUnion
from eldr.policies.prefill import Backlog, OutputLength
from eldr.policies.shares import Share
from tests.unit.kernels.test_kernels import BOTH

LAYERS, EXPERTS, TOP_K = 2, 8, 2
COST = CostModel("test", "none", "made up", MoeLayerCost(100.0, 10.0, 1.0), RestCost(50.0, 0.5, 7.0, 1.0, 0.01))
STEP = COST.step_cost(LAYERS, "step")


def counts_of(kind: int, tokens: int = 50) -> ExpertCounts:
    counts = np.zeros((LAYERS, EXPERTS), dtype=np.uint32)
    counts[:, 2 * kind : 2 * kind + 2] = tokens
    return ExpertCounts(counts, tokens, TOP_K)


def asked(
    identity: str, tokens: int, cached: dict[str, int] | None = None, kind: int = 0, max_tokens: int | None = None
) -> DecodeRequest:
    return DecodeRequest(
        identity, tokens, counts_of(kind), max_tokens=max_tokens, computes_prompt=True, cached_tokens=cached
    )


def chunk_by_chunk(
    load: int, union: float, context: float, waiting: int, uncached: int, prompt_tokens: int, budget: int, weight: float
) -> float:
    """What is paid together, chunk by chunk: a decode step of the requests there takes `decode_s`."""
    room = max(budget - load, 1)

    def experts_s(tokens: int) -> float:
        missed = (1 - TOP_K / EXPERTS) ** tokens
        return STEP.per_expert_s * (LAYERS * EXPERTS - union) * (1 - missed)

    decode_s = STEP.step_s(union, load, context)
    first_token_s = own_s = 0.0
    left = waiting + uncached
    whole = min(left, room)
    while left > 0:  # every chunk is charged the experts of a full one, or of all that there is
        tokens = min(left, room)
        first_token_s += decode_s + STEP.per_token_s * tokens + experts_s(whole)
        left -= tokens
    left, whole, read_s = uncached, min(uncached, room), 0.0
    chunks = -(-uncached // room)
    for chunk in range(chunks):
        own_s += STEP.per_token_s * min(left, room) + experts_s(whole)
        left -= min(left, room)
        # The chunk reads what is there before it, and itself. Chunks count as equally long.
        read_s += STEP.per_context_token_s * (prompt_tokens - uncached + uncached / chunks * (chunk + 1))
    return first_token_s + read_s + weight * load * (own_s + read_s)


@settings(deadline=None)
@given(
    load=st.integers(0, 12),
    union=st.floats(0, LAYERS * EXPERTS),
    context=st.integers(0, 5000),
    waiting=st.integers(0, 900),
    uncached=st.integers(1, 900),
    cached=st.integers(0, 500),
    budget=st.sampled_from([4, 64, 2048]),
    weight=st.sampled_from([0.5, 1.0]),
)
@pytest.mark.parametrize("kernels", BOTH)
def test_the_price_is_the_one_of_its_definition(
    kernels: ModuleType,
    load: int,
    union: float,
    context: int,
    waiting: int,
    uncached: int,
    cached: int,
    budget: int,
    weight: float,
) -> None:
    """On the second of two workers, with a cost of its own from before."""
    columns = np.array(
        [[1.0, STEP.base_s], [1, STEP.per_expert_s], [1, STEP.per_token_s], [1, STEP.per_context_token_s]]
    )
    fleet = FleetState(columns, np.array([3.0, union]), [9, context], np.ones(2, np.float32))
    terms = PrefillTerms(LAYERS * EXPERTS, 1 - TOP_K / EXPERTS, budget, weight)
    out = np.array([1e9, 0.25])
    rows = np.array([0, 1])
    tokens = uncached + cached
    best = kernels.add_prefill(fleet, terms, rows, [1, load], [0, waiting], [1, uncached], tokens, 3.0, out)
    price = chunk_by_chunk(load, union, context, waiting, uncached, tokens, budget, weight)
    assert out[1] == pytest.approx(0.25 + 3 * price)
    assert out[0] > 1e9
    assert best == 1


def policy_of(*workers: str, **options: float) -> ExpectedUnion:
    options = {"prefill_weight": 1.0, **options}
    policy = ExpectedUnion(cost=COST, anchor=0.0, tail_guard=float("inf"), **options)  # type: ignore[arg-type]
    for worker in workers:
        policy.joined(worker)
    return policy


def test_a_cache_hit_outweighs_experts_if_it_saves_more() -> None:
    """Worker a runs the request's experts, worker b has its prompt."""

    def chosen(tokens: int, cached: int, output: int) -> str:
        policy = policy_of("a", "b")
        policy.started(DecodeRequest("0", 20, counts_of(0)), "a")
        policy.started(DecodeRequest("1", 20, counts_of(1)), "b")
        ended = asked("before", 1)
        ended.generated_tokens = output + 1
        policy.finished(ended, "a")
        request = asked("2", tokens, {"b": cached})
        return policy.choose(request, {"a": 1, "b": 1}).worker

    assert chosen(tokens=2000, cached=0, output=1000) == "a"
    assert chosen(tokens=2000, cached=1984, output=20) == "b"
    # 1,984 tokens save 8 ms of two requests, once. Experts of its own cost the two some 65 us more in every step.
    assert chosen(tokens=2000, cached=1984, output=1000) == "a"


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_the_cost_is_that_of_decoding_and_the_price_over_the_expected_steps(weight: float) -> None:
    policy, load = policy_of("a", "b", prefill_weight=weight), {"a": 2, "b": 1}
    for number, worker in enumerate("aab"):
        policy.started(DecodeRequest(str(number), 30, counts_of(number)), worker)
    plain = policy.costs(DecodeRequest("9", 400, counts_of(1)), load)
    priced = policy.costs(asked("9", 400, {"b": 160}, kind=1, max_tokens=51), load)
    assert plain is not None
    assert priced is not None
    unions = policy.unions
    assert unions is not None
    for worker, count, context, uncached in (("a", 2, 60, 400), ("b", 1, 30, 240)):
        union = float(unions.union[policy.row(worker)])
        price = chunk_by_chunk(count, union, context, 0, uncached, 400, 2048, 1.0)
        assert priced[worker] - plain[worker] == pytest.approx(weight * price / 50, abs=1e-12)


def test_prompts_that_wait_count_until_they_are_computed() -> None:
    policy, load = policy_of("a", "b"), {"a": 1, "b": 1}

    def price_s(worker: str) -> float:
        with_prompt, without = (
            policy.costs(asked("9", 100), load),
            policy.costs(DecodeRequest("9", 100, counts_of(0)), load),
        )
        assert with_prompt is not None
        assert without is not None
        return with_prompt[worker] - without[worker]

    nothing_waits = [price_s("a"), price_s("b")]
    policy.started(asked("0", 9000), "a")
    policy.started(asked("1", 100), "b")
    assert policy.choose(asked("9", 100), load).worker == "b"
    waiting = [price_s("a"), price_s("b")]
    policy.prompt_computed(asked("0", 9000), "a")
    assert price_s("a") < waiting[0]
    assert price_s("b") == waiting[1]
    policy.prompt_computed(asked("1", 100), "b")
    policy.finished(asked("0", 9000), "a")
    policy.finished(asked("1", 100), "b")
    # A request that ends before its prompt is computed leaves nothing behind either.
    policy.started(asked("2", 9000), "a")
    policy.finished(asked("2", 9000), "a")
    assert [price_s("a"), price_s("b")] == pytest.approx(nothing_waits)


def test_a_backlog_is_what_has_not_been_computed() -> None:
    backlog = Backlog()
    long, short, again = (Share(None, 200, False, True, uncached) for uncached in (100, 30, 7))
    backlog.add("a", long)
    backlog.add("a", short)
    backlog.add("b", again)
    assert backlog.tokens == {"a": 130, "b": 7}
    backlog.remove("a", long)
    backlog.remove("a", long)
    assert backlog.tokens == {"a": 30, "b": 7}
    backlog.remove("a", short)
    assert backlog.tokens == {"b": 7}  # nothing is kept of workers that may be gone
    backlog.remove("a", short)
    backlog.add("a", Share(None, 5, False, True, 5))
    assert backlog.tokens["a"] == 5


def test_the_expected_length_is_the_mean_of_those_that_ended() -> None:
    length = OutputLength()
    assert length.steps(None) == 200
    assert length.steps(11) == 10
    length.ended(None)
    length.ended(1)
    assert length.steps(None) == 200
    for tokens in (41, 61):
        length.ended(tokens)
    assert length.steps(None) == 50
    assert length.steps(1000) == 50
    assert length.steps(31) == 30
    assert length.steps(1) == 1
    for _ in range(5000):
        length.ended(11)
    assert length.steps(None) == pytest.approx(10, abs=0.1)


def test_an_unknown_model_falls_back_to_caches_and_load() -> None:
    policy = policy_of("a", "b")
    request = DecodeRequest("0", 100, computes_prompt=True, cached_tokens={"a": 64})
    decision = policy.choose(request, {"a": 2, "b": 0})
    assert (decision.worker, decision.reason) == ("b", "no_signature")
    assert policy.choose(request, {"a": 1, "b": 1}).worker == "a"
