"""A decision log, repeated on a fresh policy, gives the same choices."""

import numpy as np
import pytest
from synthetic import make_trace

from eldr.calibration import fit_calibration
from eldr.counts import ExpertCounts
from eldr.policies import POLICY_NAMES, make_policy
from eldr.policies.base import DecodeRequest
from eldr.policies.logged import LoggedPolicy
from eldr.replay.decisions import repeat_decisions
from eldr.replay.errors import ReplayError


@pytest.fixture(scope="module")
def trace():
    return make_trace(requests=60, layers=3, experts=16, kinds=3, seed=2)


@pytest.fixture(scope="module")
def calibration(trace):
    return fit_calibration(trace, 3)


def make(name, calibration, seed=5):
    return make_policy(name, calibration=calibration, seed=seed)


def record(policy, trace, events=200):
    """A log of requests that start, finish and fail while workers come and go."""
    lines = []
    logged = LoggedPolicy(policy, lines.append)
    rng = np.random.default_rng(0)
    load = {}
    for worker in ("a", "b", "c"):
        logged.joined(worker)
        load[worker] = 0
    running = []
    for number in range(events):
        if number == 80:
            logged.joined("d")
            load["d"] = 0
        if number == 140:
            for request, worker in [entry for entry in running if entry[1] == "b"]:
                logged.finished(request, worker)
            running = [entry for entry in running if entry[1] != "b"]
            logged.left("b")
            del load["b"]
        if running and rng.random() < 0.45:
            request, worker = running.pop(int(rng.integers(len(running))))
            logged.finished(request, worker)
            load[worker] -= 1
        at = number % 60
        counts = ExpertCounts(trace.prefill_counts[at], int(trace.prompt_tokens[at]), trace.meta.top_k)
        label = None if number % 7 == 0 else str(trace.label[at])
        request = DecodeRequest(f"r{number}", int(trace.prompt_tokens[at]), None if number % 11 == 0 else counts, label)
        eligible = {worker: count for worker, count in load.items() if rng.random() < 0.9} or dict(load)
        worker = logged.choose(request, eligible).worker
        logged.started(request, worker)
        load[worker] += 1
        running.append((request, worker))
    return lines


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_repeated_log_gives_the_same_choices(trace, calibration, name):
    lines = record(make(name, calibration), trace)
    repetition = repeat_decisions(lines, make(name, calibration))
    assert repetition.decisions == 200
    assert repetition.differing == []


def test_another_policy_differs(trace, calibration):
    lines = record(make("locality-band", calibration), trace)
    differing = repeat_decisions(lines, make("random", calibration)).differing
    assert len(differing) > 20
    number, logged, chosen = differing[0]
    assert f'"worker":"{logged}"' in lines[number - 1]
    assert chosen != logged


@pytest.mark.parametrize(
    "line", ["", "{", "[]", '{"event":"sleep","worker":"a"}', '{"event":"started","request_id":"x","worker":"a"}']
)
def test_a_broken_log_names_its_line(line):
    with pytest.raises(ReplayError, match="line 2: not an event"):
        repeat_decisions(['{"event":"joined","worker":"a"}', line], make_policy("jsq"))
