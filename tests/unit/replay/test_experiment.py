"""Splits, draws, arrivals, statistics and whole comparisons."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from eldr.calibration import fit_calibration
from eldr.cli import replay as cli
from eldr.cost import CostModel, MoeLayerCost
from eldr.policies import PolicyOptions
from eldr.replay.arrivals import read_arrivals
from eldr.replay.errors import ReplayError
from eldr.replay.experiment import BASELINES, Cell, Laboratory, Settings, check_names, compare
from eldr.replay.goodput import goodput
from eldr.replay.measurements import RunResult
from eldr.replay.output import as_object, change_against_best, tpot_ms
from eldr.replay.packed import pack_trace
from eldr.replay.split import Mix, Split, split_trace, take_requests
from eldr.replay.statistics import paired_change
from eldr.replay.workload import draw_order, poisson_arrivals, traced_arrivals
from eldr.trace import Trace, TraceError, write_trace
from tests.synthetic import make_trace, packed

LABELS = ["code"] * 20 + ["math"] * 20 + ["law"] * 20
STEPS = np.full(60, 5)


def split(mix: Mix, steps: NDArray[np.int64] = STEPS, seed: int = 0) -> Split:
    return split_trace(LABELS, steps, mix, np.random.default_rng(seed))


def test_a_request_is_calibrated_on_or_served_never_both() -> None:
    parts = split(Mix(0.25))
    assert (len(parts.calibrate), len(parts.serve)) == (15, 45)
    assert sorted([*parts.calibrate, *parts.serve]) == list(range(60))
    assert not np.array_equal(parts.serve, split(Mix(0.25), seed=1).serve)
    assert np.array_equal(parts.serve, split(Mix(0.25)).serve)


def test_kinds_in_one_set_only_go_there_whole() -> None:
    parts = split(Mix(0.5, ("code", "math"), ("math", "law")))
    assert set(range(20)) <= set(parts.calibrate)
    assert set(range(40, 60)) <= set(parts.serve)
    mathematics = set(range(20, 40))
    assert len(mathematics & set(parts.calibrate)) == len(mathematics & set(parts.serve)) == 10


def test_a_switch_serves_what_was_calibrated_first() -> None:
    parts = split(Mix(0.5, ("code",), ("law",), switch_at=0.5))
    assert parts.serve_before is not None
    assert set(parts.calibrate) | set(parts.serve_before) == set(range(20))
    assert not set(parts.calibrate) & set(parts.serve_before)
    assert set(parts.serve) == set(range(40, 60))


def test_requests_without_steps_are_not_served() -> None:
    steps = STEPS.copy()
    steps[::2] = 0
    assert set(split(Mix(0), steps).serve) == set(range(1, 60, 2))
    assert not len(split(Mix(0)).calibrate)
    with pytest.raises(ReplayError, match="no request is left"):
        split(Mix(0.5), np.zeros(60, dtype=int))


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (Mix(1.0), "calibrate fraction 1.0"),
        (Mix(0.5, ("poetry",)), r"no request with the label 'poetry'; it has .*code \(20\)"),
        (Mix(0.5, ("code",), ("law",), switch_at=1.5), "switch at 1.5"),
    ],
)
def test_splits_that_cannot_be_made(mix: Mix, message: str) -> None:
    with pytest.raises(ReplayError, match=message):
        split(mix)


def test_take_requests_keeps_their_rows_and_prompts() -> None:
    texts = [b"%d" % 10**request for request in range(10)]
    text, offsets = packed(texts)
    trace = make_trace(requests=10, seed=3, prompt_text=text, prompt_text_offsets=offsets)
    chosen = np.array([7, 2, 5])
    part = take_requests(trace, chosen)
    for at, request in enumerate(chosen):
        rows = trace.decode_experts[trace.decode_offsets[request] : trace.decode_offsets[request + 1]]
        assert np.array_equal(part.decode_experts[part.decode_offsets[at] : part.decode_offsets[at + 1]], rows)
    assert np.array_equal(part.prefill_counts, trace.prefill_counts[chosen])
    assert part.label.tolist() == trace.label[chosen].tolist()
    assert [part.prompt(at) for at in range(3)] == [texts[request] for request in chosen]
    assert not take_requests(make_trace(), chosen).has_prompts


@given(st.integers(0, 1000), st.integers(1, 40), st.floats(0, 60))
def test_draws_rest_between_uses(seed: int, pool_size: int, in_flight: float) -> None:
    pool = np.arange(pool_size) * 3
    order = draw_order(pool, 200, in_flight, np.random.default_rng(seed)).tolist()
    assert set(order) <= set(pool.tolist())
    rest = int(min(1.25 * in_flight + 2, pool_size - 1))
    for at, request in enumerate(order):
        assert request not in order[max(0, at - rest) : at]


def test_draws_are_even() -> None:
    order = draw_order(np.arange(50), 20_000, 10, np.random.default_rng(0))
    assert stats.chisquare(np.bincount(order)).pvalue > 1e-3


def test_arrivals_have_their_rate() -> None:
    gaps = np.diff(poisson_arrivals(40.0, 20_000, np.random.default_rng(0)))
    assert stats.kstest(gaps, "expon", args=(0, 1 / 40)).pvalue > 1e-3
    stretched = traced_arrivals(np.array([5.0, 0.0, 1.0, 2.0]), 2.0, 7)
    assert np.diff(stretched, prepend=0.0) == pytest.approx([0.3, 0.3, 0.9, 0.3, 0.3, 0.9, 0.3])
    with pytest.raises(ReplayError, match="are all the same"):
        traced_arrivals(np.array([1.0, 1.0]), 2.0, 3)


def test_arrival_files(tmp_path: Path) -> None:
    azure = tmp_path / "a.csv"
    azure.write_text("TIMESTAMP,ContextTokens\n2023-11-16 18:17:03.9799600,1\n2023-11-16 18:17:05,2\n")
    assert read_arrivals(azure) == pytest.approx([0, 1.02004])
    mooncake = tmp_path / "m.jsonl"
    mooncake.write_text('{"timestamp": 3000}\n{"timestamp": 500}\n')
    assert read_arrivals(mooncake) == pytest.approx([0, 2.5])
    plain = tmp_path / "p.txt"
    plain.write_text("1\n2.5\n")
    assert read_arrivals(plain) == pytest.approx([0, 1.5])


@pytest.mark.parametrize(
    ("name", "text"),
    [("x.txt", "1\nsoon\n"), ("x.csv", "TIME\n1\n"), ("x.jsonl", "{}\n"), ("x.jsonl", "[1]\n"), ("x.txt", ""),
     ("x.txt", "1\n1\n"), ("x.txt", "1\nnan\n")],
)  # fmt: skip
def test_bad_arrival_files_are_refused(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ReplayError, match=r"arrivals .*x"):
        read_arrivals(path)
    with pytest.raises(ReplayError, match="No such file"):
        read_arrivals(tmp_path / "none.csv")


@given(st.lists(st.floats(0.5, 2), min_size=2, max_size=12))
def test_intervals_are_those_of_a_t_test(ratios: list[float]) -> None:
    values = np.array(ratios) * 3
    change = paired_change(values, np.full(len(ratios), 3.0))
    percents = 100 * (np.array(ratios) - 1)
    assert change.percent == pytest.approx(percents.mean(), abs=1e-9)
    if percents.std() > 1e-9:
        low, high = stats.ttest_1samp(percents, 0).confidence_interval(0.95)
        assert (change.low, change.high) == pytest.approx((low, high), abs=1e-6)


def test_one_seed_has_no_interval() -> None:
    change = paired_change(np.array([2.0]), np.array([1.0]))
    assert change.percent == 100
    assert math.isnan(change.low)


def result(tpot_s: list[int]) -> RunResult:
    tpot = np.array(tpot_s, dtype=float)
    none = np.zeros(len(tpot), dtype=int)
    return RunResult(
        tpot_s=tpot,
        ttft_s=tpot * 3,
        request_s=tpot * 4,
        moe_tpot_s=tpot / 2,
        wait_s=tpot * 0,
        arrival_s=tpot,
        request=none,
        worker=none,
        prompt_tokens=none + 40,
        cached_tokens=none + 10,
        active_experts_mean=3.0,
        expert_reads_mean=3.0,
        batch_mean=2.0,
        steps=1,
        tokens=1,
        replayed_tokens=1,
        chunk_step_share=0.25,
        chunk_time_share=0.5,
    )


def test_changes_are_against_the_best_load_balancer_of_all_seeds() -> None:
    """rr is best in one seed, jsq over both: jsq is the baseline of both."""
    cells = [
        Cell("rr", 2, 1.0, [result([1, 1]), result([9, 9])]),
        Cell("random", 2, 1.0, [result([9, 9]), result([9, 9])]),
        Cell("p2c", 2, 1.0, [result([9, 9]), result([9, 9])]),
        Cell("jsq", 2, 1.0, [result([2, 2]), result([4, 4])]),
        Cell("mine", 2, 1.0, [result([1, 1]), result([3, 3])]),
    ]
    change = change_against_best(cells[-1], cells, tpot_ms(None))
    assert change.percent == pytest.approx((-50 - 25) / 2)
    entry = as_object(cells[-1], cells, "step")
    assert entry["tpot_mean_ms"] == pytest.approx(2000)
    assert entry["vs_best_baseline_p50"] == pytest.approx(-37.5)
    assert entry["vs_best_baseline_p50_lo"] < -37.5 < entry["vs_best_baseline_p50_hi"]
    assert entry["moe_tpot_p50_ms"] == pytest.approx(1000)
    single = [Cell(cell.policy, 2, 1.0, cell.runs[:1]) for cell in cells]
    assert as_object(single[-1], single, "step")["vs_best_baseline_p99_lo"] is None
    assert "ttft_p50_ms" not in entry
    entry = as_object(cells[-1], cells, "step", aggregated=True)
    assert entry["ttft_mean_ms"] == pytest.approx(6000)
    assert entry["ttft_vs_jsq_p99"] == pytest.approx((-50 - 25) / 2)
    assert entry["request_mean_ms"] == pytest.approx(8000)
    assert (entry["prefix_hit_share"], entry["chunk_step_share"], entry["chunk_time_share"]) == (0.25, 0.25, 0.5)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return make_trace(requests=160, layers=3, experts=32, top_k=2, kinds=4, seed=2, steps=40)


@pytest.fixture(scope="module")
def laboratory(trace: Trace) -> Laboratory:
    return Laboratory(trace, Settings(requests=250, options=PolicyOptions(cost_scope="moe")))


def test_locality_pays_where_kinds_use_their_own_experts(laboratory: Laboratory) -> None:
    """Kinds of request prefer their own experts: policies that know it activate fewer, the oracle fewest."""
    names = ("locality-band", "expected-union", "expected-union-own", "expected-union-true", "clairvoyant")
    rate = laboratory.rate_for_batch(4, 4)
    cells = {cell.policy: cell for cell in compare(laboratory, names, 4, rate, 4, seeds=2)}
    assert set(cells) == {*BASELINES, *names}
    jsq = cells["jsq"].per_seed(lambda run: run.batch_mean)
    assert jsq.mean() == pytest.approx(4, rel=0.1)
    experts = {name: cell.per_seed(lambda run: run.active_experts_mean).mean() for name, cell in cells.items()}
    for name in names:
        assert experts[name] < 0.95 * experts["jsq"]
    for cell in cells.values():
        for seed, run in enumerate(cell.runs):
            assert set(run.request.tolist()) <= set(laboratory.split(seed).serve.tolist())


def test_seeds_are_paired_and_runs_repeat(laboratory: Laboratory) -> None:
    one = laboratory.run("jsq", 3, 30.0, 1, seed=1)
    other = laboratory.run("expected-union", 3, 30.0, 1, seed=1)
    again = laboratory.run("expected-union", 3, 30.0, 1, seed=1)
    assert np.array_equal(one.arrival_s, other.arrival_s)
    assert np.array_equal(other.tpot_s, again.tpot_s)
    assert np.mean(one.request == other.request) > 0.95
    assert not np.array_equal(one.arrival_s, laboratory.run("jsq", 3, 30.0, 1, seed=2).arrival_s)


def test_loads_that_the_trace_cannot_give(laboratory: Laboratory) -> None:
    with pytest.raises(ReplayError, match="keeps 400 requests in flight"):
        laboratory.rate_for_batch(50, 8)
    with pytest.raises(ReplayError, match="needs more than"):
        laboratory.run("jsq", 2, 1e6, 50, seed=0)


def test_goodput_is_where_the_limit_is_crossed(laboratory: Laboratory) -> None:
    limit_ms = 1.2 * 1e3 * float(np.percentile(laboratory.run("jsq", 2, 50.0, 1, seed=0).tpot_s, 99))
    cell, reached = goodput(laboratory, "jsq", 2, limit_ms, 1)
    assert reached
    assert 1e3 * np.percentile(cell.runs[0].tpot_s, 99) <= limit_ms
    above = laboratory.run("jsq", 2, cell.rate * 1.3, laboratory.batch_at(cell.rate * 1.3, 2), seed=0)
    assert 1e3 * np.percentile(above.tpot_s, 99) > limit_ms
    with pytest.raises(ReplayError, match="even on a nearly idle fleet"):
        goodput(laboratory, "jsq", 2, 1e-6, 1)


def test_without_calibration_requests(trace: Trace) -> None:
    bare = Laboratory(trace, Settings(requests=60, options=PolicyOptions(cost_scope="moe"), mix=Mix(0)))
    assert bare.calibration(2, 0) is None
    assert bare.run("expected-union", 2, 30.0, 1, seed=0).steps > 0


def test_zones_of_another_fleet_size_are_those_of_a_fresh_fit(laboratory: Laboratory) -> None:
    laboratory.calibration(3, 7)
    again = laboratory.calibration(4, 7)
    part = take_requests(laboratory.trace, laboratory.split(7).calibrate)
    fresh = fit_calibration(part, 4, seed=7)
    assert np.array_equal(again.centroids, fresh.centroids)
    assert again.rho["count_idf"] == fresh.rho["count_idf"]


def test_unequal_workers_are_simulated_and_known_to_the_policy(trace: Trace) -> None:
    """One worker takes four times as long for everything: it gets fewer requests than any other."""
    fast = CostModel("fast", "none", "made up", MoeLayerCost(10.0, 5.0, 1.0))
    slow = CostModel("slow", "none", "made up", MoeLayerCost(40.0, 20.0, 4.0))
    options = PolicyOptions(cost=fast, cost_scope="moe", worker_costs={"w1": slow})
    laboratory = Laboratory(trace, Settings(requests=400, options=options))
    assert [cost.per_expert_s for cost in laboratory.fleet(3).costs] == pytest.approx([5e-6, 20e-6, 5e-6])
    rate = 6 / (laboratory.served_steps(0) * 3e-4)
    sent = np.bincount(laboratory.run("expected-union-own", 3, rate, 2.0, seed=0).worker, minlength=3)
    assert sent[1] < 0.6 * min(sent[0], sent[2])


def test_names_are_checked() -> None:
    check_names(["jsq", "clairvoyant"])
    with pytest.raises(ReplayError, match="no policy 'oracle' to replay; choose from rr"):
        check_names(["oracle"])


def test_output_is_cut_after_its_tokens(trace: Trace) -> None:
    packed = pack_trace(trace, max_output=5)
    full = pack_trace(trace)
    assert [packed.steps(i) for i in range(160)] == [min(full.steps(i), 4) for i in range(160)]
    with pytest.raises(ReplayError, match="no request of the trace has a decode step"):
        pack_trace(trace, max_output=1)


def run_cli(*words: Any) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(word) for word in words]))


def test_the_command_writes_json(trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trace(trace, tmp_path / "t.npz")
    common = (tmp_path / "t.npz", "--batch", 2, "--requests", 80, "--seeds", 2, "--cost-scope", "moe")
    assert run_cli(*common, "--workers", "2,3", "--policies", "expected-union", "--json", tmp_path / "r.json") == 0
    objects = json.loads((tmp_path / "r.json").read_text())
    assert [(entry["policy"], entry["workers"]) for entry in objects] == [
        (name, workers) for workers in (2, 3) for name in (*BASELINES, "expected-union")
    ]
    for key in ("p50", "p99", "mean"):
        assert objects[-1][f"vs_best_baseline_{key}_lo"] <= objects[-1][f"vs_best_baseline_{key}"]
    capsys.readouterr()
    switch = ("--calibrate-labels", "kind 0,kind 1", "--serve-labels", "kind 2", "--switch-at", 0.5)
    assert run_cli(*common, *switch, "--json", "-") == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)[0]["timeline_tpot_mean_ms"]) == 20
    assert "expected-union" in printed.err


def test_the_command_replays_aggregated_serving(
    trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_trace(trace, tmp_path / "t.npz")
    (tmp_path / "p.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "x,100,1\n" + "x,700,1\n")
    words = (
        "--aggregated",
        "--batch",
        2,
        "--requests",
        80,
        "--seeds",
        2,
        "--workers",
        2,
        "--json",
        tmp_path / "r.json",
    )
    prompts = ("--prompt-tokens", tmp_path / "p.csv", "--shared-prefixes", "40:512", "--kv-tokens", 12000)
    policies = ("--policies", "prefix-affinity,expected-union")
    assert run_cli(tmp_path / "t.npz", *words, *prompts, *policies) == 0
    objects = {entry["policy"]: entry for entry in json.loads((tmp_path / "r.json").read_text())}
    for entry in objects.values():
        assert 0 < entry["ttft_p50_ms"] < entry["ttft_p99_ms"]
        assert 0 < entry["chunk_time_share"] < 1
        assert 0 < entry["prefix_hit_share"] < 512 / 612
    assert objects["jsq"]["ttft_vs_jsq_p50"] == 0
    assert objects["prefix-affinity"]["prefix_hit_share"] > 1.1 * objects["jsq"]["prefix_hit_share"]
    printed = capsys.readouterr().out
    assert "TTFT in ms" in printed
    assert "…" not in printed


def test_the_command_keeps_experts_in_host_memory(trace: Trace, tmp_path: Path) -> None:
    write_trace(trace, tmp_path / "t.npz")
    common = ("--in-flight", 6, "--requests", 80, "--seeds", 2, "--workers", 2, "--policies", "expected-union")
    layouts = {
        "none": (),
        "half": ("--resident", 0.5),
        "quarter": ("--resident", 0.25),
        "often": ("--resident", 0.5, "--evict", "lfu"),
        "cheap": ("--resident", 0.5, "--miss-cost", 1),
        "host": ("--resident", 0.5, "--miss-cost", "cpu"),
    }
    found = {}
    for name, words in layouts.items():
        assert run_cli(tmp_path / "t.npz", *common, *words, "--json", tmp_path / "r.json") == 0
        objects = {entry["policy"]: entry for entry in json.loads((tmp_path / "r.json").read_text())}
        found[name] = objects["jsq"]
        # The policies are compared with the same requests in flight, and whoever is faster serves more of them.
        for entry in objects.values():
            assert 1 < entry["batch_mean"] <= 3.1
        assert (objects["jsq"]["tpot_mean_ms"] > objects["expected-union"]["tpot_mean_ms"]) == (
            objects["jsq"]["rate"] < objects["expected-union"]["rate"]
        )
    reads = {name: entry["expert_reads_mean"] for name, entry in found.items()}
    assert reads["none"] == pytest.approx(found["none"]["active_experts_mean"])
    assert reads["none"] < reads["cheap"] < reads["host"] < reads["half"] < reads["quarter"]
    assert reads["often"] != reads["half"]


@pytest.mark.parametrize("words", [("--slow", "w0=3@0.1-0.9"), ("--worker-cost", "w0=qwen3-30b-a3b-rtxpro6000")])
def test_unequal_workers_are_compared_with_queues_weighed_by_speed(
    words: tuple[str, ...], trace: Trace, tmp_path: Path
) -> None:
    write_trace(trace, tmp_path / "t.npz")
    common = (tmp_path / "t.npz", "--batch", 2, "--requests", 40, "--seeds", 1, "--workers", 2, "--policies", "jsq")
    assert run_cli(*common, *words, "--json", tmp_path / "r.json") == 0
    objects = {entry["policy"]: entry for entry in json.loads((tmp_path / "r.json").read_text())}
    assert set(objects) == {*BASELINES, "jsq-speed"}
    best = min(entry["tpot_mean_ms"] for entry in objects.values())
    for entry in objects.values():
        assert entry["vs_best_baseline_mean"] == pytest.approx(100 * (entry["tpot_mean_ms"] / best - 1))


def test_the_command_finds_goodput(trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trace(trace, tmp_path / "t.npz")
    words = ("--goodput", 2.0, "--requests", 60, "--seeds", 1, "--workers", 2, "--json", tmp_path / "r.json")
    assert run_cli(tmp_path / "t.npz", *words) == 0
    objects = {entry["policy"]: entry for entry in json.loads((tmp_path / "r.json").read_text())}
    assert all(entry["tpot_p99_ms"] <= 2.0 for entry in objects.values())
    assert "expected-union" in capsys.readouterr().out
    best = max(objects[name]["rate"] for name in BASELINES)
    assert objects["expected-union"]["goodput_vs_best_baseline"] == pytest.approx(
        100 * (objects["expected-union"]["rate"] / best - 1)
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--policies", "jqs"), "no policy 'jqs'"),
        (("--arrivals", "trace"), "has no arrival times"),
        (("--cost", "nowhere"), "neither a file nor a preset"),
        (("--serve-labels", "poetry"), "no request with the label 'poetry'"),
        (("--batch", "500"), "requests in flight"),
        (("--shared-prefixes", "4:64"), "needs --aggregated"),
        (("--evict", "lfu"), "--evict needs --resident"),
        (("--evict", "lru", "--resident", "0.5", "--miss-cost", "cpu"), "no meaning with --miss-cost cpu"),
        (("--resident", "0.5", "--expert-parallel", "2"), "not simulated together"),
        (("--in-flight", "4", "--arrivals", "a.txt"), "takes no --arrivals"),
        (("--aggregated", "--prefill-chunk", "100"), "less than --max-num-seqs 256"),
        (("--prompt-tokens", "/nowhere/p.csv"), "No such file"),
        (("--json", "/nowhere/r.json", "--requests", "20", "--seeds", "1", "--batch", "1"), "cannot be written"),
    ],
)
def test_the_command_says_what_is_wrong(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[Any, ...], message: str
) -> None:
    write_trace(trace, tmp_path / "t.npz")
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("0\n1\n3\n")
    with pytest.raises(ReplayError if "--cost" not in words else Exception, match=message):
        run_cli(tmp_path / "t.npz", *words)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3000))
def test_a_truncated_trace_is_refused(cut: int) -> None:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.npz"
        write_trace(make_trace(requests=6), path)
        data = path.read_bytes()
        path.write_bytes(data[: max(0, len(data) - cut)])
        with pytest.raises(TraceError, match=r"t\.npz"):
            run_cli(path)
