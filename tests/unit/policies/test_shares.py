"""Policies of several routers, told of one another's requests: the same state in all of them, whatever comes when."""

import json
from dataclasses import dataclass, field
from itertools import permutations
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray

from eldr.policies import make_policy
from eldr.policies.base import DecodeRequest, Policy
from eldr.policies.expected_union import ExpectedUnion
from eldr.policies.shares import Share
from eldr.policies.unions import decode_exposure, encode_exposure
from tests.unit.policies.test_expected_union import (
    EXPERTS,
    LAYERS,
    MOE_ONLY,
    Given,
    counts_of,
    counts_of_kind,
    one_hot_profiles,
)

WORKERS = ("a", "b", "c")
PROFILES = np.random.default_rng(4).uniform(0, 1, (80, LAYERS * EXPERTS)).astype(np.float32)


def router() -> Given:
    """A policy whose costs depend on unions, loads and waiting prompts alone."""
    return Given(PROFILES, anchor=0, tail_guard=np.inf)


def asked(row: int, computes_prompt: bool = False, tokens: int = 20, max_tokens: int | None = None) -> DecodeRequest:
    return DecodeRequest(str(row), tokens, counts_of(), max_tokens=max_tokens, computes_prompt=computes_prompt)


@dataclass(eq=False)
class Sent:
    """A request that one of the routers has sent to `worker`.

    computed, ended: whether its prompt was computed, and whether it has ended.
    """

    request: DecodeRequest
    worker: str
    share: Share
    computed: bool = False
    ended: bool = False


@dataclass(eq=False)
class Router:
    """One router: its policy, its workers, what it knows to run, and the news of others that are still on the way."""

    policy: Given
    workers: set[str] = field(default_factory=set)
    known: list[Sent] = field(default_factory=list)
    on_the_way: dict[Sent, list[str]] = field(default_factory=dict)

    def toggle(self, worker: str) -> None:
        self.workers ^= {worker}
        (self.policy.joined if worker in self.workers else self.policy.left)(worker)

    def deliver(self, sent: Sent) -> None:
        """The next news of a request arrives."""
        news = self.on_the_way[sent].pop(0)
        if news == "started":
            self.policy.elsewhere_started(sent.worker, sent.share)
            self.known.append(sent)
        elif news == "computed":
            self.policy.elsewhere_prompt_computed(sent.worker, sent.share)
        else:
            self.policy.elsewhere_finished(sent.worker, sent.share)
            self.known.remove(sent)


def recomputed(running: list[Sent], worker: str) -> tuple[NDArray[np.uint32], int]:
    """The exposure and the context of a worker, from what runs there."""
    exposure = np.zeros(LAYERS * EXPERTS, dtype=np.uint32)
    for sent in running:
        if sent.worker == worker:
            assert sent.share.codes is not None
            exposure += np.square(sent.share.codes.astype(np.uint32))
    return exposure, sum(sent.request.prompt_tokens for sent in running if sent.worker == worker)


def assert_state(policy: Given, workers: set[str], running: list[Sent]) -> None:
    unions = policy.unions
    assert unions is not None
    for worker in workers:
        row, (exposure, context) = policy.row(worker), recomputed(running, worker)
        assert unions.exposure[row].tolist() == exposure.tolist()
        assert unions.context[row] == context
        survival = 0.02 ** (exposure / 255.0**2)  # the largest code stands for a probability of 0.98
        assert unions.survival[row] == pytest.approx(65535 * survival, abs=1)
        assert unions.union[row] == pytest.approx(len(survival) - survival.sum(), abs=1e-3)


def router_of(running: list[Sent]) -> Given:
    """One that knows what runs now and nothing of what ran before."""
    policy = router()
    for worker in WORKERS:
        policy.joined(worker)
    for sent in running:
        policy.started(sent.request, sent.worker)
        if sent.computed:
            policy.prompt_computed(sent.request, sent.worker)
    return policy


def bits(policy: Given) -> dict[str, tuple[bytes, bytes, bytes, int]]:
    """The whole state of every worker, as bytes."""
    unions = policy.unions
    assert unions is not None
    state = {}
    for worker in WORKERS:
        row = policy.row(worker)
        arrays = (unions.exposure[row], unions.survival[row], unions.union[row])
        state[worker] = (*(array.tobytes() for array in arrays), unions.context[row])
    return state


