"""The experiments on signatures from prompts, on a made-up trace whose prompts tell its kinds apart."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from eldr.evaluate import prompt_costs, prompt_signatures
from eldr.evaluate.bench import Bench, EvaluationError
from eldr.evaluate.results import rounded
from eldr.evaluate.run import Plan, evaluate
from eldr.prompt.words import words_of_text
from eldr.report.evaluation.prompt_signatures import (
    by_signature_section,
    change_section,
    kept_percent,
    learning_section,
)
from eldr.trace import write_trace
from tests.synthetic import make_trace, prompts_of_kinds

EXPERIMENTS = (prompt_signatures.BY_SIGNATURE, prompt_signatures.LEARNING, prompt_signatures.CHANGE)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    path = tmp_path_factory.mktemp("traces") / "spoken.npz"
    write_trace(make_trace(requests=160, experts=32, kinds=4, steps=500, seed=3, **prompts_of_kinds(160, 4)), path)
    return Bench(path, seeds=3, requests=300)


def test_what_is_known_of_a_request_pays(bench: Bench) -> None:
    rows = prompt_signatures.BY_SIGNATURE.run(bench, {"workers": 4})
    mean = {(row["policy"], row["signature"]): row["vs_jsq_mean"] for row in rows}
    assert len(rows) == len(mean) == 8
    union = {signature: value for (policy, signature), value in mean.items() if policy == "expected-union"}
    assert abs(union["none"]) < 2
    # The kinds differ strongly, and each source of knowledge tells them.
    assert max(union[signature] for signature in ("label", "prompt", "counts", "both", "true")) < -6
    (both,) = (row for row in rows if row["signature"] == "both")
    assert 0 <= both["prompt_share"] <= 1
    section = by_signature_section(rounded(rows), "spoken")
    kept = kept_percent(rows, "mean")
    assert kept == pytest.approx(100 * union["prompt"] / union["counts"])
    assert f"{kept:.0f} % of the mean reduction of counts" in section.text


def test_a_label_is_known_by_the_calibration_requests_alone(bench: Bench, tmp_path: Path) -> None:
    laboratory = bench.laboratory
    profiles = bench.trace.decode_profiles().reshape(160, -1)
    chosen = laboratory.split(1).calibrate
    told = prompt_signatures.of_labels(laboratory, 1)
    for request in (0, 1, 2, 3):
        alike = [other for other in chosen.tolist() if other % 4 == request]
        assert told[request] == pytest.approx(profiles[alike].mean(axis=0), abs=1e-6)
    stranger = laboratory.split(1).serve[0]
    labels = bench.trace.label.astype("U12")
    labels[stranger] = "of no other"
    write_trace(dataclasses.replace(bench.trace, label=labels), tmp_path / "stranger.npz")
    other = Bench(tmp_path / "stranger.npz", 2, 100)
    assert np.array_equal(other.laboratory.split(1).calibrate, chosen)
    mean = prompt_signatures.of_labels(other.laboratory, 1)[stranger]
    assert mean == pytest.approx(profiles[chosen].mean(axis=0), abs=1e-6)


def test_both_is_between_words_and_counts(bench: Bench) -> None:
    laboratory = bench.laboratory
    told, share = prompt_signatures.combined(laboratory, 4, 0)
    fitted = laboratory.calibration(4, 0)
    assert fitted is not None
    assert fitted.prompts is not None
    true = bench.trace.decode_profiles().reshape(160, -1)
    served = laboratory.split(0).serve

    def error(predicted: object) -> float:
        return float(((np.asarray(predicted) - true[served]) ** 2).sum())

    words = [fitted.prompts.predict(words_of_text(bench.trace.prompt(request))) for request in served.tolist()]
    assert 0 <= share <= 1
    assert error(told[served]) < 1.05 * error(words)


def test_the_curve_begins_with_nothing_and_falls(bench: Bench) -> None:
    parts = prompt_signatures.LEARNING.parts(bench)
    rows = [row for part in parts for row in prompt_signatures.LEARNING.run(bench, part)]
    for share in (1.0, None):
        line = [row for row in rows if row["sort"] == "curve" and row["share"] == share]
        assert [row["served"] for row in line] == [100, 200, 300]
        whole = next(row for row in rows if row["sort"] == "all" and row["share"] == share)
        assert whole["vs_jsq_mean"] == pytest.approx(np.mean([row["vs_jsq_mean"] for row in line]), abs=1)
        if share is None:
            assert line[0]["vs_jsq_mean"] < -5  # fitted before
        else:
            assert line[0]["vs_jsq_mean"] > line[-1]["vs_jsq_mean"] + 3
    section = learning_section(rounded(rows), "spoken")
    assert [cells[0] for cells in section.numbers[0].cells()] == ["100 %", "25 %", "10 %", "none: fitted before"]


def test_the_mix_changes_both_ways(bench: Bench) -> None:
    parts = prompt_signatures.CHANGE.parts(bench)
    rows = [row for part in parts for row in prompt_signatures.CHANGE.run(bench, part)]
    sides = {(row["fitted"], row["served"]) for row in rows}
    (one, other) = sides
    assert one == other[::-1]
    assert set(f"{one[0]}, {one[1]}".split(", ")) == {f"kind {kind}" for kind in range(4)}
    for side in sides:
        names = [row["signature"] for row in rows if (row["fitted"], row["served"]) == side]
        assert names == list(prompt_signatures.CHANGES)
    by_words = [row["vs_jsq_mean"] for row in rows if row["signature"] == "prompt, fitted to the others"]
    assert f"{by_words[0]:+.1f} and {by_words[1]:+.1f} % by words" in change_section(rounded(rows), "spoken").text


def test_traces_without_prompts_are_left_out_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "silent.npz"
    write_trace(make_trace(requests=90, experts=16, steps=25), path)
    names = tuple(experiment.name for experiment in EXPERIMENTS)
    plan = Plan((path,), tmp_path / "keep", only=names, seeds=2, requests=40, processes=1)
    (trace,) = evaluate(plan, lambda done, total, last: None).traces
    assert set(trace.skipped) == set(names)
    assert not any(trace.experiments.values())
    assert all("no prompts" in reason and "--keep-prompts" in reason for reason in trace.skipped.values())
    with pytest.raises(EvaluationError):
        prompt_signatures.with_prompts(Bench(path))


def test_costs_are_of_prompts_of_4_kb(bench: Bench) -> None:
    rng = np.random.default_rng(0)
    texts = [prompt_costs.make_text(kind, rng) for kind in (0, 0, 1)]
    assert {len(text) for text in texts} == {4096}
    one, same, other = (set(words_of_text(text).buckets.tolist()) for text in texts)
    assert len(one & same) > len(one & other)
    rows = prompt_costs.PROMPT_COSTS.run(bench, {})
    sizes = {row["what"]: row["bytes"] for row in rows if row["sort"] == "memory"}
    rank = rows[0]["rank"]
    assert sizes["table of words"] == 65536 * (rank + 4)  # int8 codes, and a float32 weight
    assert sizes["map to profiles"] == (rank + 1) * 48 * 128 * 4
    assert [row["lessons"] for row in rows if row["sort"] == "fit"] == [300, 300]
    assert all(row["p50_us"] <= row["p99_us"] for row in rows if row["sort"] == "time")
