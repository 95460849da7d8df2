"""The experiment on experts in host memory, on a made-up trace, and its section."""

import re

import pytest

from eldr.evaluate import host_memory
from eldr.evaluate.bench import Bench
from eldr.evaluate.results import rounded
from eldr.report.evaluation.host_memory import host_memory_section
from eldr.trace import write_trace
from tests.synthetic import make_trace


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    path = tmp_path_factory.mktemp("traces") / "made.npz"
    write_trace(make_trace(requests=160, layers=2, experts=32, kinds=4, steps=100, seed=3), path)
    return Bench(path, seeds=4, requests=200)


def test_every_layout_keeps_within_the_trace(bench: Bench) -> None:
    parts = host_memory.HOST_MEMORY.parts(bench)
    assert bench.capacity == 64
    assert {(part["batch"], part["workers"]) for part in parts} == {(4, 8), (7, 5)}
    assert [part["resident"] for part in parts if part["frontier"]] == [0.5]
    assert len(parts) == len(host_memory.LAYOUTS) + 1


def test_what_is_missing_costs_and_locality_brings_it_down(bench: Bench) -> None:
    parts = [part for part in host_memory.HOST_MEMORY.parts(bench) if part["batch"] == 4 and part["evict"] != "lfu"]
    wanted = [part for part in parts if part["resident"] == 0.5 and part["miss_cost"] in ("pcie5", "cpu")]
    rows = [row for part in wanted for row in host_memory.HOST_MEMORY.run(bench, part)]
    layouts = [row for row in rows if not row["frontier"]]
    assert [(row["policy"], row["told"]) for row in layouts] == 2 * [
        ("jsq", False),
        ("locality-band", False),
        ("expected-union", False),
        ("expected-union", True),
    ]
    for row in layouts:
        assert (row["missing"] is None) == (row["miss_cost"] == "cpu")
        if row["policy"] == "jsq":
            assert row["vs_jsq_mean"] == 0
    copied = {(row["policy"], row["told"]): row for row in layouts if row["miss_cost"] == "pcie5"}
    told = copied["expected-union", True]
    assert told["missing"] < copied["jsq", False]["missing"]
    assert told["vs_jsq_mean"] < -10
    assert told["rate"] > copied["jsq", False]["rate"]
    frontier = [row for row in rows if row["frontier"]]
    assert [(row["anchor"], row["tail_guard"]) for row in frontier] == list(host_memory.FRONTIER)
    default = next(row for row in frontier if (row["anchor"], row["tail_guard"]) == (0.1, 1.0))
    assert default["vs_jsq_mean"] == pytest.approx(told["vs_jsq_mean"])

    section = host_memory_section(rounded(rows), "made")
    plain = copied["expected-union", False]
    computed = [
        row["vs_jsq_mean"] for row in layouts if row["miss_cost"] == "cpu" and row["policy"] == "expected-union"
    ]
    changes = sorted((told["vs_jsq_mean"] - plain["vs_jsq_mean"], computed[1] - computed[0]))
    assert f"{changes[0]:+.1f} to {changes[1]:+.1f} points" in section.text
    cells = section.numbers[0].cells()
    assert [row[4] for row in cells][-1].endswith(", told")
    assert re.fullmatch(r"\d+\.\d\d", cells[0][5])
    assert cells[-1][5] == "–"
    assert len(section.numbers[1].rows) == len(host_memory.FRONTIER)
    for picture in section.pictures:
        assert picture.draw().axes
