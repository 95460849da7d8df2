"""Learning in the replay: nobody is predicted by a model that it has taught, and a stack of models is each of them."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest

from eldr.policies.base import Decision, DecodeRequest
from eldr.policies.expected_union import ExpectedUnion
from eldr.policies.learned import Learned
from eldr.policies.options import PolicyOptions
from eldr.prompt.fit import Choice, fit_prompt_model
from eldr.prompt.words import words_of_text
from eldr.replay.errors import ReplayError
from eldr.replay.experiment import Laboratory, Settings
from eldr.replay.learning import FOLDS, SimulatedLearning, StackedModels, deal
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


def request_of(trace: PackedTrace, index: int) -> DecodeRequest:
    assert trace.prompts is not None
    return DecodeRequest(f"0.{index}", 9, words=trace.prompts[index])


def taught_by_all(trace: PackedTrace) -> SimulatedLearning:
    learning = SimulatedLearning(ExpectedUnion(signature="prompt"), trace, 1.0, seed=0)
    for index in range(trace.requests):
        learning.finished(index)
    learning.advance(0.0)
    learning.advance(10.0)
    return learning


def test_nobody_is_predicted_by_a_model_that_it_has_taught() -> None:
    strangers = (3, 40, 77, 101, 120)
    trace = pack_trace(trace_with_strangers(strangers))
    learning = taught_by_all(trace)
    for index in range(trace.requests):
        request = request_of(trace, index)
        learning.look_at(request, index)
        assert request.words is None
        # All requests have taught, so a model that a stranger has taught would know its words.
        assert (request.latent is None) == (index in strangers)


def test_equal_prompts_are_on_one_side() -> None:
    texts = [f"question {'abcdefghij'[number % 10]} about ships".encode() for number in range(80)]
    prompts = [words_of_text(text) for text in texts]
    fold = deal(prompts, np.random.default_rng(0))
    assert set(fold.tolist()) == set(range(FOLDS))
    for number in range(10):
        assert len(set(fold[number::10].tolist())) == 1
    # Prompts that differ are spread evenly.
    many = [words_of_text(b"w" + bytes([97 + n // 26, 97 + n % 26])) for n in range(400)]
    assert set(np.bincount(deal(many, np.random.default_rng(1))).tolist()) == {400 // FOLDS}


def test_a_stack_of_models_predicts_what_each_of_them_would() -> None:
    rng = np.random.default_rng(5)
    trace = make_trace(requests=60, steps=24, seed=2, **prompts_of_kinds(60))
    words = [words_of_text(trace.prompt(request)) for request in range(60)]
    profiles = trace.decode_profiles().reshape(60, -1)
    models = []
    for rank in (3, 5, 4):
        chosen = rng.permutation(60)[:40].tolist()
        choice = Choice(0.1, False, rank, 0.5)
        models.append(fit_prompt_model([words[i] for i in chosen], profiles[chosen], 3, 2, choice=choice))
    stack = StackedModels([models[0], None, models[1], models[2]])
    for number, model in ((0, models[0]), (2, models[1]), (3, models[2])):
        for prompt in words:
            latent = stack.latent(number, prompt)
            assert latent is not None
            assert stack.profiles.profile(latent) == pytest.approx(model.predict(prompt), abs=1e-5)
    assert stack.latent(1, words[0]) is None
    assert stack.latent(0, words_of_text(b"unheard")) is None


class Spy(ExpectedUnion):
    """Notes how many requests were placed before each model."""

    def __init__(self) -> None:
        super().__init__(signature="prompt")
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


def test_a_policy_that_looks_at_counts_learns_nothing() -> None:
    lab = laboratory(signature="auto")
    rate = lab.rate_for_batch(3, 4)

    class Deaf(ExpectedUnion):
        def learned(self, learned: Learned) -> None:
            raise AssertionError

    lab.run_policy(Deaf(), 4, rate, 3, seed=0)


def test_words_are_asked_for_only_where_there_are_some() -> None:
    trace = make_trace()
    for settings in (Settings(options=PolicyOptions(signature="prompt")), Settings(learn="online")):
        with pytest.raises(ReplayError, match=r"no prompts.*--keep-prompts"):
            Laboratory(trace, settings)


def test_true_profiles_are_told_whatever_the_signature_is() -> None:
    lab = laboratory(learn="off")
    rate = lab.rate_for_batch(3, 4)
    first, second = (
        lab.with_options(signature=signature).run("expected-union-true", 4, rate, 3, 0, 100)
        for signature in ("prompt", "counts")
    )
    assert first.worker.tolist() == second.worker.tolist()
    assert first.active_experts_mean < lab.run("jsq", 4, rate, 3, 0, 100).active_experts_mean
