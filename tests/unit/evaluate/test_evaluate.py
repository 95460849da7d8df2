"""The evaluation's experiments on a small made-up trace, against references that know nothing of them."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import eldr
from eldr.calibration import fit_calibration
from eldr.cli.main import main
from eldr.evaluate import ablations, aggregated, comparisons, drift, named, overhead, scaling
from eldr.evaluate.bench import Bench, EvaluationError
from eldr.evaluate.results import Results, TraceResults, parse_results, rounded, write_results
from eldr.evaluate.run import EXPERIMENTS, Plan, about, evaluate
from eldr.policies.expected_union import TAIL_GUARD
from eldr.replay.split import take_requests
from eldr.report.evaluation import write_evaluation
from eldr.report.evaluation.comparisons import knobs_section, pools_section, workloads_section
from eldr.report.style import style
from eldr.trace import write_trace
from tests.synthetic import make_trace, prompts_of_kinds


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    path = tmp_path_factory.mktemp("traces") / "small.npz"
    write_trace(make_trace(requests=90, layers=3, experts=16, kinds=3, steps=25, seed=3, **prompts_of_kinds(90)), path)
    return Bench(path, seeds=2, requests=80)


@pytest.fixture(scope="module")
def rows_of(bench: Bench) -> Callable[..., Any]:
    """Rows of an experiment, made once for all tests."""
    made = {}

    def rows(name: str) -> Any:
        if name not in made:
            made[name] = [row for part in EXPERIMENTS[name].parts(bench) for row in EXPERIMENTS[name].run(bench, part)]
        return made[name]

    return rows


def test_a_load_never_takes_more_requests_than_may_be_in_flight(bench: Bench) -> None:
    assert bench.capacity == int(0.8 * 45)
    assert bench.workers == 4  # 8 x 7 would be too many
    assert bench.batches(4, (1, 7, 9, 9.5)) == [1, 7, 9]
    for experiment in (comparisons.MAIN, comparisons.LOAD, comparisons.POOL):
        for part in experiment.parts(bench):
            assert part["workers"] * part.get("batch", 7) <= bench.capacity


def test_too_few_requests_are_refused(tmp_path: Path) -> None:
    write_trace(make_trace(requests=20), tmp_path / "few.npz")
    with pytest.raises(EvaluationError, match="too few"):
        _ = Bench(tmp_path / "few.npz").workers


def test_the_main_comparison_has_every_policy_in_both_scopes(rows_of: Callable[..., Any]) -> None:
    rows = rows_of("main")
    wanted = {"rr", "random", "p2c", "jsq", "locality-band", "expected-union", "expected-union-own"}
    wanted |= {"expected-union-true", "clairvoyant"}
    cells = {(row["policy"], row["workers"], row["cost_scope"]) for row in rows}
    expected = {(policy, workers, scope) for policy in wanted for workers in (2, 4) for scope in ("step", "moe")}
    assert cells == expected - {("clairvoyant", workers, "moe") for workers in (2, 4)}
    for row in rows:
        if row["policy"] == "jsq":
            assert row["vs_jsq_p99"] == pytest.approx(0)
    # The MoE layers are a part of the step; where the scope is theirs only waiting for the next step remains.
    part = {(row["cost_scope"], row["policy"]): row["moe_tpot_mean_ms"] / row["tpot_mean_ms"] for row in rows}
    for policy in wanted - {"clairvoyant"}:
        assert 0 < part["step", policy] < part["moe", policy] < 1


def test_goodput_keeps_its_limit_and_compares_with_the_balancer(rows_of: Callable[..., Any]) -> None:
    rows = [row for row in rows_of("goodput") if row["relative_limit"] == 1.15]
    by_name = {row["policy"]: row for row in rows}
    assert by_name["jsq"]["vs_jsq"] == 0
    for row in rows:
        assert row["vs_jsq"] == pytest.approx(100 * (row["rate"] / by_name["jsq"]["rate"] - 1))


def test_a_knob_has_its_default_once_and_infinity_as_none(rows_of: Callable[..., Any]) -> None:
    rows = [row for row in rows_of("knobs") if row["knob"] == "tail_guard"]
    assert [row["value"] for row in rows if row["default"]] == [TAIL_GUARD]
    assert rows[-1]["value"] is None
    assert {row["policy"] for row in rows} == {"expected-union"}
    assert {row["policy"] for row in rows_of("knobs") if row["knob"] == "tau"} == {"locality-band"}


def test_a_named_workload_is_run_where_the_trace_has_its_kinds(bench: Bench, tmp_path: Path) -> None:
    assert named.NAMED.parts(bench) == []  # "kind 0" is no kind of any workload
    names = np.array(["code", "Mathematics", "medicine", "law"])
    trace = dataclasses.replace(bench.trace, label=names[np.arange(90) % 4])
    write_trace(trace, tmp_path / "task.npz")
    task = Bench(tmp_path / "task.npz", seeds=2, requests=60)
    (part,) = named.NAMED.parts(task)
    assert part["labels"]["math"] == ["Mathematics"]
    rows = rounded(named.NAMED.run(task, part))
    assert {row["workload"] for row in rows} == {"task"}
    # Each kind has 11 or 12 of the 45 served requests: a quarter of what is in flight may be 0.7 of them.
    assert rows[0]["workers"] * rows[0]["batch_target"] <= 0.7 * 11 * 4 + 1e-9
    section = workloads_section(rows, "small")
    assert "code 25%, math 25%" in section.text
    assert len(section.numbers[0].cells()) == 8


def test_zones_of_any_size_are_less_even_than_balanced_ones(bench: Bench) -> None:
    # Two thirds of one kind: balanced zones must cut it up, others need not.
    trace = bench.trace
    chosen = np.flatnonzero((trace.label == "kind 0") | (np.arange(90) % 9 == 1) | (np.arange(90) % 9 == 2))
    part = take_requests(trace, chosen)
    even = fit_calibration(part, 3, seed=0, compare=False)
    free = next(variant for variant in ablations.VARIANTS if not variant.balanced).change(even, part, seed=0)
    assert even.zone_sizes.max() <= -(-len(chosen) // 3)
    assert free.zone_sizes.max() > even.zone_sizes.max()
    assert free.zone_sizes.sum() == len(chosen)


def test_each_ablation_changes_one_thing() -> None:
    reference = ablations.VARIANTS[0]
    for variant in ablations.VARIANTS[1:]:
        changed = [
            field.name
            for field in dataclasses.fields(variant)
            if field.name not in ("ablation", "name") and getattr(variant, field.name) != getattr(reference, field.name)
        ]
        assert len(changed) == 1


def test_ablations_are_judged_against_the_unchanged_method(rows_of: Callable[..., Any]) -> None:
    rows = rows_of("ablations")
    reference = rows[0]
    assert (reference["vs_paper_p50"], reference["vs_paper_p99_hi"]) == (0, 0)
    for row in rows[1:]:
        # The mean of paired changes is near, but not equal to, the change of means.
        of_means = 100 * (row["tpot_mean_ms"] / reference["tpot_mean_ms"] - 1)
        assert row["vs_paper_mean"] == pytest.approx(of_means, abs=1)


def test_the_mix_changes_between_requests_that_differ(bench: Bench) -> None:
    trace = bench.trace
    for group in (drift.by_labels, drift.by_axis):
        side = group(trace)
        assert set(side.tolist()) == {"before", "after"}
        assert 0.25 < (side == "before").mean() < 0.75
    side = drift.by_labels(trace)
    assert all(len(set(side[trace.label == kind].tolist())) == 1 for kind in np.unique(trace.label))
    same = dataclasses.replace(trace, label=np.full(90, "one"))
    with pytest.raises(EvaluationError, match="same label"):
        drift.by_labels(same)


def test_the_timeline_covers_the_run_and_the_phases_are_its_parts(rows_of: Callable[..., Any]) -> None:
    rows = [row for row in rows_of("drift") if row["grouping"] == "axis"]
    for policy in drift.POLICIES:
        line = [row for row in rows if row["sort"] == "timeline" and row["policy"] == policy]
        times = [row["since_switch_s"] for row in line]
        assert len(line) == 30
        assert times == sorted(times)
        assert times[0] < 0 < times[-1]
        assert sum(time_s < 0 for time_s in times) == pytest.approx(12, abs=1)  # the switch is at 0.4
        before, after = (
            next(r for r in rows if r["sort"] == "change" and r["policy"] == policy and r["phase"] == phase)
            for phase in ("before", "after")
        )
        weights = {"before": 0.4, "after": 0.6}
        mean = weights["before"] * before["tpot_mean_ms"] + weights["after"] * after["tpot_mean_ms"]
        assert mean == pytest.approx(np.mean([row["tpot_mean_ms"] for row in line]), rel=0.05)


def test_correlation_is_pearsons(bench: Bench, rows_of: Callable[..., Any]) -> None:
    rows = rows_of("correlation")
    trace = bench.trace
    profiles = np.stack([trace.decode_profile(request) for request in range(trace.requests)])
    for layer in range(3):
        r = []
        for expert in range(16):
            x = trace.prefill_counts[:, layer, expert] / trace.prompt_tokens
            y = profiles[:, layer, expert]
            if x.std() > 0 and y.std() > 0:
                r.append(stats.pearsonr(x, y).statistic)
        (row,) = (row for row in rows if row["sort"] == "layer" and row["layer"] == layer)
        assert row["r_p50"] == pytest.approx(np.median(r), abs=1e-6)
        assert row["r_p10"] == pytest.approx(np.percentile(r, 10), abs=1e-6)
    assert sum(row["share"] for row in rows if row["sort"] == "histogram") == pytest.approx(1)


def test_active_experts_of_batches(bench: Bench, rows_of: Callable[..., Any]) -> None:
    rows = rows_of("kinds")
    at = {(row["batch"], row["requests"]): row for row in rows}
    assert at[1, "mixed"]["active_experts"] == pytest.approx(2)  # top-2
    # Independent requests of known mean profile: an expert is missed by all of them.
    trace = bench.trace
    mean = trace.decode_profiles().mean(axis=0)
    expected = (1 - (1 - mean) ** 4).sum() / 3
    assert at[4, "mixed"]["active_experts"] == pytest.approx(expected, rel=0.05)
    assert at[4, "one kind"]["vs_mixed"] < -20  # the made-up kinds differ strongly
    assert at[4, "alike"]["vs_mixed"] < -20


def test_signatures_have_one_point_a_request(rows_of: Callable[..., Any]) -> None:
    rows = rows_of("signatures")
    assert sum(row["sort"] == "request" for row in rows) == 90
    sizes = [row["requests"] for row in rows if row["sort"] == "centroid"]
    assert sum(sizes) == 90
    assert len(sizes) == 4


def test_predictors_are_judged_on_requests_that_they_were_not_fitted_on(
    bench: Bench, rows_of: Callable[..., Any]
) -> None:
    rows = rows_of("predictors")
    judged = [row for row in rows if row["sort"] == "judgement"]
    assert {row["predictor"] for row in judged} == {"fitted", "own frequencies"}
    assert all(row["r2"] < 1 for row in judged)
    for row in rows:
        if row["sort"] == "union":
            assert 2 <= row["recorded"] <= 16
            assert abs(row["predicted"] - row["recorded"]) < 4
    split = bench.laboratory.split(0)
    assert not set(split.serve.tolist()) & set(split.calibrate.tolist())


def test_memory_of_the_cache_is_the_documented_share(rows_of: Callable[..., Any]) -> None:
    rows = {(row["model"], row["block_tokens"]): row["share_percent"] for row in rows_of("memory")}
    assert rows["Qwen3-30B-A3B", 16] == pytest.approx(0.39, abs=0.005)  # docs/vllm.md, from vLLM's own cache
    assert rows["GPT-OSS-120B", 16] == pytest.approx(0.78, abs=0.005)
    assert rows["Qwen3-30B-A3B", 64] == pytest.approx(rows["Qwen3-30B-A3B", 16] / 4)


def test_decisions_are_timed_for_every_policy(rows_of: Callable[..., Any]) -> None:
    rows = rows_of("decisions")
    assert {row["what"].partition(":")[0] for row in rows} == {
        "counts", "jsq", "locality-band", "expected-union", "expected-union-own"
    }  # fmt: skip
    assert all(0 <= row["p50_us"] <= row["p99_us"] for row in rows)


def test_capture_is_left_out_without_pytorch(bench: Bench) -> None:
    assert overhead.CAPTURE.run(bench, {}) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text('ab{}[]\n",: é', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab{}\n", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text("kx{", max_size=3), json_values, max_size=4), max_size=3))
def test_results_survive_the_file(tmp_path_factory: pytest.TempPathFactory, rows: Any) -> None:
    path = tmp_path_factory.mktemp("results") / "results.json"
    results = Results({"seeds": 2}, [TraceResults({"name": "a"}, {"main": rows}, {"load": "why"})], {"memory": rows})
    write_results(results, path)
    read = parse_results(json.loads(path.read_text()), path)
    assert read.traces[0].experiments["main"] == rounded(rows)
    assert read.common["memory"] == rounded(rows)
    assert read.traces[0].skipped == {"load": "why"}


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        ({}, "'format' is missing"),
        ({"format": "eldr-cost-v1"}, "expected 'eldr-evaluation-v1'"),
        ([], "not the results"),
        ({"format": "eldr-evaluation-v1", "traces": [{}], "common": {}, "made": {}}, "'about' is missing"),
        ({"format": "eldr-evaluation-v1", "traces": [], "common": {"memory": [1]}, "made": {}}, "not a list of rows"),
    ],
)
def test_what_is_no_results_file_is_refused(wire: dict[str, str] | list[Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=reason):
        parse_results(wire, tmp_path / "results.json")


def test_an_evaluation_goes_on_where_it_stopped(bench: Bench, tmp_path: Path) -> None:
    heard = []
    plan = Plan((bench.path,), tmp_path, only=("memory", "kinds", "correlation"), seeds=2, requests=60, processes=2)
    first = evaluate(plan, lambda done, total, last: heard.append((done, total)))
    assert heard[0] == (0, 3)
    assert heard[-1] == (3, 3)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(kept) == 3
    again = evaluate(plan, lambda done, total, last: heard.append((done, total)))
    assert heard[-1] == (3, 3)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == kept
    assert set(first.traces[0].experiments) == {"kinds", "correlation"}
    assert set(first.common) == {"memory"}
    with pytest.raises(EvaluationError, match="no experiment 'speed'"):
        evaluate(dataclasses.replace(plan, only=("speed",)), lambda done, total, last: None)


def test_the_command_writes_a_folder(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["evaluate", str(bench.path), "-o", str(out), "--keep", str(tmp_path / "keep"), "--seeds", "2"]
    assert main([*command, "--only", "memory,signatures"]) == 0
    results = parse_results(json.loads((out / "results.json").read_text()), out)
    assert set(results.common) == {"memory"}
    assert set(results.traces[0].experiments) == {"signatures"}
    assert {path.name for path in out.iterdir()} == {"report.html", "README.md", "results.json", "pictures"}
    assert main([*command, "--only", "speed"]) == 2


def test_page_and_readme_have_every_section_picture_and_number(
    bench: Bench, rows_of: Callable[..., Any], tmp_path: Path
) -> None:
    experiments = {name: rounded(rows_of(name)) for name in EXPERIMENTS if name not in ("aggregated", "scaling")}
    # 25 steps after a thousand tokens of prompt: no more than two fit the made-up requests.
    light = [{"workers": 2, "batch": 2.0, "chunk": chunk} for chunk in (None, 8192)]
    experiments["aggregated"] = rounded([row for part in light for row in aggregated.AGGREGATED.run(bench, part)])
    experiments["scaling"] = rounded(scaling.SCALING.run(bench, {"trace": "recorded", "workers": 2, "batch": 2.0}))
    common = {name: experiments.pop(name) for name in ("memory", "prompt-costs")}
    common |= {"capture": [{"what": "add", "prompt_tokens": 9, "p50_us": 123.4}]}
    results = Results({"seeds": 2, "requests": 80}, [TraceResults(about(bench), experiments, {"pools": "few"})], common)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "old-trace.png").write_bytes(b"")
    write_evaluation(results, tmp_path)
    page, readme = (tmp_path / "report.html").read_text(), (tmp_path / "README.md").read_text()
    titles = ["Who is faster", "TPOT against load", "Goodput", "Active experts against batch", "When the mix changes"]
    titles += ["Median against tail: the knobs", "Ablations", "Prefill against decode", "How reliable the predictor is"]
    titles += ["Signatures from prompts", "Learning while serving", "Signatures from prompts when the mix changes"]
    titles += ["Shared instructions and conversations", "Aggregated serving", "Expert parallelism", "Unequal workers"]
    titles += ["Experts in host memory", "More workers and experts"]
    titles += ["Signatures and zones", "Time of a decision", "Memory of the signature cache", "Capture"]
    for title in titles:
        assert f"<h2>{title}" in page
        assert f"### {title}" in readme
    assert "Size of the pool" not in page  # 45 served requests are too few for 8 workers at batch 7,
    assert "Left out, pools: few" in readme  # which is said
    links = set(re.findall(r'href="([^"]*)"', page))
    assert {link[1:] for link in links} <= set(re.findall(r'id="([^"]*)"', page))
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert "old-trace.png" not in pictures
    assert all(f"pictures/{name}" in readme for name in pictures)
    assert readme.count("![") == len(pictures) == page.count("<figure>")
    assert all((tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    for name in (
        "main",
        "load",
        "knobs",
        "ablations",
        "drift",
        "prompt-signatures",
        "prompt-change",
        "prompt-texts",
        "aggregated",
        "unequal",
    ):
        for row in experiments[name]:
            assert f"{row['tpot_p99_ms']:.2f}" in readme
    for row in experiments["goodput"]:
        assert f"{row['rate']:.1f}" in readme


def test_a_pool_that_can_be_replayed_is_shown(bench: Bench, tmp_path: Path) -> None:
    rows = [row for workers in (2, 4) for row in comparisons.POOL.run(bench, {"workers": workers, "batch": 3.0})]
    section = pools_section(rounded(rows), "small", bench.capacity)
    assert f"at most {bench.capacity} requests in flight" in section.text
    assert len(section.numbers[0].cells()) == 14
    (picture,) = section.pictures
    with style():
        figure = picture.draw()
    assert [axis.get_title() for axis in figure.axes] == ["median TPOT, batch 3", "p99 TPOT, batch 3"]


def test_a_value_is_called_better_than_the_default_only_beyond_the_intervals() -> None:
    def row(value: float, p50: float, p99: float, *, default: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {"knob": "tail_guard", "value": value, "default": default, "workers": 4}
        for name, change in (("p50", p50), ("p99", p99)):
            key = f"vs_best_baseline_{name}"
            found |= {key: change, f"{key}_lo": change - 1, f"{key}_hi": change + 1}
        return found

    default = row(1, -20, -17, default=True)
    text = knobs_section([default, row(0, -20.5, -17.5), row(2, -15, -25)], "small").text
    assert "every value pays for what it gains" in text
    text = knobs_section([row(0.5, -20, -19.5), row(4, -22.5, -17), default], "small").text
    assert "a better p99 and no worse a median with tail guard 0.5" in text
    assert "a better median and no worse a p99 with tail guard 4" in text


def test_the_page_says_which_version_made_it(bench: Bench, tmp_path: Path) -> None:
    plan = Plan((bench.path,), tmp_path / "keep", only=("memory",), seeds=2, requests=40, processes=1)
    results = evaluate(plan, lambda done, total, last: None)
    assert results.made == {"version": eldr.__version__, "seeds": 2, "requests": 40}
    write_evaluation(results, tmp_path)
    assert f"by version {eldr.__version__}" in (tmp_path / "README.md").read_text()
