"""A decision log, repeated on a fresh policy, gives the same choices; a damaged one says where."""

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eldr.calibration import Calibration, fit_calibration
from eldr.cli.main import main
from eldr.cost import CostModel, MoeLayerCost, StepCost
from eldr.counts import ExpertCounts, encode_counts
from eldr.policies import POLICY_NAMES, PolicyOptions, make_policy
from eldr.policies.base import Decision, DecodeRequest, Policy
from eldr.policies.expected_union import ExpectedUnion
from eldr.policies.logged import LoggedPolicy, LogHeader
from eldr.policies.shares import Share
from eldr.policies.worker_costs import LearnedCost
from eldr.replay.decisions import Line, Repetition, read_lines, repeat_decisions
from eldr.replay.errors import ReplayError
from eldr.trace import Trace
from tests.synthetic import make_trace


@pytest.fixture(scope="module")
def trace() -> Trace:
    return make_trace(requests=60, layers=3, experts=16, kinds=3, seed=2)


@pytest.fixture(scope="module")
def calibration(trace: Trace) -> Calibration:
    return fit_calibration(trace, 3)


def make(name: str, calibration: Calibration, seed: int = 5) -> Any:
    return make_policy(name, calibration=calibration, seed=seed)


def record(
    policy: Any,
    trace: Trace,
    events: int = 200,
    header: LogHeader | None = None,
    aggregated: bool = False,
    others: Policy | None = None,
) -> list[str]:
    """A log of requests that start, finish and fail while workers come and go.

    others: the policy of another router, which places as many requests on the same workers.
    """
    header = header or LogHeader(policy.name, 5, PolicyOptions())
    lines = [header.to_wire()]
    logged = LoggedPolicy(policy, lines.append)
    rng = np.random.default_rng(0)
    load = {}
    for worker in ("a", "b", "c"):
        logged.joined(worker)
        load[worker] = 0
    running: list[Any] = []
    elsewhere: list[tuple[str, Share]] = []
    for number in range(events):
        if others is not None:
            at, worker = int(rng.integers(60)), str(rng.choice(["a", "b", "c", "d"]))
            counts = ExpertCounts(trace.prefill_counts[at], int(trace.prompt_tokens[at]), trace.meta.top_k)
            request = DecodeRequest(f"other{number}", 2000, counts, computes_prompt=aggregated)
            others.joined(worker)
            others.started(request, worker)
            share = others.share(request, worker)
            others.left(worker)
            assert share is not None
            logged.elsewhere_started(worker, share)
            elsewhere.append((worker, share))
            if aggregated and rng.random() < 0.6:
                logged.elsewhere_prompt_computed(*elsewhere[int(rng.integers(len(elsewhere)))])
            if rng.random() < 0.9:
                ended = elsewhere.pop(int(rng.integers(len(elsewhere))))
                logged.elsewhere_finished(*ended)
                logged.elsewhere_finished(*ended)  # it may be heard twice
        if number == 30:
            logged.cost_learned("c", LearnedCost(StepCost(0.03, 0.001, 0.0001), 3.0))
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
            request.generated_tokens = int(rng.integers(1, 20)) if aggregated else None
            logged.finished(request, worker)
            load[worker] -= 1
        at = number % 60
        counts = ExpertCounts(trace.prefill_counts[at], int(trace.prompt_tokens[at]), trace.meta.top_k)
        label = None if number % 7 == 0 else str(trace.label[at])
        wire = None if number % 5 == 0 else {**encode_counts(counts), "prompt": "a secret"}
        given = (None, None) if number % 11 == 0 else (counts, wire)
        request = DecodeRequest(f"r{number}", int(trace.prompt_tokens[at]), given[0], label, None, given[1])
        if aggregated:
            request.computes_prompt = True
            request.prompt_tokens *= 100
            request.cached_tokens = (
                None
                if number % 9 == 0
                else {
                    worker: int(rng.integers(request.prompt_tokens))
                    for worker in ("a", "c", "d", "gone")
                    if rng.random() < 0.4
                }
            )
        eligible = {worker: count for worker, count in load.items() if rng.random() < 0.9} or dict(load)
        eligible = dict(sorted(eligible.items(), key=lambda item: rng.random()))
        worker = logged.choose(request, eligible).worker
        logged.started(request, worker)
        load[worker] += 1
        running.append((request, worker))
        if aggregated and rng.random() < 0.5:
            logged.prompt_computed(*running[int(rng.integers(len(running)))])
    return [json.dumps(event) for event in lines]


