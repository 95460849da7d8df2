"""The load balancers and the domain oracle, against their definitions."""

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.cost import CostModel, MoeLayerCost, StepCost
from eldr.policies import PolicyOptions, make_policy
from eldr.policies.base import DecodeRequest
from eldr.policies.domain import Domain
from eldr.policies.load import SPEED_POWER, PowerOfTwo, Random, RoundRobin, ShortestQueue
from eldr.policies.worker_costs import LearnedCost

REQUEST = DecodeRequest("r", 10)
ALL = [RoundRobin, Random, PowerOfTwo, ShortestQueue, Domain]


def labelled(label: str | None) -> DecodeRequest:
    return DecodeRequest("r", 10, label=label)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.integers(0, 50), min_size=1), st.sampled_from(ALL))
def test_only_eligible_workers_are_chosen(in_flight: Mapping[str, int], policy_class: type[Any]) -> None:
    policy = policy_class()
    for worker in [*in_flight, "full"]:
        policy.joined(worker)
    for label in (None, "a", "b", "c", "a"):
        assert policy.choose(labelled(label), in_flight).worker in in_flight


def test_round_robin_takes_turns_in_the_order_of_joining() -> None:
    policy = RoundRobin()
    order = []
    for _ in range(7):
        decision = policy.choose(REQUEST, {"a": 9, "b": 0, "c": 5})
        policy.started(REQUEST, decision.worker)
        order.append(decision.worker)
    assert order == ["a", "b", "c", "a", "b", "c", "a"]


def test_round_robin_skips_the_full_and_resumes() -> None:
    policy = RoundRobin()
    order = []
    for eligible in (["a", "b", "c"], ["a", "c"], ["a", "c"], ["a", "b", "c"], ["a", "b", "c"]):
        decision = policy.choose(REQUEST, dict.fromkeys(eligible, 0))
        policy.started(REQUEST, decision.worker)
        order.append(decision.worker)
    assert order == ["a", "c", "a", "b", "c"]


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.integers(0, 9).map(str), st.integers(0, 5), min_size=1), st.integers(0, 99))
def test_shortest_queue_is_shortest(in_flight: Mapping[str, int], seed: int) -> None:
    assert in_flight[ShortestQueue(seed).choose(REQUEST, in_flight).worker] == min(in_flight.values())


def test_shortest_queue_breaks_ties_evenly() -> None:
    policy = ShortestQueue(seed=5)
    picks = Counter(policy.choose(REQUEST, {"a": 1, "b": 1, "c": 2, "d": 1}).worker for _ in range(3000))
    assert set(picks) == {"a", "b", "d"}
    assert min(picks.values()) > 850  # 1000 expected, standard deviation 26


def test_power_of_two_frequencies() -> None:
    """Of 4 workers with loads 0 < 1 < 2 < 3 the pairs are equally likely: 3, 2, 1 and 0 of 6 pairs choose each."""
    policy = PowerOfTwo(seed=1)
    picks = Counter(policy.choose(REQUEST, {"a": 0, "b": 1, "c": 2, "d": 3}).worker for _ in range(6000))
    assert picks["d"] == 0
    for worker, expected in (("a", 3000), ("b", 2000), ("c", 1000)):
        assert abs(picks[worker] - expected) < 200
    assert policy.choose(REQUEST, {"only": 7}).worker == "only"


def test_random_is_uniform_and_repeatable() -> None:
    def draw(seed: int) -> list[str]:
        policy = Random(seed)
        return [policy.choose(REQUEST, {"a": 9, "b": 0}).worker for _ in range(2000)]

    assert draw(3) == draw(3) != draw(4)
    assert abs(draw(3).count("a") - 1000) < 150


