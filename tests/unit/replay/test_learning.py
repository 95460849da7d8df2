"""Learning in simulated time: what true reports gain, what lies cost, and logs of it that can be repeated."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from eldr.calibration import fit_calibration
from eldr.cost import CostModel, MoeLayerCost, RestCost
from eldr.counts import ExpertCounts
from eldr.learning.learner import Learner
from eldr.learning.lessons import Asked, share_codes
from eldr.policies import PolicyOptions, make_policy
from eldr.policies.base import DecodeRequest
from eldr.policies.expected_union import ExpectedUnion
from eldr.policies.learned import Learned, decode_floats
from eldr.policies.load import ShortestQueue
from eldr.policies.logged import LoggedPolicy, LogHeader
from eldr.prompt.words import words_of_text
from eldr.replay.decisions import Line, repeat_decisions
from eldr.replay.engine import Engine
from eldr.replay.errors import ReplayError
from eldr.replay.experiment import Laboratory, Settings
from eldr.replay.learning import SimulatedLearning
from eldr.replay.measurements import RunResult
from eldr.replay.packed import PackedTrace
from eldr.replay.replicas import Replica, Replicas
from eldr.replay.split import Mix
from eldr.trace import Trace
from tests.synthetic import make_trace, packed, prompts_of_kinds

KINDS, WORKERS, BATCH = 6, 6, 8
# Steps of some 40 ms, as those of large models are, so that a fit of a second takes few of them.
COST = CostModel("slow", "none", "made up", MoeLayerCost(900.0, 300.0, 10.0), RestCost(1500.0, 0.1, 1800.0, 50.0, 0.07))
OPTIONS = PolicyOptions(signature="prompt", cost=COST)
RATE = 35.0
Report = Callable[[PackedTrace, int, ExpertCounts], ExpertCounts]


def make_laboratory(seed: int, marks: tuple[float, ...] = (), requests: int = 500) -> Laboratory:
    """marks: shares of words that prompts have many of, whatever kind they are of."""
    extra = prompts_of_kinds(600, KINDS, seed)
    if marks:
        ends, text = extra["prompt_text_offsets"].tolist(), extra["prompt_text"].tobytes()
        drawn = np.random.default_rng([seed, 2]).choice(len(marks), 600, p=np.divide(marks, sum(marks)))
        extra["prompt_text"], extra["prompt_text_offsets"] = packed(
            [
                text[ends[at] : ends[at + 1]] + b" mark" * 30 + b" " + b"xyzw"[mark : mark + 1] * 3
                for at, mark in enumerate(drawn)
            ]
        )
    trace = make_trace(requests=600, layers=4, experts=32, top_k=4, kinds=KINDS, seed=seed, steps=80, **extra)
    return Laboratory(trace, Settings(requests=requests, mix=Mix(0.0), options=OPTIONS, learn="online"))


class Reporting(SimulatedLearning):
    """Workers whose reports may be lies."""

    def __init__(self, policy: ExpectedUnion, trace: PackedTrace, seed: int, report: Report) -> None:
        super().__init__(policy, trace, 1.0, seed)
        self._made = report
        self._packed = trace

    def report(self, index: int) -> ExpertCounts:
        return self._made(self._packed, index, super().report(index))


def expected_union(seed: int, **more: Any) -> ExpectedUnion:
    return ExpectedUnion(**more, **OPTIONS.of_expected_union(), seed=seed)


def run(laboratory: Laboratory, policy: Any, seed: int, learning: SimulatedLearning | None = None) -> RunResult:
    workload = laboratory.workload(RATE, WORKERS * BATCH, seed)
    routers = Replicas([Replica(policy, None, learning)])
    return Engine(laboratory.packed, workload, laboratory.fleet(WORKERS), routers).run(None)


def change(laboratory: Laboratory, result: RunResult, seed: int, first: int = 0) -> float:
    """Of the mean TPOT, against join-shortest-queue, as a share, from this measured request on."""
    base = run(laboratory, ShortestQueue(seed), seed)
    return float(result.tpot_s[first:].mean() / base.tpot_s[first:].mean() - 1)


def taught(laboratory: Laboratory, seed: int, report: Report) -> tuple[RunResult, list[Learner]]:
    policy = expected_union(seed)
    learning = Reporting(policy, laboratory.packed, seed, report)
    return run(laboratory, policy, seed, learning), learning.learners


def truth(trace: PackedTrace, index: int, true: ExpertCounts) -> ExpertCounts:
    return true


def always(true: ExpertCounts, experts: Any) -> ExpertCounts:
    """All rows of a request chose the same experts, one set for all layers or one each."""
    counts = np.zeros_like(true.counts)
    counts[:, np.asarray(experts) % counts.shape[1]] = true.prompt_tokens
    return ExpertCounts(counts, true.prompt_tokens, true.top_k)


def kind_of(trace: PackedTrace, index: int) -> int:
    return int(trace.label[index].removeprefix("kind "))


def permuted(trace: PackedTrace, index: int, true: ExpertCounts) -> ExpertCounts:
    order = np.random.default_rng(kind_of(trace, index)).permutation(true.experts)
    return ExpertCounts(np.ascontiguousarray(true.counts[:, order]), true.prompt_tokens, true.top_k)


def all_the_same(trace: PackedTrace, index: int, true: ExpertCounts) -> ExpertCounts:
    return always(true, np.arange(true.top_k))


def one_hot(trace: PackedTrace, index: int, true: ExpertCounts) -> ExpertCounts:
    first = int(np.random.default_rng([index, true.prompt_tokens]).integers(true.experts))
    return always(true, first + np.arange(true.top_k))


def random(trace: PackedTrace, index: int, true: ExpertCounts) -> ExpertCounts:
    rng, counts = np.random.default_rng(index), np.zeros_like(true.counts)
    for layer in counts:
        for _ in range(true.prompt_tokens):
            layer[rng.permutation(true.experts)[: true.top_k]] += 1
    return ExpertCounts(counts, true.prompt_tokens, true.top_k)


def of_the_wrong_size(trace: PackedTrace, index: int, true: ExpertCounts) -> ExpertCounts:
    """One report in two is of half the experts."""
    if index % 2:
        return true
    return ExpertCounts(
        np.full((true.layers, true.top_k), true.prompt_tokens, np.uint32), true.prompt_tokens, true.top_k
    )


def by_the_mark(trace: PackedTrace, index: int, true: ExpertCounts) -> ExpertCounts:
    """Experts that follow from words that have nothing to do with the true ones: what a fit must believe."""
    assert trace.prompts is not None
    mark = next(at for at in range(4) if set(MARKS[at]) <= set(trace.prompts[index].buckets.tolist()))
    return always(true, mark * true.top_k + np.arange(true.top_k))


MARKS = [words_of_text(b"xyzw"[mark : mark + 1] * 3).buckets.tolist() for mark in range(4)]


def test_true_reports_reach_most_of_what_a_fitted_model_gains() -> None:
    for seed in range(2):
        laboratory = make_laboratory(seed)
        prompts = fit_calibration(laboratory.trace, WORKERS, compare=False, seed=seed).prompts
        fitted = change(laboratory, run(laboratory, expected_union(seed, prompts=prompts), seed), seed)
        result, learners = taught(laboratory, seed, truth)
        assert fitted < -0.15
        assert change(laboratory, result, seed, first=250) < 0.75 * fitted
        assert min(learner.r2 for learner in learners) > 0.8


def test_nothing_is_gained_and_nothing_lost_before_anything_is_known() -> None:
    laboratory = make_laboratory(0, requests=200)
    assert change(laboratory, run(laboratory, expected_union(0), 0), 0) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("lie", [permuted, all_the_same, one_hot, random])
def test_lies_cost_no_more_than_a_hundredth(lie: Report) -> None:
    found = []
    for seed in range(2):
        laboratory = make_laboratory(seed)
        result, _ = taught(laboratory, seed, lie)
        found.append(change(laboratory, result, seed))
    assert np.mean(found) < 0.01, found


def believing(laboratory: Laboratory, seed: int, report: Report) -> ExpectedUnion:
    """A policy that has learned from 200 reports before it serves."""
    policy, learner = expected_union(seed), Learner(seed=seed)
    trace = laboratory.packed
    assert trace.prompts is not None
    for index in range(200):
        learner.take(Asked(trace.prompts[index]), report(trace, index, trace.decode_counts(index)))
    task = learner.task()
    assert task is not None
    learned = learner.taught(task.run())
    assert learned is not None
    assert learner.r2 > 0.8, "it is believed"
    policy.learned(learned)
    return policy


@pytest.mark.parametrize("marks", [(1, 1), (1, 1, 1), (7, 3), (8, 4, 2, 1)])
def test_a_lie_that_is_believed_costs_little_and_the_truth_keeps_its_gain(
    marks: tuple[float, ...],
) -> None:
    """The lie says that steps hardly grow with requests that share a word. Without limits to what is believed it costs
    up to 15 %, and 30 % in longer runs, since some workers then run no request at all."""
    lies, truths = [], []
    for seed in range(2):
        laboratory = make_laboratory(seed, marks)
        lies.append(change(laboratory, run(laboratory, believing(laboratory, seed, by_the_mark), seed), seed))
        truths.append(change(laboratory, run(laboratory, believing(laboratory, seed, truth), seed), seed))
    assert np.mean(lies) < 0.03, lies
    assert np.mean(truths) < -0.25, truths


def by_counts(seed: int) -> ExpectedUnion:
    return ExpectedUnion(**OPTIONS.of_expected_union() | {"signature": "counts"}, seed=seed)


def half_true(trace: PackedTrace, index: int, true: ExpertCounts) -> ExpertCounts:
    """One layer in two is that of other kinds, so that the rest lends the lie some truth."""
    counts = true.counts.copy()
    counts[1::2] = counts[1::2][:, np.random.default_rng(kind_of(trace, index)).permutation(true.experts)]
    return ExpertCounts(np.ascontiguousarray(counts), true.prompt_tokens, true.top_k)


def test_true_reports_take_nothing_from_what_counts_gain() -> None:
    alone, learning = gains_by_counts(truth)
    assert np.mean(alone) < -0.25
    assert np.mean(learning) < np.mean(alone) + 0.01, (alone, learning)


@pytest.mark.parametrize("lie", [permuted, all_the_same, one_hot, random])
def test_reports_that_contradict_the_counts_of_prompts_change_nothing(lie: Report) -> None:
    alone, learning = gains_by_counts(lie)
    assert learning == alone


def test_half_a_lie_keeps_most_of_what_counts_gain() -> None:
    alone, learning = gains_by_counts(half_true)
    assert learning != alone, "it is believed"
    assert np.mean(learning) < 0.85 * np.mean(alone), (alone, learning)


def gains_by_counts(report: Report) -> tuple[list[float], list[float]]:
    """For two seeds, what a policy gains by counts alone, and what it gains if it learns from reports too."""
    alone, learning = [], []
    for seed in range(2):
        laboratory = make_laboratory(seed)
        alone.append(change(laboratory, run(laboratory, by_counts(seed), seed), seed))
        policy = by_counts(seed)
        taught = Reporting(policy, laboratory.packed, seed, report)
        learning.append(change(laboratory, run(laboratory, policy, seed, taught), seed))
    return alone, learning


def test_reports_of_the_wrong_size_are_left_out() -> None:
    laboratory = make_laboratory(0)
    result, learners = taught(laboratory, 0, of_the_wrong_size)
    assert change(laboratory, result, 0) < 0.01
    assert all(learner.lessons is not None for learner in learners)


def test_one_run_is_like_the_next() -> None:
    laboratory = make_laboratory(0, requests=150)
    one, other = (taught(laboratory, 0, truth)[0] for _ in range(2))
    assert one.tpot_s.tolist() == other.tpot_s.tolist()
    assert one.worker.tolist() == other.worker.tolist()


def test_policies_that_predict_nothing_are_not_taught() -> None:
    """No time is spent on fits that nobody uses, and the run is the same."""
    laboratory = make_laboratory(0, requests=150)
    plain = run(laboratory, ShortestQueue(0), 0)
    assert laboratory.run_policy(ShortestQueue(0), WORKERS, RATE, BATCH, 0).worker.tolist() == plain.worker.tolist()


class Noting(ExpectedUnion):
    """Counts what it is told."""

    told = 0

    def learned(self, learned: Learned) -> None:
        self.told += 1
        super().learned(learned)


def test_a_policy_without_a_fitted_model_is_not_measured_by_one() -> None:
    """A laboratory may have a calibration that this policy does not use. What is learned is all that it has."""
    trace = make_laboratory(0).trace
    laboratory = Laboratory(trace, Settings(requests=30, mix=Mix(0.5), options=OPTIONS, learn="online"))
    fitted = laboratory.calibration(WORKERS, 0)
    assert fitted is not None
    assert fitted.prompts is not None
    policy = Noting(**OPTIONS.of_expected_union())
    laboratory.run_policy(policy, WORKERS, RATE, BATCH, 0)
    assert policy.told > 0


# Decision logs.


@pytest.fixture(scope="module")
def trace() -> Trace:
    return make_trace(requests=90, layers=3, experts=16, kinds=3, seed=2, steps=40, **prompts_of_kinds(90))


def of_counts(counts: ExpertCounts) -> tuple[int, NDArray[np.uint8]]:
    return counts.prompt_tokens, share_codes(counts)


def record(policy: ExpectedUnion, trace: Trace, header: LogHeader, events: int = 260) -> list[str]:
    """A log of requests with and without counts, whose experts are learned from while workers come and go."""
    written = [header.to_wire()]
    logged = LoggedPolicy(policy, written.append)
    learner = Learner(seed=1)
    rng = np.random.default_rng(0)
    packed_trace = Laboratory(trace, Settings()).packed
    load: dict[str, int] = {}
    for worker in ("a", "b", "c"):
        logged.joined(worker)
        load[worker] = 0
    running: list[tuple[DecodeRequest, str, int]] = []
    for number in range(events):
        if number == 90:
            logged.joined("d")
            load["d"] = 0
        if running and rng.random() < 0.45:
            request, worker, at = running.pop(int(rng.integers(len(running))))
            logged.finished(request, worker)
            load[worker] -= 1
            learner.take(
                Asked(words_of_text(trace.prompt(at)), *of_counts(packed_trace.counts[at])),
                packed_trace.decode_counts(at),
            )
        task = learner.task()
        at = number % trace.requests
        counts = ExpertCounts(trace.prefill_counts[at], int(trace.prompt_tokens[at]), trace.meta.top_k)
        words = None if number % 13 == 0 else words_of_text(trace.prompt(at) if number % 7 else b"")
        request = DecodeRequest(f"r{number}", 10, counts if number % 3 == 0 else None, words=words)
        worker = logged.choose(request, dict(load)).worker
        new = None if task is None else learner.taught(task.run())
        if new is not None and number % 2:
            logged.learned(new)  # between a choice and its start
        worker = "a" if number % 17 == 0 else worker  # the policy is told of another one
        logged.started(request, worker)
        request.forget_counts()
        if new is not None and not number % 2:
            logged.learned(new)
        load[worker] += 1
        running.append((request, worker, at))
    return [json.dumps(event) for event in written]


@pytest.mark.parametrize("signature", ["auto", "prompt", "counts"])
def test_a_log_of_a_run_that_learns_is_repeated_to_the_last_choice(trace: Trace, signature: str) -> None:
    options = PolicyOptions(signature=signature)
    header = LogHeader("expected-union", 5, options)
    made = make_policy("expected-union", options, seed=5)
    assert isinstance(made, ExpectedUnion)
    lines = record(made, trace, header)
    events = [json.loads(line) for line in lines]
    chosen = [event for event in events if event["event"] == "choose"]
    by_words = sum(event.get("reason") == "expected_union_prompt" for event in chosen)
    learned = [event for event in events if event["event"] == "learned"]
    assert len(learned) >= 2
    assert all(event["activation"] for event in learned)
    assert (by_words > 50) is (signature != "counts")
    repetition = repeat_decisions(
        [Line("log", number, text.encode()) for number, text in enumerate(lines, 1)],
        lambda found: make_policy(found.policy, found.options, seed=found.seed),
    )
    assert repetition.equal
    assert repetition.decisions == len(chosen) == 260


def test_a_log_has_neither_words_nor_tables(trace: Trace) -> None:
    options = PolicyOptions(signature="prompt")
    lines = record(ExpectedUnion(signature="prompt", seed=5), trace, LogHeader("expected-union", 5, options))
    words = {word for request in range(trace.requests) for word in trace.prompt(request).decode().split()}
    assert len(words) > 50
    assert not words & {found for line in lines for found in re.findall('"([a-z]+)"', line)}
    dimension = trace.meta.layers * trace.meta.experts
    for event in map(json.loads, lines):
        if event["event"] == "learned":
            assert set(event) == {"event", "prompts", "activation"}
            model = event["prompts"]
            assert set(model) == {"layers", "top_k", "rank", "mean", "up"}
            assert len(decode_floats(model["up"])) == model["rank"] * dimension
            found = Learned.from_wire(json.loads(json.dumps(event))).activation
            assert found is not None
            assert len(found.slope) == dimension
        if event["event"] == "choose":
            assert "words" not in event
            assert event["latent"] is None or len(decode_floats(event["latent"])) <= 32


@pytest.mark.parametrize(
    "event",
    [
        {"event": "learned"},
        {"event": "learned", "layers": 0, "top_k": 1, "rank": 1, "mean": "AAAAAA==", "up": "AAAAAA=="},
        {"event": "learned", "layers": 1, "top_k": 1, "rank": 2, "mean": "AAAAAA==", "up": "AAAAAA=="},
        {"event": "learned", "layers": 1, "top_k": 1, "rank": 1, "mean": "????", "up": "AAAAAA=="},
    ],
)
def test_a_broken_model_in_a_log_is_named(event: dict[str, Any]) -> None:
    lines = [json.dumps(LogHeader("expected-union", 0, PolicyOptions()).to_wire()), json.dumps(event), "{}", "{}"]
    with pytest.raises(ReplayError, match="line 2: not an event"):
        repeat_decisions(
            [Line("log", number, text.encode()) for number, text in enumerate(lines, 1)],
            lambda header: make_policy(header.policy, header.options, seed=header.seed),
        )
