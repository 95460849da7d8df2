"""The experiment on aggregated serving, on a made-up trace whose prompts tell its kinds apart."""

import re
from pathlib import Path

import numpy as np
import pytest

from eldr.evaluate import aggregated
from eldr.evaluate.bench import Bench
from eldr.evaluate.results import rounded
from eldr.report.evaluation.aggregated import aggregated_section
from eldr.trace import write_trace
from tests.synthetic import make_trace, prompts_of_kinds


def made(path: Path, *, with_prompts: bool = True) -> Bench:
    prompts = prompts_of_kinds(160, 4) if with_prompts else {}
    write_trace(make_trace(requests=160, experts=32, kinds=4, steps=200, seed=3, **prompts), path)
    return Bench(path, seeds=4, requests=300)


def test_lengths_are_as_those_of_azures_conversations() -> None:
    tokens = aggregated.prompt_lengths()
    assert tokens.dtype == np.int64
    assert tokens.min() >= 1
    assert tokens.max() <= aggregated.MOST_TOKENS
    # Published with the trace: 1,155 tokens on average, a median of 1,020.
    assert tokens.mean() == pytest.approx(1155, rel=0.1)
    assert 700 < np.median(tokens) < 1020


def test_every_load_keeps_within_the_trace(tmp_path: Path) -> None:
    bench = made(tmp_path / "spoken.npz")
    parts = aggregated.AGGREGATED.parts(bench)
    assert bench.capacity == 64
    assert {(part["batch"], part["workers"]) for part in parts} == {(4, 8), (8, 4)}  # two workers at 24 would take all
    assert all(part["batch"] * part["workers"] <= 0.6 * bench.capacity for part in parts)
    assert [part["chunk"] for part in parts][:4] == [None, 512, 2048, 8192]


def test_chunks_share_steps_and_locality_still_pays(tmp_path: Path) -> None:
    bench = made(tmp_path / "spoken.npz")
    parts = [{"workers": 4, "batch": 8.0, "chunk": chunk} for chunk in (None, 512, 8192)]
    rows = [row for part in parts for row in aggregated.AGGREGATED.run(bench, part)]
    assert [row["signature"] for row in rows] == [*aggregated.SIGNATURES] * 3
    at = {(row["chunk"], row["signature"]): row for row in rows}
    for signature in aggregated.SIGNATURES:
        elsewhere, small, large = (at[chunk, signature] for chunk in (None, 512, 8192))
        assert elsewhere["chunk_step_share"] == elsewhere["chunk_time_share"] == 0
        assert "ttft_vs_jsq_p50" not in elsewhere
        # Smaller chunks are in more steps, and a step with a chunk takes longer than one without.
        assert small["chunk_step_share"] > large["chunk_step_share"] > 0
        assert small["chunk_time_share"] > small["chunk_step_share"]
        assert small["ttft_vs_jsq_p50_lo"] <= small["ttft_vs_jsq_p50"] <= small["ttft_vs_jsq_p50_hi"]
    for chunk in (None, 512, 8192):
        gain = {signature: at[chunk, signature]["vs_jsq_mean"] for signature in aggregated.SIGNATURES}
        assert max(gain["prompt"], gain["counts"], gain["true"]) < gain["none"] - 3
    section = aggregated_section(rounded(rows), "spoken")
    kept = [100 * at[chunk, "prompt"]["vs_jsq_mean"] / at[None, "prompt"]["vs_jsq_mean"] for chunk in (512, 8192)]
    assert f"{min(kept):.0f} to {max(kept):.0f} % with words" in section.text
    assert re.search(r"Under jsq, \d+ to \d+ % of the steps have a chunk", section.text)
    assert [cells[2] for cells in section.numbers[0].cells()][::4] == ["elsewhere", "512", "8,192"]


def test_without_prompts_the_rest_is_still_shown(tmp_path: Path) -> None:
    bench = made(tmp_path / "silent.npz", with_prompts=False)
    rows = aggregated.AGGREGATED.run(bench, {"workers": 4, "batch": 4.0, "chunk": 2048})
    assert [row["signature"] for row in rows] == ["none", "counts", "true"]
    section = aggregated_section(rounded(rows), "silent")
    assert "with words" not in section.text
