"""Several routers in a replay: what each of them knows, and when, from the times of the run itself."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eldr.cli.main import main
from eldr.cost import StepCost
from eldr.policies import PolicyOptions
from eldr.policies.base import Decision, DecodeRequest, Policy
from eldr.policies.shares import Share
from eldr.replay.engine import Engine
from eldr.replay.experiment import BASELINES, Laboratory, Settings, compare
from eldr.replay.fleet import FleetSpec
from eldr.replay.packed import pack_trace
from eldr.replay.replicas import Replica, Replicas, Sharing
from eldr.replay.workload import Workload
from eldr.trace import Trace, write_trace
from tests.synthetic import make_trace

COST = StepCost(base_s=0.01, per_expert_s=0.0, per_token_s=0.002, per_context_token_s=0.0)
WORKERS, ROUTERS, ARRIVALS = 3, 3, 60


class Noting(Policy):
    """Places at random and notes what it is told. Its shares say how long a prompt is."""

    name = "noting"

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.loads: dict[int, dict[str, int]] = {}
        self.heard: list[tuple[str, str, Share]] = []
        self.heard_before: dict[int, int] = {}

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        arrival = int(request.request_id.split(".")[0])
        self.loads[arrival] = dict(in_flight)
        self.heard_before[arrival] = len(self.heard)
        return Decision(str(self.rng.choice(list(in_flight))), "noted")

    def share(self, request: DecodeRequest, worker: str) -> Share | None:
        return Share(np.zeros(1, dtype=np.uint8), request.prompt_tokens, True, request.computes_prompt)

    def elsewhere_started(self, worker: str, share: Share) -> None:
        self.heard.append(("started", worker, share))

    def elsewhere_prompt_computed(self, worker: str, share: Share) -> None:
        self.heard.append(("computed", worker, share))

    def elsewhere_finished(self, worker: str, share: Share) -> None:
        self.heard.append(("finished", worker, share))


def replay(sharing: Sharing, aggregated: bool = False, **workload: Any) -> tuple[Any, list[Noting], Any]:
    trace = make_trace(requests=ARRIVALS, seed=1, steps=20)
    rng = np.random.default_rng(3)
    arrival_s = np.cumsum(rng.exponential(0.02, ARRIVALS))
    router = rng.integers(ROUTERS, size=ARRIVALS)
    policies = [Noting(number) for number in range(ROUTERS)]
    arrivals = Workload(
        arrival_s, np.arange(ARRIVALS), range(ARRIVALS), router=router, aggregated=aggregated, **workload
    )
    fleet = FleetSpec((COST,) * WORKERS, (COST,) * WORKERS)
    routers = Replicas([Replica(policy) for policy in policies], sharing)
    return Engine(pack_trace(trace), arrivals, fleet, routers).run(), policies, router


@pytest.mark.parametrize("what", ["all", "load", "nothing"])
@pytest.mark.parametrize("delay_s", [0.0, 0.03, 0.3])
def test_a_router_knows_its_own_requests_at_once_and_those_of_others_late(what: str, delay_s: float) -> None:
    """The loads that each choice saw, against a count of what runs, from when the requests came and went."""
    run, policies, router = replay(Sharing(ROUTERS, what, delay_s))
    start_s, end_s = run.arrival_s, run.arrival_s + run.request_s
    seen = 0
    for arrival, now_s in enumerate(start_s.tolist()):
        known = np.zeros(WORKERS, dtype=int)
        for other in range(ARRIVALS):
            own = router[other] == router[arrival]
            if not own and what == "nothing":
                continue
            late_s = 0.0 if own else delay_s
            before = other < arrival and start_s[other] + late_s <= now_s
            known[run.worker[other]] += before and end_s[other] + late_s > now_s
            seen += before and not own
        assert policies[router[arrival]].loads[arrival] == {f"w{worker}": known[worker] for worker in range(WORKERS)}
    assert (seen > 0) == (what != "nothing")
    for policy in policies:
        told = {"all": True, "load": False}.get(what)
        assert all((share.codes is not None, share.known) == (told, told) for _, _, share in policy.heard)
        assert bool(policy.heard) == (what != "nothing")


def test_others_hear_of_every_request_once_and_with_the_same_share() -> None:
    run, policies, router = replay(Sharing(ROUTERS, "all", 0.05))
    for number, policy in enumerate(policies):
        started = {id(share): worker for news, worker, share in policy.heard if news == "started"}
        ended = {id(share): worker for news, worker, share in policy.heard if news == "finished"}
        others = np.flatnonzero(router != number)
        # News that would come after the last arrival changes nothing, and is not delivered.
        assert 0.8 * len(others) < len(started) <= len(others)
        assert ended.items() <= started.items()
        assert [worker for news, worker, _ in policy.heard if news == "started"] == [
            f"w{run.worker[other]}" for other in others[: len(started)]
        ]
        lengths = [share.context_tokens for news, _, share in policy.heard if news == "started"]
        assert lengths == run.prompt_tokens[others[: len(lengths)]].tolist()


def test_others_hear_when_a_prompt_was_computed() -> None:
    run, policies, router = replay(Sharing(ROUTERS, "all", 0.0), aggregated=True)
    first_s = run.arrival_s + run.ttft_s
    for number, policy in enumerate(policies):
        for arrival, heard in policy.heard_before.items():
            computed = sum(news == "computed" for news, _, _ in policy.heard[:heard])
            assert computed == np.sum((router != number) & (first_s <= run.arrival_s[arrival]))
    _, policies, _ = replay(Sharing(ROUTERS, "load", 0.0), aggregated=True)
    assert all(news != "computed" for policy in policies for news, _, _ in policy.heard)


def test_workers_that_come_and_go() -> None:
    """A draining worker is offered by no router, and news of its requests changes nothing."""
    run, policies, router = replay(Sharing(ROUTERS, "all", 0.1), fleet_changes={20: -1, 40: 1})
    for arrival in range(ARRIVALS):
        offered = set(policies[router[arrival]].loads[arrival])
        assert offered == {"w1", "w2"} | ({"w0"} if arrival < 20 else {"w3"} if arrival >= 40 else set())
    assert min(load for policy in policies for loads in policy.loads.values() for load in loads.values()) == 0
    assert not np.isnan(run.tpot_s).any()


@pytest.fixture(scope="module")
def trace() -> Trace:
    return make_trace(requests=160, layers=3, experts=32, top_k=2, kinds=4, seed=2, steps=40)


@pytest.fixture(scope="module")
def laboratory(trace: Trace) -> Laboratory:
    return Laboratory(trace, Settings(requests=250, options=PolicyOptions(cost_scope="moe")))


def test_routers_that_share_all_decide_as_one(laboratory: Laboratory) -> None:
    """Distinct experts of a step: as few as with one router if news is fast, and more if there is none."""
    rate = laboratory.rate_for_batch(4, 4)
    at_once, never = Sharing(4, "all", 0.0), Sharing(4, "nothing")
    cells = compare(laboratory, ["expected-union"], 4, rate, 4, 2, sharings=[Sharing(), at_once, never])
    assert [(cell.policy, cell.sharing.replicas) for cell in cells] == [
        *((name, 1) for name in BASELINES),
        ("expected-union", 1),
        ("expected-union", 4),
        ("expected-union", 4),
    ]
    assert [cell.is_baseline for cell in cells] == [True] * 4 + [False] * 3
    one, shared, apart = (cell.per_seed(lambda run: run.active_experts_mean).mean() for cell in cells[4:])
    jsq = cells[3].per_seed(lambda run: run.active_experts_mean).mean()
    assert shared - one < 0.2 * (jsq - one)
    assert apart - one > 0.4 * (jsq - one)


def test_every_router_draws_for_itself(laboratory: Laboratory) -> None:
    """Random placements of two routers are not the same sequence twice."""
    shared = laboratory.with_settings(dataclasses.replace(laboratory.settings, sharing=Sharing(2, "nothing")))
    run = shared.run("random", 4, 60.0, 1, seed=0)
    workload = shared.workload(60.0, 4.0, 0)
    assert workload.router is not None
    router = workload.router[workload.measured.start : workload.measured.stop]
    assert 100 < router.sum() < 150
    one, two = (run.worker[router == number][:100] for number in (0, 1))
    assert np.mean(one == two) < 0.5


@pytest.fixture(scope="module")
def path(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replicas") / "t.npz"
    write_trace(trace, path)
    return path


COMMON = ["--workers", "3", "--batch", "2", "--requests", "60", "--seeds", "2", "--json"]


@pytest.mark.parametrize(
    ("options", "share", "delay_ms"),
    [([], "all", 50), (["--share-delay-ms", "7.5"], "all", 7.5), (["--share", "nothing"], "nothing", None)],
)
def test_the_command(
    path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    share: str,
    delay_ms: float | None,
) -> None:
    results = tmp_path / "r.json"
    arguments = [
        "replay",
        str(path),
        *COMMON,
        str(results),
        "--policies",
        "jsq,expected-union-true",
        "--replicas",
        "1,4",
    ]
    assert main([*arguments, *options]) == 0
    shown = capsys.readouterr().out
    assert "expected-union-true x4" in shown
    assert "…" not in shown  # nothing is cut off in 80 columns
    rows = json.loads(results.read_text())
    assert [(row["policy"], row.get("replicas")) for row in rows] == [
        *((name, None) for name in BASELINES),
        ("expected-union-true", None),
        ("jsq", 4),
        ("expected-union-true", 4),
    ]
    for row in rows[-2:]:
        assert (row["share"], row["share_delay_ms"]) == (share, delay_ms)
    # Changes are against single routers.
    assert rows[3]["vs_jsq_p99"] == 0
    assert rows[-2]["vs_jsq_p99"] != 0


def test_what_makes_no_sense(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--share", "load"], "need --replicas"),
        (["--share-delay-ms", "3"], "need --replicas"),
        (["--replicas", "2", "--share", "nothing", "--share-delay-ms", "3"], "no meaning with --share nothing"),
    ):
        assert main(["replay", str(path), *COMMON, str(tmp_path / "r.json"), *options]) == 2
        assert message in capsys.readouterr().err
