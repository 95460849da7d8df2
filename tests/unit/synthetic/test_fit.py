"""Synthetic traces measure like the recorded one that their model was fitted to: here the one that ships with eldr."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eldr.cli.main import main
from eldr.replay.split import take_requests
from eldr.synthetic import Geometry, SyntheticError, TrafficModel, draw_trace, fit_traffic, is_synthetic, measure
from eldr.trace import Trace, read_trace, write_trace
from tests.synthetic import make_trace

RECORDED = Path(__file__).parents[3] / "data/small-moe.npz"
# How far a synthetic trace may be from the recorded one, in percent.
UNIONS, SIMILARITY, LENGTHS = 20, 12, 10


@pytest.fixture(scope="module")
def recorded() -> Trace:
    trace = read_trace(RECORDED)
    return take_requests(trace, np.arange(0, trace.requests, 2))


@pytest.fixture(scope="module")
def model(recorded: Trace) -> TrafficModel:
    return fit_traffic(recorded, seed=0)


def differences(recorded: Trace, drawn: Trace) -> dict[str, float]:
    """In percent, by the name of the statistic."""
    found = {one.name: one.value for one in measure(drawn)}
    return {one.name: 100 * (found[one.name] / one.value - 1) for one in measure(recorded) if one.name in found}


def too_far(found: dict[str, float]) -> list[str]:
    def limit(name: str) -> float:
        if name.startswith("union"):
            return UNIONS
        return LENGTHS if " p" in name and name[-2:].isdecimal() else SIMILARITY

    left_out = ("layers together", "first")  # said to be less alike
    return [name for name, value in found.items() if not name.startswith(left_out) and abs(value) > limit(name)]


def test_it_measures_like_the_recording(recorded: Trace, model: TrafficModel) -> None:
    found = differences(recorded, draw_trace(model, recorded.requests, seed=5))
    assert len(found) >= 30
    assert too_far(found) == []


def test_a_model_of_other_traffic_would_be_noticed(recorded: Trace, model: TrafficModel) -> None:
    vague = replace(model, about=0.3 * model.about)
    assert {"overlap kind", "overlap own", "union kind 7", "union alike 7"} <= set(
        too_far(differences(recorded, draw_trace(vague, recorded.requests, seed=5)))
    )


def test_a_larger_geometry_keeps_what_can_be_kept(recorded: Trace, model: TrafficModel, tmp_path: Path) -> None:
    """Shares of popular experts, what is like what, lengths and kinds; not how much steps overlap."""
    geometry = Geometry(6, 300, 12)
    drawn = draw_trace(model, 300, geometry, seed=2, max_steps=40)
    write_trace(drawn, tmp_path / "large.npz")
    read = read_trace(tmp_path / "large.npz")  # which checks every sum and id
    assert (read.meta.layers, read.meta.experts, read.meta.top_k) == (6, 300, 12)
    assert read.decode_experts.dtype == np.uint16
    assert np.diff(read.decode_offsets).max() == 40
    assert set(read.label.tolist()) == set(recorded.label.tolist())
    small, large = ({one.name: one.value for one in measure(trace)} for trace in (recorded, read))
    assert large["popular quarter"] == pytest.approx(small["popular quarter"], rel=0.15)
    assert large["overlap random"] < large["overlap kind"] < large["overlap lag 1"]
    # An even choice overlaps by 12 / 300 instead of 4 / 32.
    assert 12 / 300 * 8 < large["overlap own"] / small["overlap own"] < 1


def test_the_same_seed_draws_the_same_trace(model: TrafficModel) -> None:
    first, again, other = (draw_trace(model, 12, seed=seed, max_steps=9) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.decode_experts, again.decode_experts)
    np.testing.assert_array_equal(first.prefill_counts, again.prefill_counts)
    assert (
        first.decode_experts.shape != other.decode_experts.shape or (first.decode_experts != other.decode_experts).any()
    )


def test_it_says_what_it_is(recorded: Trace, model: TrafficModel) -> None:
    drawn = draw_trace(model, 4)
    assert is_synthetic(drawn.meta.note)
    assert not is_synthetic(recorded.meta.note)
    assert drawn.meta.model == "synthetic 4 layers x 32 experts, top-4, like eldr-small-moe"
    with pytest.raises(SyntheticError, match="fit a model to one that was recorded"):
        fit_traffic(drawn)


@pytest.mark.parametrize("geometry", [Geometry(0, 8, 2), Geometry(2, 8, 8), Geometry(2, 8, 0), Geometry(2, 5000, 2)])
def test_geometries_that_no_model_has(model: TrafficModel, geometry: Geometry) -> None:
    with pytest.raises(SyntheticError, match="leave nothing to choose"):
        draw_trace(model, 4, geometry)


def test_too_few_requests() -> None:
    with pytest.raises(SyntheticError, match="too few to fit"):
        fit_traffic(make_trace(requests=20))


def test_experts_that_nobody_uses() -> None:
    """As those that pad the smaller layers of a model."""
    trace = make_trace(requests=60, layers=2, experts=12, top_k=2, steps=30)
    counts = np.pad(trace.prefill_counts, ((0, 0), (0, 0), (0, 6)))
    padded = replace(trace, prefill_counts=counts, meta=replace(trace.meta, experts=18, note="recorded"))
    with np.errstate(divide="raise", invalid="raise"):
        drawn = draw_trace(fit_traffic(padded, rounds=4), 60)
    use = np.sort(drawn.prefill_counts.sum(axis=0), axis=1)
    assert use[:, :6].sum() < 0.02 * use.sum()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.npz"
    asked = ["synthesize", str(RECORDED), "-o", str(out), "--requests", "9", "--experts", "64", "--max-steps", "5"]
    assert main(asked) == 0
    assert "9 synthetic requests" in capsys.readouterr().out
    assert read_trace(out).meta.experts == 64
    assert main(["synthesize", str(RECORDED)]) == 2
    assert "--check" in capsys.readouterr().err
    assert main(["synthesize", str(out), "--check"]) == 2
    assert "recorded" in capsys.readouterr().err