PICKS = st.integers(0, 999)


class SeveralRouters(RuleBasedStateMachine):
    """Requests start and end at any router, and workers come and go. News is late, in any order that keeps a start
    before the other news of the same request.
    """

    @initialize(routers=st.integers(2, 4))
    def begin(self, routers: int) -> None:
        self.routers = [Router(router()) for _ in range(routers)]
        self.sent: list[Sent] = []
        self.origin: list[Router] = []
        self.all_seeing = router()
        for worker in WORKERS:
            self.all_seeing.joined(worker)

    def running(self) -> list[Sent]:
        return [sent for sent in self.sent if not sent.ended]

    def tell_others(self, sent: Sent, news: str) -> None:
        for listener in self.routers:
            if listener is not self.origin[self.sent.index(sent)]:
                listener.on_the_way.setdefault(sent, []).append(news)

    @rule(at=PICKS, worker=st.sampled_from(WORKERS))
    def worker_comes_or_goes(self, at: int, worker: str) -> None:
        self.routers[at % len(self.routers)].toggle(worker)

    @rule(at=PICKS, pick=PICKS, computes_prompt=st.booleans(), tokens=st.integers(1, 5000))
    def start(self, at: int, pick: int, computes_prompt: bool, tokens: int) -> None:
        origin = self.routers[at % len(self.routers)]
        if not origin.workers or len(self.sent) == len(PROFILES) - 1:
            return
        worker = sorted(origin.workers)[pick % len(origin.workers)]
        request = asked(len(self.sent), computes_prompt, tokens)
        for policy in (origin.policy, self.all_seeing):
            policy.started(request, worker)
        share = origin.policy.share(request, worker)
        assert share is not None
        sent = Sent(request, worker, share)
        self.sent.append(sent)
        self.origin.append(origin)
        origin.known.append(sent)
        self.tell_others(sent, "started")

    @rule(pick=PICKS)
    def prompt_is_computed(self, pick: int) -> None:
        waiting = [sent for sent in self.running() if sent.request.computes_prompt and not sent.computed]
        if waiting:
            sent = waiting[pick % len(waiting)]
            sent.computed = True
            for policy in (self.origin[self.sent.index(sent)].policy, self.all_seeing):
                policy.prompt_computed(sent.request, sent.worker)
            self.tell_others(sent, "computed")

    @rule(pick=PICKS)
    def finish(self, pick: int) -> None:
        if running := self.running():
            sent = running[pick % len(running)]
            sent.ended = True
            origin = self.origin[self.sent.index(sent)]
            origin.known.remove(sent)
            for policy in (origin.policy, self.all_seeing):
                policy.finished(sent.request, sent.worker)
            self.tell_others(sent, "finished")

    @rule(at=PICKS, pick=PICKS)
    def deliver(self, at: int, pick: int) -> None:
        listener = self.routers[at % len(self.routers)]
        waiting = [sent for sent, news in listener.on_the_way.items() if news]
        if waiting:
            listener.deliver(waiting[pick % len(waiting)])

    @rule(at=PICKS, pick=PICKS)
    def hear_twice(self, at: int, pick: int) -> None:
        """A start that is known already, or the end of a request that is not known to run, or no longer."""
        listener = self.routers[at % len(self.routers)]
        if heard := list(listener.on_the_way):
            sent = heard[pick % len(heard)]
            policy = listener.policy
            (policy.elsewhere_started if sent in listener.known else policy.elsewhere_finished)(sent.worker, sent.share)

    @invariant()
    def what_is_known_is_counted(self) -> None:
        for each in self.routers:
            if each.policy.unions is not None:
                assert_state(each.policy, each.workers, each.known)

    def teardown(self) -> None:
        for number, each in enumerate(self.routers):
            late = [sent for sent, news in each.on_the_way.items() for _ in news]
            Random(number).shuffle(late)
            for sent in late:
                each.deliver(sent)
            for worker in set(WORKERS) - each.workers:
                each.toggle(worker)
        # For a router that has sent nothing yet, this request is the first that tells it the model. Its prompt would
        # have to wait, and it makes one step, so what waits counts fully.
        newcomer = asked(len(PROFILES) - 1, computes_prompt=True, max_tokens=2)
        load = {worker: sum(sent.worker == worker for sent in self.running()) for worker in WORKERS}
        expected = router_of(self.running()).costs(newcomer, load)
        for each in (Router(self.all_seeing), *self.routers):
            assert each.policy.costs(newcomer, load) == expected
            assert_state(each.policy, set(WORKERS), self.running())
            assert bits(each.policy) == bits(self.all_seeing)


