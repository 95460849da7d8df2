"""Expected-union by the words of prompts: what is learned, what decides, and how it is written down."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from eldr.cost import CostModel, MoeLayerCost
from eldr.counts import ExpertCounts
from eldr.kernels import WORD_BUCKETS
from eldr.policies import PolicyOptions, make_policy
from eldr.policies.base import DecodeRequest
from eldr.policies.expected_union import ExpectedUnion
from eldr.policies.learned import Learned, decode_floats, encode_floats
from eldr.prompt.model import ProfileMap, PromptModel, WordTable
from eldr.prompt.words import Words

LAYERS, EXPERTS, TOP_K = 2, 8, 2
D = LAYERS * EXPERTS
FREE = {"a": 0, "b": 0}


def make_model(rank: int = 2, layers: int = LAYERS, experts: int = EXPERTS, seed: int = 0) -> PromptModel:
    """Word 0 leads to the first two experts of each layer, word 1 to the last two; others are unknown."""
    dimension = layers * experts
    weight, table = np.zeros(WORD_BUCKETS, np.float32), np.zeros((WORD_BUCKETS, rank), np.int8)
    weight[:2], table[0, 0], table[1, 1] = 1, 100, 100
    up = np.full((rank, layers, experts), -TOP_K / experts, dtype=np.float32)
    up[0, :, :2] = up[1, :, -2:] = 1 - TOP_K / experts
    return PromptModel(
        WordTable(weight, table, np.full(rank, 0.01, np.float32), np.zeros(rank, np.float32)),
        ProfileMap(np.full(dimension, TOP_K / experts, np.float32), up.reshape(rank, dimension), layers, TOP_K),
        *(0.1, True, 0.5, 50),
    )


def request(name: str, word: int | None = None, counts: ExpertCounts | None = None) -> DecodeRequest:
    words = None if word is None else Words(np.array([word], np.uint16), np.array([1], np.uint16))
    return DecodeRequest(name, 10, counts, words=words)


def counts_of(expert: int, experts: int = EXPERTS) -> ExpertCounts:
    found = np.zeros((LAYERS, experts), np.uint32)
    found[:, [expert, expert + 1]] = 10
    return ExpertCounts(found, 10, TOP_K)


def fleet(policy: ExpectedUnion) -> ExpectedUnion:
    for worker in FREE:
        policy.joined(worker)
    return policy


def learned(model: PromptModel) -> Learned:
    return Learned(model.profiles, model.words)


def place(policy: ExpectedUnion, asked: DecodeRequest, load: dict[str, int]) -> str:
    worker = policy.choose(asked, load).worker
    policy.started(asked, worker)
    asked.forget_counts()
    return worker


def test_requests_with_the_same_words_go_where_their_kind_is() -> None:
    policy = fleet(ExpectedUnion(signature="prompt", tail_guard=float("inf")))
    assert policy.choose(request("x", 0), FREE).reason == "no_signature"
    policy.learned(learned(make_model()))
    load = dict(FREE)
    where: dict[int, set[str]] = {0: set(), 1: set()}
    for number in range(8):
        word = number % 2
        asked = request(f"r{number}", word)
        decision = policy.choose(asked, load)
        assert decision.reason == "expected_union_prompt"
        policy.started(asked, decision.worker)
        load[decision.worker] += 1
        where[word].add(decision.worker)
    assert where[0] | where[1] == {"a", "b"}
    assert len(where[0]) == len(where[1]) == 1


def test_words_that_are_unknown_and_no_words_at_all_have_no_signature() -> None:
    policy = fleet(ExpectedUnion(prompts=make_model()))
    assert policy.choose(request("r1", 77), FREE).reason == "no_signature"
    assert policy.choose(request("r2"), FREE).reason == "no_signature"
    empty = DecodeRequest("r3", 10, words=Words(np.zeros(0, np.uint16), np.zeros(0, np.uint16)))
    assert policy.choose(empty, FREE).reason == "no_signature"


@pytest.mark.parametrize(
    ("signature", "with_counts", "wanted", "reason"),
    [
        ("auto", True, False, "expected_union"),
        ("auto", False, True, "expected_union_prompt"),
        ("counts", True, False, "expected_union"),
        ("counts", False, False, "no_signature"),
        ("prompt", True, True, "expected_union_prompt"),
        ("prompt", False, True, "expected_union_prompt"),
    ],
)
def test_what_a_signature_is_made_from(signature: str, with_counts: bool, wanted: bool, reason: str) -> None:
    policy = fleet(ExpectedUnion(prompts=make_model(), signature=signature))
    assert policy.wants_words(with_counts) is wanted
    asked = request("r", 0, counts_of(0) if with_counts else None)
    assert policy.choose(asked, FREE).reason == reason


def test_only_expected_union_wants_words() -> None:
    for name in ("jsq", "rr", "p2c", "random", "domain"):
        assert not make_policy(name, PolicyOptions(signature="prompt")).wants_words(False)
    assert make_policy("expected-union", PolicyOptions(signature="prompt")).wants_words(True)


@pytest.mark.parametrize("experts", [4, 16])
def test_a_model_of_other_experts_is_not_used(experts: int) -> None:
    policy = fleet(ExpectedUnion(signature="auto"))
    assert policy.choose(request("r1", counts=counts_of(0)), FREE).reason == "expected_union"
    policy.learned(learned(make_model(experts=experts)))
    assert policy.choose(request("r2", 0), FREE).reason == "no_signature"
    assert policy.choose(request("r3", counts=counts_of(0)), FREE).reason == "expected_union"
    policy.learned(learned(make_model()))
    assert policy.choose(request("r4", 0), FREE).reason == "expected_union_prompt"


def test_a_crowded_worker_gets_no_request_that_is_known_by_its_words_alone() -> None:
    """What was learned may be wrong, and a worker that is said to take requests for nothing would get them all."""
    policy = fleet(ExpectedUnion(prompts=make_model(), tail_guard=float("inf")))
    for number in range(6):
        policy.started(request(f"r{number}", 0), "a")
    policy.started(request("other", 1), "b")
    asked = request("next", 0)
    assert policy.choose(asked, {"a": 3, "b": 1}).worker == "a"
    assert policy.choose(asked, {"a": 6, "b": 1}).worker == "b"
    costs = policy.costs(asked, {"a": 6, "b": 1})
    assert costs is not None
    assert costs["a"] == float("inf") > costs["b"] > 0
    known = policy.costs(request("counted", counts=counts_of(0)), {"a": 6, "b": 1})
    assert known is not None
    assert max(known.values()) < float("inf"), "counts speak for themselves"
    assert policy.choose(asked, {"a": 6}).worker == "a"
    assert policy.choose(asked, {"a": 0, "b": 0}).worker == "a"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_request_that_is_known_by_its_words_is_never_free(ranks: int) -> None:
    """All experts that it needs are active already, but it is taken to add a quarter of what a random one would."""
    cost = CostModel("experts alone", "none", "made up", MoeLayerCost(0.0, 10.0, 0.0))
    options: dict[str, Any] = {"cost": cost, "scope": "moe", "anchor": 0, "tail_guard": float("inf"), "ranks": ranks}
    policy = fleet(ExpectedUnion(prompts=make_model(), **options))
    for number in range(3):
        policy.started(request(f"r{number}", 0), "a")
    found = policy.costs(request("next", 0), {"a": 3, "b": 3})
    assert found is not None
    assert policy.unions is not None
    union = float(policy.unions.union[0])
    assert union == pytest.approx(LAYERS * TOP_K, abs=0.2)
    inactive = (1 - TOP_K / EXPERTS) ** 3
    added = 0.25 * LAYERS * TOP_K * inactive
    # The newcomer and the three that are there wait for what is added, and the newcomer for what there is.
    assert found["a"] == pytest.approx(1e-5 * (union + (1 + 3) * added) / ranks, rel=1e-3)


def test_a_model_that_comes_between_choice_and_start_leaves_the_books_even() -> None:
    policy = fleet(ExpectedUnion(signature="prompt", prompts=make_model()))
    asked = request("r1", 0)
    worker = policy.choose(asked, FREE).worker
    policy.learned(learned(make_model(rank=5)))
    policy.started(asked, worker)
    policy.finished(asked, worker)
    other = request("r2", 1)
    policy.started(other, "a")  # without a choice, as after an error
    policy.finished(other, "a")
    assert policy.unions is not None
    assert policy.unions.union.tolist() == [0, 0]


def test_a_latent_of_another_model_is_not_used() -> None:
    policy = fleet(ExpectedUnion(prompts=make_model(rank=3)))
    asked = request("r")
    asked.latent = np.ones(2, np.float32)
    assert policy.choose(asked, FREE).reason == "no_signature"


def test_what_is_known_of_a_prompt_is_forgotten() -> None:
    policy = fleet(ExpectedUnion(prompts=make_model(), signature="prompt"))
    asked = request("r", 0, counts_of(0))
    policy.choose(asked, FREE)
    assert asked.latent is not None
    asked.forget_counts()
    for known in (asked.words, asked.latent, asked.counts, asked.counts_wire):
        assert known is None


# The wire form.


def test_every_bit_survives_the_wire() -> None:
    values: NDArray[np.float32] = np.array([0, -0.0, 1e-45, 1 / 3, 3e38, -1e-30], np.float32)
    assert decode_floats(encode_floats(values)).tobytes() == values.tobytes()
    for rank in (0, 1, 7):
        rng = np.random.default_rng(rank)
        profiles = ProfileMap(
            rng.random(D).astype(np.float32), rng.normal(size=(rank, D)).astype(np.float32), LAYERS, 2
        )
        wire = json.loads(json.dumps(Learned(profiles, make_model().words).to_wire()))
        found = Learned.from_wire(wire)
        assert found.words is None
        assert found.profiles is not None
        assert found.profiles.mean.tobytes() == profiles.mean.tobytes()
        assert found.profiles.up.tobytes() == profiles.up.tobytes()
        assert found.profiles.up.shape == (rank, D)
        assert (found.profiles.layers, found.profiles.top_k) == (LAYERS, 2)


def test_the_wire_has_no_words() -> None:
    wire = learned(make_model()).to_wire()
    assert set(wire["prompts"]) == {"layers", "top_k", "rank", "mean", "up"}
    assert wire["activation"] is None
    assert len(json.dumps(wire)) < 1000


Change = dict[str, Any]
LAYERS_GIVEN: list[Any] = [0, -1, 3, "2", None, True, 1.0]
TOP_KS: list[Any] = [0, -2, 9, "2", None, 1.5]
RANKS: list[Any] = [1, 3, "2", None]
MEANS: list[Any] = ["", "AAAA", "é", "!", None, 7, "AAAAAA=="]
UPS: list[Any] = ["", "AAAA", None, []]


@pytest.mark.parametrize(
    "change",
    [
        *({"layers": value} for value in LAYERS_GIVEN),
        *({"top_k": value} for value in TOP_KS),
        *({"rank": value} for value in RANKS),
        *({"mean": value} for value in MEANS),
        *({"up": value} for value in UPS),
    ],
)
def test_wire_forms_that_cannot_be_right_are_refused(change: Change) -> None:
    wire = learned(make_model()).to_wire()
    with pytest.raises((KeyError, TypeError, ValueError)):
        Learned.from_wire({**wire, "prompts": {**wire["prompts"], **change}})