class TestDomain:
    def make(self, workers: str, labels: list[str]) -> tuple[Domain, dict[str, int]]:
        policy = Domain(seed=0)
        for worker in workers:
            policy.joined(worker)
        idle = dict.fromkeys(workers, 0)
        for label in labels:  # the policy learns the labels in this order
            policy.choose(labelled(label), idle)
        return policy, idle

    def served_by(self, policy: Domain, idle: dict[str, int], label: str) -> set[str]:
        return {policy.choose(labelled(label), idle).worker for _ in range(200)}

    def test_more_workers_than_labels(self) -> None:
        policy, idle = self.make("abcde", ["x", "y"])
        assert self.served_by(policy, idle, "x") == {"a", "c", "e"}
        assert self.served_by(policy, idle, "y") == {"b", "d"}

    def test_more_labels_than_workers(self) -> None:
        policy, idle = self.make("ab", ["x", "y", "z"])
        assert self.served_by(policy, idle, "x") == self.served_by(policy, idle, "z") == {"a"}
        assert self.served_by(policy, idle, "y") == {"b"}

    def test_the_least_loaded_of_the_label_wins(self) -> None:
        policy, idle = self.make("abcd", ["x", "y"])
        decision = policy.choose(labelled("x"), {**idle, "a": 3, "c": 2})
        assert (decision.worker, decision.reason) == ("c", "label")

    @pytest.mark.parametrize(("label", "reason"), [(None, "no_label"), ("x", "label_full")])
    def test_falls_back_to_the_shortest_queue(self, label: str | None, reason: str) -> None:
        policy, _ = self.make("abcd", ["x", "y"])
        decision = policy.choose(labelled(label), {"b": 4, "d": 1})
        assert (decision.worker, decision.reason) == ("d", reason)

    def test_a_leaving_worker_hands_its_label_on(self) -> None:
        policy, idle = self.make("abc", ["x", "y", "z"])
        policy.left("a")
        del idle["a"]
        assert self.served_by(policy, idle, "x") == {"b"}

    def test_labels_without_end_do_not_grow_the_state(self) -> None:
        """The label is a header of the client: a hostile one may send a new label with every request."""
        policy, idle = self.make("abc", [])
        for number in range(5000):
            policy.choose(labelled(f"label-{number}"), idle)
        assert policy.known_labels <= 1024
        assert policy.choose(labelled("one more"), idle).reason == "too_many_labels"


def test_policies_do_not_touch_the_global_random_state() -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    for policy_class in (Random, PowerOfTwo, ShortestQueue, Domain):
        policy_class().choose(REQUEST, {"a": 1, "b": 1})
    assert random.random() == expected


def learned(relative: float) -> LearnedCost:
    return LearnedCost(StepCost(1.0, 1.0, 1.0), relative)


def test_queues_weighed_by_speed_prefer_the_fast() -> None:
    policy = make_policy("jsq-speed")
    for worker in ("a", "b", "c"):
        policy.joined(worker)
    policy.cost_learned("b", learned(2.0))
    weight = 2.0**SPEED_POWER
    # One more request on "a" is as good as one on "b" while its queue is shorter than 2^power.
    assert policy.choose(REQUEST, {"a": int(weight) - 2, "b": 0}).worker == "a"
    assert policy.choose(REQUEST, {"a": int(weight), "b": 0}).worker == "b"
    policy.left("b")
    policy.joined("b")
    assert policy.choose(REQUEST, {"a": 1, "b": 0}).worker == "b"


def test_queues_weighed_by_configured_speeds() -> None:
    options = PolicyOptions(
        cost=CostModel("one", "none", "made up", MoeLayerCost(10.0, 1.0, 0.0)),
        worker_costs={"slow": CostModel("two", "none", "made up", MoeLayerCost(20.0, 2.0, 0.0))},
        cost_scope="moe",
    )
    policy = make_policy("jsq-speed", options)
    for worker in ("slow", "fast"):
        policy.joined(worker)
    assert policy.choose(REQUEST, {"slow": 0, "fast": int(2**SPEED_POWER) - 2}).worker == "fast"
    assert policy.choose(REQUEST, {"slow": 0, "fast": int(2**SPEED_POWER)}).worker == "slow"


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.integers(0, 9).map(str), st.integers(0, 5), min_size=1), st.integers(0, 99))
def test_with_equal_speeds_the_weighed_queue_is_the_shortest(in_flight: Mapping[str, int], seed: int) -> None:
    policy = make_policy("jsq-speed", seed=seed)
    for worker in in_flight:
        policy.joined(worker)
    assert policy.choose(REQUEST, in_flight).worker == ShortestQueue(seed).choose(REQUEST, in_flight).worker
