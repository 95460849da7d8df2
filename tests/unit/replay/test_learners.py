"""Learning in the replay: nobody is predicted by a model that it has taught, and a stack of models is each of them."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest

from eldr.policies.base import Decision, DecodeRequest
from eldr.policies.expected_union import ExpectedUnion
from eldr.policies.learned import Learned
from eldr.policies.options import PolicyOptions
from eldr.replay.errors import ReplayError
from eldr.replay.experiment import Laboratory, Settings
from eldr.replay.learning import FOLDS, SimulatedLearning, deal
from eldr.replay.packed import PackedTrace, pack_trace
from eldr.replay.split import Mix
from eldr.trace import Trace
from tests.synthetic import make_trace, packed, prompts_of_kinds

REQUESTS = 160


def trace_with_strangers(strangers: tuple[int, ...]) -> Trace:
    """A trace whose prompts tell the kinds apart, but for some that have all their words to themselves."""
    trace = make_trace(requests=REQUESTS, kinds=3, steps=24, seed=1, **prompts_of_kinds(REQUESTS))
    texts = [trace.prompt(request) for request in range(trace.requests)]
    for place, request in enumerate(strangers):
        texts[request] = " ".join("qxz"[place % 3] * 3 + chr(97 + place) + letter for letter in "abcde").encode()
    text, offsets = packed(texts)
    return dataclasses.replace(trace, prompt_text=text, prompt_text_offsets=offsets)


def trace_of(texts: list[bytes]) -> PackedTrace:
    text, offsets = packed(texts)
    return pack_trace(make_trace(requests=len(texts), steps=2, prompt_text=text, prompt_text_offsets=offsets))


def request_of(trace: PackedTrace, index: int) -> DecodeRequest:
    assert trace.prompts is not None
    return DecodeRequest(f"0.{index}", 9, words=trace.prompts[index])


def taught_by_all(policy: ExpectedUnion, trace: PackedTrace) -> SimulatedLearning:
    learning = SimulatedLearning(policy, trace, 1.0, seed=0)
    for index in range(trace.requests):
        learning.finished(index)
    learning.advance(0.0)
    learning.advance(10.0)
    return learning


def test_nobody_is_predicted_by_a_model_that_it_has_taught() -> None:
    strangers = (3, 40, 77, 101, 120)
    trace = pack_trace(trace_with_strangers(strangers))
    policy = ExpectedUnion(signature="prompt")
    policy.joined("a")
    learning = taught_by_all(policy, trace)
    for index in range(trace.requests):
        request = request_of(trace, index)
        learning.look_at(request, index)
        reason = policy.choose(request, {"a": 0}).reason
        # All requests have taught, so a model that a stranger has taught would know its words.
        assert reason == ("no_signature" if index in strangers else "expected_union_prompt")


def test_equal_prompts_are_on_one_side() -> None:
    texts = [f"question {'abcdefghij'[number % 10]} about ships".encode() for number in range(80)]
    fold = deal(trace_of(texts), np.random.default_rng(0))
    assert set(fold.tolist()) == set(range(FOLDS))
    for number in range(10):
        assert len(set(fold[number::10].tolist())) == 1
    # Prompts that differ are spread evenly.
    many = [b"w" + bytes([97 + n // 26, 97 + n % 26]) for n in range(400)]
    assert set(np.bincount(deal(trace_of(many), np.random.default_rng(1))).tolist()) == {400 // FOLDS}


class Spy(ExpectedUnion):
    """Notes how many requests were placed before each model."""

    def __init__(self, signature: str = "prompt") -> None:
        super().__init__(signature=signature)
        self.placed = 0
        self.models_after: list[int] = []
        self.known = 0

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        self.placed += 1
        decision = super().choose(request, in_flight)
        self.known += decision.reason == "expected_union_prompt"
        return decision

    def learned(self, learned: Learned) -> None:
        self.models_after.append(self.placed)
        super().learned(learned)


def laboratory(share: float = 1.0, signature: str = "prompt", learn: str = "online") -> Laboratory:
    trace = make_trace(requests=REQUESTS, kinds=3, steps=250, seed=1, **prompts_of_kinds(REQUESTS))
    options = PolicyOptions(signature=signature)
    mix = Mix(calibrate_fraction=0)
    return Laboratory(trace, Settings(requests=300, options=options, mix=mix, learn=learn, learn_share=share))


def spied(lab: Laboratory, batch: float = 3) -> tuple[Spy, int]:
    """A run's policy, and the number of requests that warmed the fleet up."""
    rate = lab.rate_for_batch(batch, 4)
    spy = Spy()
    lab.run_policy(spy, 4, rate, batch, seed=0)
    return spy, lab.workload(rate, 4 * batch, 0).measured.start


def test_the_warm_up_teaches_nothing() -> None:
    spy, warm_up = spied(laboratory(), batch=12)
    # The first fit takes 24 lessons, which are there before the warm-up is over.
    assert warm_up > 90
    assert spy.models_after[0] > warm_up + 24
    assert spy.known > 100


def test_few_reports_teach_later() -> None:
    often, _ = spied(laboratory())
    seldom, _ = spied(laboratory(share=0.25))
    assert often.models_after[0] < seldom.models_after[0]
    assert often.known > seldom.known


def test_a_policy_that_looks_at_counts_learns_what_they_lead_to() -> None:
    lab = laboratory(signature="auto")
    rate = lab.rate_for_batch(3, 4)
    told: list[Learned] = []

    class Told(ExpectedUnion):
        def learned(self, learned: Learned) -> None:
            told.append(learned)
            super().learned(learned)

    lab.run_policy(Told(), 4, rate, 3, seed=0)
    assert any(learned.activation is not None for learned in told)
    assert all(learned.profiles is None for learned in told), "nobody looks at words where there are counts"


def test_words_are_asked_for_only_where_there_are_some() -> None:
    trace = make_trace()
    with pytest.raises(ReplayError, match=r"no prompts.*--keep-prompts"):
        Laboratory(trace, Settings(options=PolicyOptions(signature="prompt")))
    Laboratory(trace, Settings(learn="online"))


def test_counts_are_learned_from_without_prompts() -> None:
    trace = make_trace(requests=REQUESTS, kinds=3, steps=250, seed=1)
    lab = Laboratory(trace, Settings(requests=200, mix=Mix(calibrate_fraction=0), learn="online"))
    rate = lab.rate_for_batch(3, 4)
    spy = Spy("counts")
    lab.run_policy(spy, 4, rate, 3, seed=0)
    assert spy.models_after


def test_true_profiles_are_told_whatever_the_signature_is() -> None:
    lab = laboratory(learn="off")
    rate = lab.rate_for_batch(3, 4)
    first, second = (
        lab.with_options(signature=signature).run("expected-union-true", 4, rate, 3, 0, 100)
        for signature in ("prompt", "counts")
    )
    assert first.worker.tolist() == second.worker.tolist()
    assert first.active_experts_mean < lab.run("jsq", 4, rate, 3, 0, 100).active_experts_mean