TestSeveralRouters = SeveralRouters.TestCase
TestSeveralRouters.settings = settings(deadline=None, max_examples=60, stateful_step_count=60)


def heard(policy: Policy, rows: dict[str, list[int]]) -> dict[str, list[Share]]:
    """Tell a policy of requests that another router sends to these workers. The request's number is its profile."""
    other = Given(one_hot_profiles())
    shares: dict[str, list[Share]] = {}
    for worker, numbers in rows.items():
        other.joined(worker)
        for row in numbers:
            other.started(asked(row), worker)
            share = other.share(asked(row), worker)
            assert share is not None
            policy.elsewhere_started(worker, share)
            shares.setdefault(worker, []).append(share)
    return shares


@pytest.mark.parametrize("order", list(permutations(["model", "shares", "workers"])))
def test_a_router_learns_from_the_requests_of_others(order: tuple[str, ...]) -> None:
    """It has placed nothing itself, and all workers are idle again: what is left are the directions of the anchor."""
    policy = Given(one_hot_profiles(), anchor=0.2)
    shares: dict[str, list[Share]] = {}
    for step in order:
        if step == "model":
            policy.joined("c")
            policy.choose(asked(0), {"c": 0})
        elif step == "workers":
            policy.joined("a")
            policy.joined("b")
        else:
            shares = heard(policy, {"a": list(range(0, 40, 2)), "b": list(range(1, 40, 2))})
    for worker, of_worker in shares.items():
        for share in of_worker:
            policy.elsewhere_finished(worker, share)
    for kind, worker in ((1, "b"), (0, "a")):
        for load in ({"a": 0, "b": 0}, {"b": 0, "a": 0}):
            assert policy.choose(DecodeRequest(str(40 + kind), 20, counts_of_kind(kind)), load).worker == worker


def test_the_mean_profile_is_that_of_all_routers() -> None:
    """A request of which nothing is known goes where the mean profile adds least: where the usual kind runs."""
    policy = Given(one_hot_profiles(), anchor=0, tail_guard=np.inf)
    for worker in ("a", "b", "c"):
        policy.joined(worker)
    policy.choose(asked(0), {"a": 0})
    heard(policy, {"c": list(range(0, 60, 2)), "a": [62], "b": [1]})  # all but one are of the first kind
    unknown = DecodeRequest("80", 20)
    assert policy.choose(unknown, {"a": 1, "b": 1}).worker == "a"
    policy.started(unknown, "a")
    share = policy.share(unknown, "a")
    assert share is not None
    assert not share.known
    assert share.codes is not None
    mean = decode_exposure(share.codes).reshape(LAYERS, EXPERTS)
    assert mean[:, 0] == pytest.approx(0.9 * 31 / 32, abs=0.02)
    assert mean[:, 2] == pytest.approx(0.9 / 32, abs=0.02)


def test_what_was_heard_is_learned_in_the_order_of_hearing() -> None:
    """Averages depend on it in their last bits, and so would a repeated log."""
    profiles = np.random.default_rng(8).uniform(0, 1, (60, LAYERS * EXPERTS)).astype(np.float32)
    found = []
    for seed in range(4):
        places = Random(seed).sample(range(60), 60)
        shares = {place: Share(encode_exposure(profiles[place]), 20, known=True) for place in places}
        policy = Given(profiles, anchor=0.2)
        for place in range(60):
            policy.elsewhere_started("a", shares[place])
        policy.joined("a")
        policy.joined("b")
        costs = [policy.costs(asked(row), {"a": 60, "b": 0}) for row in range(20)]
        found.append(costs)
    assert found[0] == found[1] == found[2] == found[3]


