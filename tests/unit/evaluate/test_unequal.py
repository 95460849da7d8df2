"""The experiment on unequal workers, on a made-up trace."""

import pytest

from eldr.cost import DEFAULT_PRESET, PRESETS
from eldr.evaluate import unequal
from eldr.evaluate.bench import Bench
from eldr.evaluate.results import rounded
from eldr.report.evaluation.unequal import unequal_section
from eldr.report.style import style
from eldr.trace import write_trace
from tests.synthetic import make_trace


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    path = tmp_path_factory.mktemp("unequal") / "made.npz"
    write_trace(make_trace(requests=160, experts=32, kinds=4, steps=400, seed=3), path)
    return Bench(path, seeds=4, requests=600)


def test_assumed_costs_follow_bandwidth() -> None:
    layers = 24
    preset = PRESETS[DEFAULT_PRESET].step_cost(layers, "step")
    quick, slow = (unequal.cost_of(kind).step_cost(layers, "step") for kind in ("H200", "H100"))
    assert slow.per_expert_s / quick.per_expert_s == pytest.approx(4.8 / 3.35)
    assert slow.base_s / quick.base_s == pytest.approx(4.8 / 3.35)
    assert preset.per_context_token_s / quick.per_context_token_s == pytest.approx(4.8 / 1.79)
    other = unequal.cost_of("MI300X").step_cost(layers, "step")
    assert other.per_expert_s < quick.per_expert_s < slow.per_expert_s
    assert other.base_s > quick.base_s


def test_every_mix_is_a_part_in_both_scopes(bench: Bench) -> None:
    parts = unequal.UNEQUAL.parts(bench)
    assert len(parts) == 2 * len(unequal.MIXES)
    assert all(part["workers"] * 7 <= bench.capacity for part in parts)


def test_own_costs_count_and_a_run_shorter_than_a_reading_teaches_nothing(bench: Bench) -> None:
    rows = unequal.UNEQUAL.run(bench, {"mix": "H100 and H200", "scope": "moe", "workers": 4})
    at = {(row["policy"], row["belief"]): row for row in rows}
    assert set(at) == set(unequal.POLICIES)
    assert all(row["run_s"] < 2 for row in rows)
    own, learned, equal = (at["expected-union", belief] for belief in ("own", "learned", "equal"))
    assert own["vs_jsq_p50"] < equal["vs_jsq_p50"] - 1
    assert learned["vs_jsq_p50"] == equal["vs_jsq_p50"]
    assert "later_vs_jsq_mean" not in learned
    assert at["jsq-speed", "own"]["vs_jsq_p99"] < -10
    assert at["jsq-speed", "learned"]["vs_jsq_p99"] == 0
    section = unequal_section(rounded(rows), "made")
    assert f"{learned['vs_jsq_mean']:+.1f} and {own['vs_jsq_mean']:+.1f} % (H100 and H200)" in section.text
    (table,) = section.numbers
    assert len(table.cells()) == len(rows)
    (picture,) = section.pictures
    with style():
        figure = picture.draw()
    assert [axis.get_title() for axis in figure.axes] == ["H100 and H200"]
