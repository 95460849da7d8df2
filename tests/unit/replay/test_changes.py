"""Workers that join and leave during a replay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from eldr.cost import StepCost
from eldr.policies.base import Decision, DecodeRequest, Policy
from eldr.replay.changes import FleetChange, Slowdown, parse_changes, parse_slowdowns, recovery_s
from eldr.replay.engine import Engine
from eldr.replay.errors import ReplayError
from eldr.replay.fleet import FleetSpec
from eldr.replay.measurements import RunResult
from eldr.replay.packed import pack_trace
from eldr.replay.replicas import alone
from eldr.replay.workload import Workload
from tests.synthetic import make_trace

COST = StepCost(base_s=0.01, per_expert_s=0.0, per_token_s=0.0, per_context_token_s=0.0)


class Watching(Policy):
    """Shortest queue, first worker on ties; checks what it hears."""

    name = "watching"

    def __init__(self) -> None:
        self.fleet: list[str] = []
        self.running: Counter[str] = Counter()
        self.heard: list[Any] = []
        self.offered: list[Any] = []

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        self.offered.append(set(in_flight))
        assert set(in_flight) <= set(self.fleet)
        assert all(self.running[worker] == load for worker, load in in_flight.items())
        return Decision(min(in_flight, key=in_flight.__getitem__), "least")

    def started(self, request: DecodeRequest, worker: str) -> None:
        assert worker in self.fleet
        self.running[worker] += 1

    def finished(self, request: DecodeRequest, worker: str) -> None:
        assert worker in self.fleet, "a worker left before its last request ended"
        self.running[worker] -= 1

    def joined(self, worker: str) -> None:
        self.fleet.append(worker)
        self.heard.append(("joined", worker))

    def left(self, worker: str) -> None:
        assert self.running[worker] == 0
        self.fleet.remove(worker)
        self.heard.append(("left", worker))


def replay(
    changes: dict[int, int],
    requests: int = 60,
    workers: int = 2,
    gap_s: float = 0.05,
    slowdowns: Mapping[int, Mapping[str, float]] | None = None,
) -> tuple[RunResult, Watching]:
    packed = pack_trace(make_trace(requests=requests, seed=0), None)
    arrival_s = np.arange(1, requests + 1, dtype=np.float64) * gap_s
    workload = Workload(
        arrival_s, np.arange(requests), range(requests), fleet_changes=changes, slowdowns=slowdowns or {}
    )
    policy = Watching()
    engine = Engine(packed, workload, FleetSpec((COST,) * workers, (COST,) * workers), alone(policy))
    return engine.run(), policy


def test_workers_join_and_drain() -> None:
    result, policy = replay({20: 2, 40: -3})
    assert policy.offered[19] == {"w0", "w1"}
    assert policy.offered[20] == {"w0", "w1", "w2", "w3"}
    assert policy.offered[40] == {"w3"}
    assert policy.heard[:4] == [("joined", f"w{number}") for number in range(4)]
    assert sorted(policy.heard[4:]) == [("left", f"w{number}") for number in range(3)]
    # Every request ended, also those on workers that drained.
    assert np.isfinite(result.tpot_s).all()
    assert set(result.worker[:20].tolist()) <= {0, 1}
    assert set(result.worker[40:].tolist()) == {3}


def test_without_changes_nothing_is_different() -> None:
    result, _ = replay({})
    again, _ = replay({30: 0})
    assert np.array_equal(result.tpot_s, again.tpot_s)


def test_the_last_worker_cannot_leave() -> None:
    with pytest.raises(ReplayError, match="cannot leave"):
        replay({10: -2})


def test_changes_are_parsed() -> None:
    assert parse_changes("0.7:-1, .25:+12") == (FleetChange(0.25, 12), FleetChange(0.7, -1))


@pytest.mark.parametrize("text", ["", "0.5", "0.5:1", "1.5:+1", "0.5:+0", "-0.5:+1", "0.5:+1;0.6:-1", "x:+1"])
def test_bad_changes_are_refused(text: str) -> None:
    with pytest.raises(ReplayError, match="SHARE"):
        parse_changes(text)


def run_of(tpot_s: NDArray[np.float64] | list[float]) -> RunResult:
    count = len(tpot_s)
    other, whole = np.zeros(count), np.zeros(count, dtype=np.int64)
    return RunResult(
        tpot_s=np.asarray(tpot_s, float),
        ttft_s=other,
        request_s=other,
        moe_tpot_s=other,
        wait_s=other,
        arrival_s=np.arange(count) / 10,
        request=whole,
        worker=whole,
        prompt_tokens=whole,
        cached_tokens=whole,
        active_experts_mean=0.0,
        expert_reads_mean=0.0,
        batch_mean=0.0,
        steps=0,
        tokens=0,
        replayed_tokens=0,
        chunk_step_share=0.0,
        chunk_time_share=0.0,
    )


def test_recovery_is_measured_from_the_change_to_the_later_level() -> None:
    # Ten arrivals a second; a change at 20 s, a bad time until 26 s, then a level that is not the old one.
    tpot_s = [0.010] * 200 + [0.040] * 60 + [0.015] * 340
    assert recovery_s(run_of(tpot_s), FleetChange(1 / 3, -1), 1.0) == 6.0
    assert recovery_s(run_of([0.010] * 600), FleetChange(0.5, 1), 1.0) == 0.0
    rising = np.linspace(0.01, 0.02, 600)
    assert recovery_s(run_of(rising), FleetChange(0.5, 1), 1.0) == 0.0
    assert np.isnan(recovery_s(run_of(tpot_s), FleetChange(0.999, 1), 1.0))


def test_a_worker_slows_down_for_a_while() -> None:
    """Requests that ran on it all the while take three times as long, and all others as long as ever."""
    # One request at a time, so that no other shares its steps.
    usual, _ = replay({}, workers=1, gap_s=1e4)
    slowed, _ = replay({}, workers=1, gap_s=1e4, slowdowns={20: {"w0": 3.0}, 40: {"w0": 1.0}})
    ratio = slowed.tpot_s / usual.tpot_s
    assert ratio[:20] == pytest.approx(1)
    assert ratio[20:40] == pytest.approx(3)
    assert ratio[40:] == pytest.approx(1)
    assert (slowed.moe_tpot_s / usual.moe_tpot_s)[20:40] == pytest.approx(3)


def test_a_slowdown_begins_with_the_next_step() -> None:
    """Not when the batch next changes: the second request goes to the other worker."""
    usual, _ = replay({}, requests=2, gap_s=1e-4)
    slowed, _ = replay({}, requests=2, gap_s=1e-4, slowdowns={1: {"w0": 10.0}})
    assert usual.worker.tolist() == slowed.worker.tolist() == [0, 1]
    assert 8 < slowed.tpot_s[0] / usual.tpot_s[0] < 10
    assert slowed.tpot_s[1] == pytest.approx(usual.tpot_s[1])


def test_slowdowns_are_parsed() -> None:
    assert parse_slowdowns("w3=1.5@0.4-0.7, w0=.5@0-1") == (
        Slowdown("w3", 1.5, 0.4, 0.7),
        Slowdown("w0", 0.5, 0.0, 1.0),
    )


@pytest.mark.parametrize("text", ["", "w3", "w3=2", "w3=0@0-1", "w3=2@0.7-0.4", "3=2@0-1", "w3=-1@0-1", "w3=2@0-2"])
def test_other_slowdowns_are_refused(text: str) -> None:
    with pytest.raises(ReplayError, match="is not a slowdown"):
        parse_slowdowns(text)