def test_requests_of_which_other_routers_know_nothing_teach_nothing() -> None:
    profile = encode_exposure(one_hot_profiles()[0])
    told, untold = Given(one_hot_profiles()), Given(one_hot_profiles())
    for policy in (told, untold):
        policy.joined("a")
        policy.started(asked(1), "a")
    heard = Share(profile, 20, known=False)
    told.elsewhere_started("a", heard)
    told.elsewhere_finished("a", heard)
    unknown = DecodeRequest("80", 20)
    for policy in (told, untold):
        policy.started(unknown, "a")
    codes = [share.codes for policy in (told, untold) if (share := policy.share(unknown, "a")) is not None]
    assert codes[0] is not None
    assert codes[1] is not None
    assert codes[0].tolist() == codes[1].tolist()


@pytest.mark.parametrize("codes", [None, np.zeros(LAYERS * EXPERTS + 1, dtype=np.uint8), np.zeros(0, dtype=np.uint8)])
def test_a_share_of_another_model_is_ignored(codes: NDArray[np.uint8] | None) -> None:
    policy = router()
    policy.joined("a")
    policy.started(asked(0), "a")
    before = policy.costs(asked(1), {"a": 1})
    share = Share(codes, 10**6, known=True)
    policy.elsewhere_started("a", share)
    policy.elsewhere_started("b", share)
    policy.joined("b")
    assert policy.costs(asked(1), {"a": 1}) == before
    policy.left("b")
    policy.elsewhere_finished("a", share)
    policy.elsewhere_finished("b", share)
    assert policy.costs(asked(1), {"a": 1}) == before


def test_codes_may_be_read_only() -> None:
    """As those of a message are, which are not copied."""
    policy = router()
    policy.joined("a")
    policy.choose(asked(0), {"a": 0})
    share = Share(np.frombuffer(bytes(range(LAYERS * EXPERTS)), dtype=np.uint8), 20, known=True)
    policy.elsewhere_started("a", share)
    assert policy.unions is not None
    assert policy.unions.exposure[0].tolist() == [code**2 for code in range(LAYERS * EXPERTS)]


def test_a_share_says_what_its_worker_has_to_compute() -> None:
    policy = ExpectedUnion(cost=MOE_ONLY, scope="moe")
    policy.joined("a")
    for counts in (None, counts_of()):  # the model is unknown, and then it is known
        request = DecodeRequest("0", 100, counts, computes_prompt=True, cached_tokens={"a": 64})
        policy.started(request, "a")
        share = policy.share(request, "a")
        assert share is not None
        assert (share.context_tokens, share.computes_prompt, share.uncached_tokens) == (100, True, 36)
        assert (share.codes is None, share.known) == (counts is None, counts is not None)
        policy.finished(request, "a")
        assert policy.share(request, "a") is None


@pytest.mark.parametrize("name", ["rr", "random", "p2c", "jsq", "prefix-affinity", "domain"])
def test_policies_that_look_at_the_load_alone_tell_no_profile(name: str) -> None:
    policy = make_policy(name)
    policy.joined("a")
    policy.started(asked(0, tokens=33), "a")
    share = policy.share(asked(0, tokens=33), "a")
    assert share is not None
    assert (share.codes, share.context_tokens, share.known, share.computes_prompt) == (None, 33, False, False)


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_decoded_codes_are_encoded_as_themselves(codes: list[int]) -> None:
    array = np.array(codes, dtype=np.uint8)
    assert encode_exposure(decode_exposure(array)).tolist() == codes


@given(
    st.none() | st.binary(max_size=40),
    st.integers(0, 2**40),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**40),
)
def test_a_share_survives_the_log(
    codes: bytes | None, context_tokens: int, known: bool, computes_prompt: bool, uncached_tokens: int
) -> None:
    array = None if codes is None else np.frombuffer(codes, dtype=np.uint8)
    share = Share(array, context_tokens, known, computes_prompt, uncached_tokens)
    found = Share.from_wire(json.loads(json.dumps(share.to_wire())))
    assert (None if found.codes is None else found.codes.tobytes()) == codes
    assert (found.context_tokens, found.known) == (context_tokens, known)
    assert (found.computes_prompt, found.uncached_tokens) == (computes_prompt, uncached_tokens)


@pytest.mark.parametrize("change", [{"codes": "?"}, {"codes": 3}, {"context_tokens": "7"}, {"uncached_tokens": None}])
def test_what_is_no_share(change: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError)):
        Share.from_wire(Share(None, 1).to_wire() | change)