def repeat(lines: list[str], policy_of: Any) -> Repetition:
    """policy_of: a function of the header, or one policy."""
    make_of = policy_of if callable(policy_of) else lambda header: policy_of
    return repeat_decisions([Line("log", number, text.encode()) for number, text in enumerate(lines, 1)], make_of)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_repeated_log_gives_the_same_choices(trace: Trace, calibration: Calibration, name: str) -> None:
    lines = record(make(name, calibration), trace)
    repetition = repeat(lines, make(name, calibration))
    assert repetition.equal
    assert repetition.decisions == 200
    assert repetition.logged == repetition.chosen
    assert "secret" not in "".join(lines)


@pytest.mark.parametrize("name", ["jsq", "prefix-affinity", "expected-union"])
def test_a_repeated_log_of_aggregated_workers_gives_the_same_choices(
    trace: Trace, calibration: Calibration, name: str
) -> None:
    lines = record(make(name, calibration), trace, aggregated=True)
    repetition = repeat(lines, make(name, calibration))
    assert repetition.equal
    assert repetition.decisions == 200


@pytest.mark.parametrize("name", ["jsq-speed", "expected-union"])
def test_learned_step_times_are_in_the_log(trace: Trace, calibration: Calibration, name: str) -> None:
    """Without them the choices come out differently."""
    lines = [line for line in record(make(name, calibration), trace) if '"cost_learned"' not in line]
    assert not repeat(lines, make(name, calibration)).equal


@pytest.mark.parametrize("left_out", ["cached_tokens", "generated_tokens", "prompt_computed"])
def test_what_a_policy_hears_of_prompts_is_in_the_log(trace: Trace, calibration: Calibration, left_out: str) -> None:
    """Without one of the three kinds of news the choices come out differently."""
    events = [json.loads(line) for line in record(make("expected-union", calibration), trace, aggregated=True)]
    if left_out == "prompt_computed":
        events = [event for event in events if event["event"] != left_out]
    for event in events:
        if event["event"] == "finished" or left_out == "cached_tokens":
            event.pop(left_out, None)
    assert not repeat([json.dumps(event) for event in events], make("expected-union", calibration)).equal


@pytest.mark.parametrize("left_out", [None, "elsewhere_started", "elsewhere_prompt_computed", "elsewhere_finished"])
def test_what_other_routers_start_is_in_the_log(trace: Trace, calibration: Calibration, left_out: str | None) -> None:
    """The choices are the same, and they are not if some of the news is missing."""
    others = make("expected-union", calibration)
    logged = record(make("expected-union", calibration), trace, aggregated=True, others=others)
    events = [json.loads(line) for line in logged]
    kinds = Counter(event["event"] for event in events)
    assert kinds["elsewhere_started"] == 200 > kinds["elsewhere_finished"] > 150
    if left_out == "elsewhere_started":
        events = [event for event in events if "share" not in event]
    events = [event for event in events if event["event"] != left_out]
    repetition = repeat([json.dumps(event) for event in events], make("expected-union", calibration))
    assert repetition.decisions == 200
    assert repetition.equal == (left_out is None)


def test_news_of_a_request_that_never_started_elsewhere(trace: Trace, calibration: Calibration) -> None:
    lines = record(make("jsq", calibration), trace, events=3)
    lines.append(json.dumps({"event": "elsewhere_finished", "share": 7, "worker": "a"}))
    with pytest.raises(ReplayError, match="not an event of a decision log"):
        repeat(lines, make("jsq", calibration))


def test_another_policy_differs(trace: Trace, calibration: Calibration) -> None:
    lines = record(make("locality-band", calibration), trace)
    repetition = repeat(lines, make("random", calibration))
    assert not repetition.equal
    assert len(repetition.differences) > 20
    first = repetition.differences[0]
    event = json.loads(lines[int(first.where.removeprefix("log, line ")) - 1])
    assert (event["id"], event["worker"]) == (first.request, first.logged)
    assert first.chosen != first.logged
    assert sum(repetition.logged.values()) == sum(repetition.chosen.values()) == 200


def test_a_random_policy_needs_its_seed(trace: Trace) -> None:
    lines = record(make_policy("random", seed=5), trace)
    assert repeat(lines, lambda header: make_policy(header.policy, seed=header.seed)).equal
    assert not repeat(lines, make_policy("random", seed=6)).equal


