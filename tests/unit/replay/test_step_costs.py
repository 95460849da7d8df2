"""Step times that a replay's router learns are those that the simulated workers have."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from eldr.cost import CostModel, MoeLayerCost
from eldr.policies import PolicyOptions
from eldr.policies.base import Decision, DecodeRequest, Policy
from eldr.policies.worker_costs import LearnedCost
from eldr.replay.changes import Slowdown
from eldr.replay.engine import Engine
from eldr.replay.experiment import Laboratory, Settings
from eldr.replay.fleet import FleetSpec
from eldr.replay.packed import pack_trace
from eldr.replay.replicas import Replica, Replicas
from eldr.replay.step_costs import INTERVAL_S, SimulatedCosts
from eldr.replay.workload import Workload
from tests.synthetic import make_trace

QUICK = CostModel("quick", "none", "made up", MoeLayerCost(2000.0, 300.0, 10.0))
SLOW = CostModel("slow", "none", "made up", MoeLayerCost(4000.0, 600.0, 20.0))


class Turns(Policy):
    """Sends requests to workers in turn, and remembers the last that was learned."""

    name = "turns"

    def __init__(self) -> None:
        self.learned_of: dict[str, LearnedCost] = {}
        self._turn = 0

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        self._turn += 1
        return Decision(list(in_flight)[self._turn % len(in_flight)], "turn")

    @property
    def prices_steps(self) -> bool:
        return True

    def cost_learned(self, worker: str, learned: LearnedCost) -> None:
        self.learned_of[worker] = learned


def learned_in(slowdowns: Mapping[int, Mapping[str, float]], aggregated: bool = False) -> dict[str, LearnedCost]:
    """What is learned at the end of a run on three workers, of which w2 has half the speed."""
    trace = make_trace(requests=300, layers=3, experts=16, seed=0)
    packed = pack_trace(trace, None)
    arrival_s = np.cumsum(np.random.default_rng(1).exponential(0.3, 300))
    workload = Workload(arrival_s, np.arange(300), range(300), slowdowns=slowdowns, aggregated=aggregated)
    policy = Turns()
    costs = SimulatedCosts(policy, PolicyOptions(cost=QUICK, cost_scope="moe"), seed=0)
    lines = tuple(cost.step_cost(packed.layers, "moe") for cost in (QUICK, QUICK, SLOW))
    Engine(packed, workload, FleetSpec(lines, lines), Replicas([Replica(policy, costs=costs)])).run()
    assert arrival_s[-1] > 20 * INTERVAL_S
    return policy.learned_of


@pytest.mark.parametrize("aggregated", [False, True])
def test_a_slow_worker_is_found(aggregated: bool) -> None:
    learned = learned_in({}, aggregated)
    assert learned["w0"].relative == pytest.approx(1, rel=0.1)
    assert learned["w1"].relative == pytest.approx(1, rel=0.1)
    assert learned["w2"].relative == pytest.approx(2, rel=0.15)


def test_a_worker_that_slowed_down_is_found() -> None:
    learned = learned_in({200: {"w0": 3.0}})
    assert learned["w0"].relative / learned["w1"].relative == pytest.approx(3, rel=0.15)


def test_policies_learn_what_they_are_not_told() -> None:
    """With a slow worker and --learn-costs, requests avoid it; without either they do not."""
    trace = make_trace(requests=300, layers=3, experts=16, seed=0)
    options = PolicyOptions(cost=QUICK, worker_costs={"w2": SLOW}, cost_scope="moe")
    shares = []
    for settings in (
        Settings(requests=400, options=options, learn_costs=True),
        Settings(
            requests=400,
            options=PolicyOptions(cost=QUICK, cost_scope="moe"),
            slowdowns=(Slowdown("w2", 2.0, 0.0, 1.0),),
        ),
    ):
        run = Laboratory(trace, settings).run("jsq-speed", 3, 12.0, 4.0, 0)
        shares.append(float((run.worker[200:] == 2).mean()))
    assert shares[0] < 0.6 * shares[1]
