"""The experiment on synthetic traces: what is drawn for it, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from eldr.evaluate import scaling
from eldr.evaluate.bench import Bench, EvaluationError
from eldr.evaluate.results import Results, TraceResults, rounded
from eldr.evaluate.run import EXPERIMENTS, about
from eldr.report.evaluation import write_evaluation
from eldr.report.evaluation.scaling import scaling_section
from eldr.report.evaluation.section import SYNTHETIC
from eldr.synthetic import draw_trace, fit_traffic
from eldr.trace import write_trace
from tests.synthetic import make_trace


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    write_trace(make_trace(requests=200, experts=16, kinds=4, steps=60, seed=3), tmp_path / "recorded.npz")
    return Bench(tmp_path / "recorded.npz", seeds=2, requests=120)


def test_pools_of_a_larger_model(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "REQUESTS", 160)
    monkeypatch.setattr(scaling, "EXPERTS", 24)
    monkeypatch.setattr(scaling, "TOP_K", 3)
    parts = scaling.SCALING.parts(bench)
    assert {(part["workers"], part["batch"]) for part in parts if part["trace"] == "scaled"} == {
        (workers, batch) for workers in (8, 16, 40) for batch in (2, 7, 16)
    }
    rows = [row for part in parts[:2] for row in scaling.SCALING.run(bench, part)]
    rows += scaling.SCALING.run(bench, {"trace": "scaled", "workers": 8, "batch": 2.0})
    shapes = {row["trace"]: (row["layers"], row["experts"], row["top_k"]) for row in rows}
    assert shapes == {"recorded": (3, 16, 2), "synthetic": (3, 16, 2), "scaled": (3, 24, 3)}
    assert {row["policy"] for row in rows if row["trace"] == "scaled"} == set(scaling.SHOWN)
    section = scaling_section(rounded(rows), "made")
    assert section.origin == SYNTHETIC
    assert "on the recording and on a synthetic trace by: locality-band" in section.text
    assert len(section.numbers[0].cells()) == 3 * len(scaling.SHOWN)
    section.pictures[0].draw()


def test_a_pool_that_the_trace_cannot_fill(bench: Bench) -> None:
    with pytest.raises(EvaluationError, match="40 workers at batch 7 need 350 requests to serve, and the recorded"):
        scaling.SCALING.run(bench, {"trace": "recorded", "workers": 40, "batch": 7.0})


def test_nothing_is_drawn_like_a_synthetic_trace(bench: Bench, tmp_path: Path) -> None:
    write_trace(draw_trace(fit_traffic(bench.trace, rounds=1), 40), tmp_path / "drawn.npz")
    assert scaling.SCALING.parts(Bench(tmp_path / "drawn.npz")) == []


def test_a_report_on_a_synthetic_trace_says_so(bench: Bench, tmp_path: Path) -> None:
    write_trace(draw_trace(fit_traffic(bench.trace, rounds=1), 60), tmp_path / "drawn.npz")
    drawn = Bench(tmp_path / "drawn.npz")
    rows = rounded(EXPERIMENTS["kinds"].run(drawn, {}))
    results = Results({"seeds": 2, "requests": 9}, [TraceResults(about(drawn), {"kinds": rows}, {})], {})
    write_evaluation(results, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Recorded models: 0, synthetic ones: 1." in text
    assert "## synthetic 3 layers x 16 experts, top-2, like tiny" in text
    assert "drawn: 60 synthetic requests" in text
    assert f"*{SYNTHETIC}*" in text
    assert "computed from the recording" not in text