def test_every_start_of_the_router_begins_anew(trace: Trace, calibration: Calibration) -> None:
    first = record(make("expected-union", calibration), trace)
    second = record(make("random", calibration), trace)
    seen = []

    def made(header: LogHeader) -> ExpectedUnion | Random:
        seen.append(header.policy)
        return make(header.policy, calibration)

    repetition = repeat(first[:100] + second, made)
    assert seen == ["expected-union", "random"]
    assert repetition.equal
    assert repetition.decisions == 200 + sum('"choose"' in line for line in first[:100])


def test_two_routers_may_write_to_one_file(trace: Trace, calibration: Calibration) -> None:
    """As while a new process takes over from the old one."""
    old, new = (
        [json.dumps({**json.loads(line), "run": name}) for line in record(make(policy, calibration), trace)]
        for name, policy in (("old", "random"), ("new", "expected-union"))
    )
    mixed = old[:40] + [line for pair in zip(new, old[40:], strict=False) for line in pair]
    repetition = repeat(mixed, lambda header: make(header.policy, calibration))
    assert repetition.equal
    assert repetition.decisions == sum('"choose"' in line for line in mixed) > 300


# Damage.


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"event":"sleep","worker":"a"}',
        '{"event":"started","id":"x","worker":"a"}',
        '{"event":"choose","worker":"a"}',
        '{"event":"choose","id":"x","prompt_tokens":1,"label":null,"max_tokens":null,"counts":null,"eligible":[7],'
        '"load":[0],"worker":"a","started":true}',
        '{"event":"log","v":1}',
        '{"event":"log","v":2,"policy":"jsq","seed":0,"options":{"tau":-1},"calibration":null}',
    ],
)
def test_a_broken_line_is_named(line: str) -> None:
    header = json.dumps(LogHeader("jsq", 0, PolicyOptions()).to_wire())
    lines = [header, '{"event":"joined","worker":"a"}', line, '{"event":"joined","worker":"b"}']
    with pytest.raises(ReplayError, match=r"log, line 3: not an event"):
        repeat(lines, make_policy("jsq"))


@given(st.integers(1, 10**6))
def test_a_log_cut_off_anywhere_ends_there(cut: int) -> None:
    trace = make_trace(requests=60, layers=3, experts=16, kinds=3, seed=2)
    text = "\n".join(record(make_policy("jsq", seed=5), trace, events=6)) + "\n"
    whole = text.splitlines()
    cut = len(whole[0]) + cut % (len(text) - len(whole[0]))
    part = text[:cut]
    lines = part.splitlines()
    repetition = repeat(lines, make_policy("jsq", seed=5))
    complete = sum(line == before for line, before in zip(lines, whole, strict=False))
    assert repetition.equal
    assert repetition.decisions == sum('"choose"' in line for line in whole[:complete])
    assert repetition.cut_off == ([] if complete == len(lines) else [f"log, line {len(lines)}"])


def test_a_line_cut_off_by_a_crash_may_be_followed_by_the_next_start(trace: Trace) -> None:
    lines = record(make_policy("jsq", seed=5), trace)
    crashed = [*lines[:50], lines[50][:40]]
    repetition = repeat(crashed + lines, lambda header: make_policy("jsq", seed=5))
    assert repetition.equal
    assert repetition.cut_off == ["log, line 51"]
    with pytest.raises(ReplayError, match="log, line 51: not an event"):
        repeat(crashed + lines[1:], make_policy("jsq", seed=5))


def test_decisions_behind_a_gap_are_not_repeated(trace: Trace) -> None:
    lines = record(make_policy("jsq", seed=5), trace)
    lost = [*lines[:100], '{"event":"gap","lines":3}', *lines[103:]]
    repetition = repeat(lost + lines, lambda header: make_policy("jsq", seed=5))
    assert not repetition.equal
    assert repetition.gaps == ["log, line 101: 3 lines were lost"]
    assert repetition.skipped == sum('"choose"' in line for line in lines[103:])
    assert repetition.decisions == 200 + sum('"choose"' in line for line in lines[:100])


@pytest.mark.parametrize(("lines", "message"), [([], "has no header"), (['{"event":"left"}'], "no header before")])
def test_a_log_without_its_beginning_is_refused(lines: list[str], message: str) -> None:
    with pytest.raises(ReplayError, match=message):
        repeat(lines, make_policy("jsq"))


class Fails(Policy):
    name = "fails"

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        if request.request_id == "bad":
            raise ZeroDivisionError
        return Decision(next(iter(in_flight)), "first")


