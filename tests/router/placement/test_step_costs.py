"""What the router learns of its workers' step times, and what the policy and people hear of it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from random import Random

import pytest

from eldr.learning.step_counters import StepCounters
from eldr.policies import PolicyOptions
from eldr.policies.base import Decision, DecodeRequest, ExpectedStep, Policy
from eldr.policies.worker_costs import LearnedCost
from eldr.router.fleet.workers import Fleet
from eldr.router.observe.counters import Metrics
from eldr.router.placement.lanes import Lanes
from eldr.router.placement.step_costs import StepCosts
from tests.router.engine_metrics import said, steps_said
from tests.router.harness import Setup, on_uvloop, running, until

INTERVAL_S = 2.0  # the default of load_interval_s
STEPS = 150.0


class Hearing(Policy):
    """Remembers the last step time that it was told of each worker, and how often it was told."""

    name = "hearing"

    def __init__(self) -> None:
        self.known: dict[str, LearnedCost] = {}
        self.told = 0

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        return Decision(min(in_flight), "first")

    @property
    def prices_steps(self) -> bool:
        return True

    def expected_step(self, worker: str) -> ExpectedStep | None:
        return ExpectedStep(480.0, 24, 32, 3000)

    def cost_learned(self, worker: str, learned: LearnedCost) -> None:
        self.known[worker] = learned
        self.told += 1

    def left(self, worker: str) -> None:
        self.known.pop(worker, None)

    def relative(self, worker: str) -> float:
        return self.known[worker].relative / self.known["http://w0"].relative


class Looks:
    """A fleet of workers that are looked at every INTERVAL_S of a clock of their own, and vary by a few per cent."""

    def __init__(self, workers: int = 4) -> None:
        self.now_s = 1000.0
        self.policy = Hearing()
        self.fleet = Fleet()
        self.lanes = Lanes(
            self.fleet,
            lambda group: self.policy,
            lambda policy: None,
            lambda *_: None,
            lambda policy, placements: StepCosts(placements, PolicyOptions(), lambda: self.now_s),
            Metrics(),
            0,
        )
        self.fleet.on_change(self.lanes.fleet_changed)
        self.fleet.on_steps(self.lanes.counted)
        self.counted: dict[str, StepCounters] = {}
        self._random = Random(0)
        for number in range(workers):
            self.join(f"http://w{number}")

    def join(self, url: str) -> None:
        self.fleet.set_healthy(self.fleet.add(url, "decode", 100), True)
        self.counted[url] = StepCounters(gaps=5e6, gaps_s=4e4, steps=1e6, experts=4e8, expert_steps=2.4e7)

    def look(self, step_s: Mapping[str, float], looks: int = 1) -> None:
        """Let time pass, and look at every worker. step_s: URL -> the time of its steps now. The others take 10 ms."""
        for _ in range(looks):
            self.now_s += INTERVAL_S * self._random.uniform(0.8, 1.2)  # as the router varies its looks
            for url, seen in self.counted.items():
                took_s = step_s.get(url, 0.01) * self._random.gauss(1, 0.03)
                batch = self._random.uniform(5, 9)
                self.counted[url] = counted = StepCounters(
                    gaps=seen.gaps + STEPS * batch,
                    gaps_s=seen.gaps_s + STEPS * batch * took_s,
                    steps=seen.steps + STEPS,
                    experts=seen.experts + STEPS * 24 * 20,
                    expert_steps=seen.expert_steps + STEPS * 24,
                )
                self.fleet.tell_steps(self.fleet.workers("decode")[url], counted)


def test_a_worker_that_slows_to_half_its_speed_is_seen_within_thirty_seconds() -> None:
    looks = Looks()
    looks.look({}, 30)
    assert looks.policy.relative("http://w1") == pytest.approx(1, rel=0.05)
    began_s = looks.now_s
    while looks.policy.relative("http://w1") < 1.9:
        looks.look({"http://w1": 0.02})
        assert looks.now_s - began_s < 30
    began_s = looks.now_s
    while looks.policy.relative("http://w1") > 1.1:
        looks.look({})
        assert looks.now_s - began_s < 30


def test_a_policy_is_not_told_of_noise() -> None:
    looks = Looks()
    looks.look({}, 60)
    told = looks.policy.told
    looks.look({}, 60)
    assert looks.policy.told - told < 0.5 * 60 * 4
    spread = [learned.relative for learned in looks.policy.known.values()]
    assert max(spread) / min(spread) < 1.05


def test_a_worker_that_lies_is_checked_against_its_streams() -> None:
    looks = Looks()
    liar = looks.fleet.workers("decode")["http://w3"]
    for tpot_s in (0.011, 0.01, 0.5, 0.01, 0.012):  # one client read slowly
        liar.observe_tpot(tpot_s)
    looks.look({"http://w3": 1e-6}, 30)
    assert looks.policy.relative("http://w3") == pytest.approx(0.5, rel=0.15)


def test_slow_clients_do_not_make_a_worker_slow() -> None:
    looks = Looks()
    for tpot_s in (0.01, 0.9, 0.8, 0.01, 0.9, 0.9, 0.01, 0.9):
        looks.fleet.workers("decode")["http://w2"].observe_tpot(tpot_s)
    looks.look({}, 30)
    assert looks.policy.relative("http://w2") == pytest.approx(1, rel=0.05)


def test_a_restart_and_a_return_begin_anew() -> None:
    looks = Looks()
    looks.look({"http://w2": 0.03}, 20)
    assert looks.policy.relative("http://w2") == pytest.approx(3, rel=0.1)
    looks.counted["http://w2"] = StepCounters()  # its process is another
    looks.look({"http://w2": 0.03}, 5)
    assert looks.policy.relative("http://w2") == pytest.approx(3, rel=0.1)
    looks.fleet.remove(looks.fleet.workers("decode")["http://w2"])
    assert "http://w2" not in [url for _, url, _ in looks.lanes.learned_costs()]
    looks.join("http://w2")
    looks.look({}, 5)
    assert looks.policy.relative("http://w2") == pytest.approx(1, rel=0.1)


class Failing(Hearing):
    def expected_step(self, worker: str) -> ExpectedStep | None:
        raise RuntimeError

    def cost_learned(self, worker: str, learned: LearnedCost) -> None:
        raise RuntimeError


def test_a_failing_policy_breaks_nothing() -> None:
    looks = Looks(0)
    looks.policy = Failing()
    looks.join("http://w0")
    looks.look({}, 10)
    assert [url for _, url, _ in looks.lanes.learned_costs()] == ["http://w0"]


async def count(s: Setup, slow: int) -> None:
    """Let the decode workers count steps, of which those of one take twice as long."""
    steps = 0.0
    while True:
        steps += 50
        for number, worker in enumerate(s.decode):
            step_s = 0.02 if number == slow else 0.01
            counted = StepCounters(gaps=8 * steps, gaps_s=8 * steps * step_s, steps=steps)
            worker.metrics = said() + steps_said(counted)
        await asyncio.sleep(0.02)


@on_uvloop
async def test_a_slow_worker_gets_fewer_requests_and_is_shown() -> None:
    async with running(policy="jsq-speed", decode=3, load_interval_s=0.05) as s:
        counting = asyncio.create_task(count(s, slow=1))
        try:
            lanes = s.router.services.lanes

            def relative() -> float:
                return {url: learned.relative for _, url, learned in lanes.learned_costs()}.get(s.decode[1].url, 0.0)

            await until(lambda: relative() > 1.9, "the slow worker is found")
            url = s.decode[1].url
            assert await s.metric("eldr_worker_step_relative", worker=url) == pytest.approx(2, rel=0.05)
            assert await s.metric("eldr_worker_step_seconds", worker=url) == pytest.approx(0.02, rel=0.05)
            assert await s.metric("eldr_worker_step_seconds", worker=s.decode[0].url) == pytest.approx(0.01, rel=0.05)
            assert await s.metric("eldr_worker_step_cost_seconds", worker=url, part="base") > 0
            for worker in s.decode:
                worker.token_gap_s = 0.05
            before = len(s.decode[1].seen)
            assert {(await task).status for task in [asyncio.create_task(s.post()) for _ in range(10)]} == {200}
            posts = [seen for seen in s.decode[1].seen[before:] if seen.path == "/v1/completions"]
            assert len(posts) <= 1
        finally:
            counting.cancel()


@on_uvloop
async def test_nothing_is_learned_if_it_is_turned_off() -> None:
    async with running(policy="jsq-speed", decode=2, load_interval_s=0.02, learn_costs="off") as s:
        counting = asyncio.create_task(count(s, slow=1))
        try:
            fleet = s.router.services.fleet
            heard: list[str] = []
            fleet.on_steps(lambda worker, counted: heard.append(worker.url))
            await until(lambda: len(heard) > 20, "many looks")
            assert list(s.router.services.lanes.learned_costs()) == []
        finally:
            counting.cancel()
