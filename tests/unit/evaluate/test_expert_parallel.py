"""The experiment on expert parallelism, on a made-up trace of kinds that use different experts."""

import re
from pathlib import Path

import pytest

from eldr.evaluate import expert_parallel
from eldr.evaluate.bench import Bench
from eldr.evaluate.results import rounded
from eldr.report.evaluation.expert_parallel import expert_parallel_section
from eldr.trace import write_trace
from tests.synthetic import make_trace


def made(path: Path, experts: int = 16) -> Bench:
    write_trace(make_trace(requests=160, experts=experts, kinds=4, steps=200, seed=3), path)
    return Bench(path, seeds=4, requests=300)


def test_only_ranks_that_the_experts_fill_are_run(tmp_path: Path) -> None:
    experiment = expert_parallel.EXPERT_PARALLEL
    assert experiment.parts(made(tmp_path / "16.npz")) == [{"ranks": 4}, {"ranks": 8}]
    assert experiment.parts(made(tmp_path / "20.npz", 20)) == [{"ranks": 4}]


def test_every_layout_is_compared_with_its_own_jsq_and_with_contiguous_experts(tmp_path: Path) -> None:
    rows = expert_parallel.EXPERT_PARALLEL.run(made(tmp_path / "16.npz"), {"ranks": 4})
    assert len(rows) == len(expert_parallel.LAYOUTS) * 3
    at = {(row["placement"], row["placement_of"], row["redundant"], row["replica"], row["policy"]): row for row in rows}
    assert {row["redundant"] for row in rows} == {0, 4}, "a quarter of the experts"
    assert len({row["rate"] for row in rows}) == 1
    first = at["contiguous", "fleet", 0, "random", "jsq"]
    for row in rows:
        own = at[row["placement"], row["placement_of"], row["redundant"], row["replica"], "jsq"]
        # A ratio of means over seeds is nearly the mean of ratios.
        for other, key in ((own, "vs_jsq_mean"), (first, "vs_contiguous_mean")):
            expected = 100 * (row["tpot_mean_ms"] / other["tpot_mean_ms"] - 1)
            assert row[key] == pytest.approx(expected, abs=0.5)
    reads = {key[:4]: row["expert_reads_mean"] for key, row in at.items() if key[4] == "jsq"}
    assert reads["union-aware", "fleet", 0, "random"] < reads["contiguous", "fleet", 0, "random"]
    assert reads["eplb", "fleet", 4, "fewest"] < reads["eplb", "fleet", 0, "random"]
    assert reads["eplb", "fleet", 4, "fewest"] < reads["eplb", "fleet", 4, "random"]
    assert at["contiguous", "fleet", 0, "random", "expected-union"]["vs_jsq_mean"] < -5
    section = expert_parallel_section(rounded(rows), "made")
    gains = [row["vs_jsq_mean"] for row in rows if row["policy"] == "expected-union" and not row["redundant"]]
    said = re.search(r"changes mean TPOT by −([\d.]+) to −([\d.]+) % at 4 ranks", section.text)
    assert said is not None
    assert [float(value) for value in said.groups()] == pytest.approx([-max(gains), -min(gains)], abs=0.06)
    random = at["eplb", "fleet", 4, "random", "jsq"]["vs_contiguous_mean"]
    assert f"{random:+.1f}".replace("-", "−") + " % at random" in section.text
    cells = section.numbers[0].cells()
    assert len(cells) == len(rows)
    assert cells[3][:4] == ["EPLB (fleet)", "–", "–", "jsq"]
    assert cells[15][:3] == ["EPLB (fleet)", "4", "at random"]
    assert section.pictures[0].draw().axes[0].get_title() == "4 ranks"