def test_a_choice_that_failed_fails_again() -> None:
    events = [LogHeader("fails", 0, PolicyOptions()).to_wire()]
    logged = LoggedPolicy(Fails(), events.append)
    logged.joined("a")
    logged.choose(DecodeRequest("good", 1), {"a": 0})
    with pytest.raises(ZeroDivisionError):
        logged.choose(DecodeRequest("bad", 1), {"a": 0})
    logged.started(DecodeRequest("bad", 1), "a")
    lines = [json.dumps(event) for event in events]
    assert repeat(lines, Fails()).equal
    assert repeat(lines, make_policy("jsq")).differences[0].logged is None


def test_options_survive_the_header() -> None:
    cost = CostModel("c", "d", "s", MoeLayerCost(1.0, 2.0, 3.0))
    options = PolicyOptions(tau=0.3, two_nearest=False, cost_scope="moe", worker_costs={"a": cost}, tail_guard=np.inf)
    header = LogHeader("expected-union", 7, options, "c.npz", "00")
    assert LogHeader.from_wire(json.loads(json.dumps(header.to_wire(), allow_nan=False))) == header


# The command.


@pytest.fixture
def log(trace: Trace, calibration: Calibration, tmp_path: Path) -> list[Path]:
    """A log of locality-band with its calibration, in three parts, the oldest one packed."""
    calibration.save(tmp_path / "c.npz")
    digest = hashlib.sha256((tmp_path / "c.npz").read_bytes()).hexdigest()
    header = LogHeader("locality-band", 5, PolicyOptions(), str(tmp_path / "c.npz"), digest)
    lines = record(make("locality-band", calibration), trace, header=header)
    paths = [tmp_path / "log.2.gz", tmp_path / "log.1", tmp_path / "log"]
    parts = ["\n".join(part) + "\n" for part in (lines[:60], lines[60:200], lines[200:])]
    paths[0].write_bytes(gzip.compress(parts[0].encode()))
    paths[1].write_text(parts[1])
    paths[2].write_text(parts[2])
    return paths


def test_the_command_repeats_the_parts_of_a_log(log: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decisions", *map(str, log)]) == 0
    assert "200 decisions repeated with locality-band, 0 differ" in " ".join(capsys.readouterr().out.split())
    assert [line.number for line in read_lines(log)][58:62] == [59, 60, 1, 2]
    assert main(["decisions", *map(str, log[1:])]) == 2
    assert "log.1, line 1: there is no header before this line" in capsys.readouterr().err


def test_the_command_lets_another_policy_choose(log: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decisions", *map(str, log), "--policy", "expected-union", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["decisions"] == 200
    assert result["differing"] == len(result["differences"]) > 20
    assert sum(worker["chosen"] for worker in result["workers"].values()) == 200


def test_the_command_finds_a_changed_choice(log: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    text = log[2].read_text()
    lines = text.splitlines()
    at = next(number for number, line in enumerate(lines) if '"choose"' in line)
    event = json.loads(lines[at])
    event["worker"] = next(worker for worker in "acd" if worker != event["worker"])
    lines[at] = json.dumps(event)
    log[2].write_text("\n".join(lines) + "\n")
    assert main(["decisions", *map(str, log), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["equal"] is False
    assert result["differences"][0]["where"] == f"{log[2]}, line {at + 1}"


def test_the_command_says_when_other_software_made_the_log(log: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Of a log that cannot be repeated."""
    log[0].write_bytes(gzip.compress(gzip.decompress(log[0].read_bytes()).replace(b'"seed": 5', b'"seed": 6')))
    assert main(["decisions", *map(str, log)]) == 1
    assert "was made by" not in capsys.readouterr().out
    text = gzip.decompress(log[0].read_bytes()).replace(np.__version__.encode(), b"0.9")
    log[0].write_bytes(gzip.compress(text))
    assert main(["decisions", *map(str, log)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "numpy 0.9, compiled" in shown
    assert f"numpy {np.__version__}" in shown


def test_the_command_checks_the_calibration(
    log: list[Path], calibration: Calibration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved.npz"
    (tmp_path / "c.npz").rename(moved)
    assert main(["decisions", *map(str, log)]) == 2
    assert "give its new path with --calibration" in capsys.readouterr().err
    assert main(["decisions", *map(str, log), "--calibration", str(moved)]) == 0
    fit_calibration(make_trace(requests=60, layers=3, experts=16, kinds=3, seed=3), 3).save(moved)
    assert main(["decisions", *map(str, log), "--calibration", str(moved)]) == 2
    assert "the digests differ" in capsys.readouterr().err
