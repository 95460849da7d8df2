"""`eldr place-experts`: the file that SGLang loads, the comparison on requests held out, and whose traffic it is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eldr.cli.main import main
from eldr.expert_ranks.placement import contiguous
from eldr.replay.errors import ReplayError
from eldr.replay.placed_experts import location_file, place_experts, requests_of
from eldr.trace import Trace, write_trace
from tests.synthetic import make_calibration, make_trace


def recorded(tmp_path: Path) -> tuple[Trace, str]:
    trace = make_trace(requests=60, layers=3, experts=16, seed=4, steps=40)
    path = tmp_path / "trace.npz"
    write_trace(trace, path)
    return trace, str(path)


def loaded_by_sglang(file: Path, layers: int, experts: int, redundant: int, ranks: int) -> list[list[int]]:
    """What `ExpertLocationMetadata.init_by_mapping(server_args, model_config, **data)` asks of the file."""
    data = json.loads(file.read_text())
    assert list(data) == ["physical_to_logical_map"], "any other member is an unknown argument"
    rows: list[list[int]] = data["physical_to_logical_map"]
    assert len(rows) == layers
    assert (experts + redundant) % ranks == 0
    for row in rows:
        assert len(row) == experts + redundant
        assert set(row) == set(range(experts))
    return rows


@pytest.mark.parametrize("redundant", [0, 4])
def test_the_command_writes_a_placement_and_what_it_is_worth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], redundant: int
) -> None:
    _, path = recorded(tmp_path)
    out = tmp_path / "experts.json"
    command = ["place-experts", path, "--ranks", "4", "--redundant", str(redundant), "-o", str(out), "--batch", "3"]
    assert main([*command, "--json", "-"]) == 0
    rows = loaded_by_sglang(out, 3, 16, redundant, 4)
    found = json.loads(capsys.readouterr().out)
    assert found["requests"] == 60
    worth = {(row["placement"], row["redundant"], row["replica"]): row["busiest"] for row in found["worth"]}
    plain = worth["contiguous", 0, None]
    assert plain == found["worth"][0]["busiest"]
    assert found["distinct"] / 4 < plain <= 4
    if redundant:
        assert len(worth) == 10
        assert worth["union-aware", 4, "fewest"] < plain
        assert worth["union-aware", 4, "fewest"] <= worth["union-aware", 4, "random"]
    else:
        assert len(worth) == 3
        assert worth["union-aware", 0, None] < plain
    assert main(command) == 0
    assert loaded_by_sglang(out, 3, 16, redundant, 4) == rows, "the seed decides"
    table = capsys.readouterr().out
    assert f"{worth[next(key for key in worth if key[0] == 'union-aware')]:.2f}" in table
    assert str(out) in table.replace("\n", "")


def test_placements_are_compared_on_requests_that_did_not_make_them(tmp_path: Path) -> None:
    """The busiest rank of the written placement, by hand, on all requests held out."""
    trace, _ = recorded(tmp_path)
    calls: list[tuple[int, int]] = []
    placed = place_experts(trace, np.arange(60), 4, 0, 1, 0.5, 7, lambda done, of: calls.append((done, of)))
    order = np.random.default_rng(7).permutation(np.arange(60))
    rows = [
        row for request in order[:30] for row in range(trace.decode_offsets[request], trace.decode_offsets[request + 1])
    ]
    weights = np.repeat(1 / np.diff(trace.decode_offsets)[order[:30]], np.diff(trace.decode_offsets)[order[:30]])
    busiest = []
    for row in rows:
        total = 0
        for layer, slots in enumerate(placed.placement.expert_of_slot.reshape(3, 4, 4).tolist()):
            active = set(trace.decode_experts[row, layer].tolist())
            total += max(len(active & set(rank)) for rank in slots)
        busiest.append(total / 3)
    found = {row["placement"]: row["busiest"] for row in placed.worth}
    # Each step has a random row of a random request, 512 of them.
    assert found["union-aware"] == pytest.approx(np.average(busiest, weights=weights), abs=0.04)
    assert placed.distinct == 2
    assert calls[-1][0] <= calls[-1][1] == 6 * 16


def test_the_traffic_of_one_worker() -> None:
    trace = make_trace(requests=30, layers=3, experts=8)
    assert requests_of(trace, ("kind 1",), None, None).tolist() == list(range(1, 30, 3))
    calibration = make_calibration(zones=4)
    by_zone = [requests_of_zone(trace, calibration, zone) for zone in range(4)]
    assert sorted(request for zone in by_zone for request in zone) == list(range(30))
    signatures = calibration.signature.transform(trace.prefill_counts)
    for zone, requests in enumerate(by_zone):
        for request in requests:
            near = [float(signatures[request] @ centroid) for centroid in calibration.centroids]
            assert near[zone] == max(near)
    both = requests_of(trace, ("kind 1",), calibration, 2).tolist() if set(by_zone[2]) & set(range(1, 30, 3)) else []
    assert both == [request for request in by_zone[2] if request % 3 == 1]


def requests_of_zone(trace: Trace, calibration: Any, zone: int) -> list[int]:
    try:
        return requests_of(trace, None, calibration, zone).tolist()
    except ReplayError:
        return []


def test_layers_without_experts_come_first() -> None:
    """They have the rows of a trivial placement, which SGLang ignores but counts."""
    rows = location_file(contiguous(2, 6, 4, 2), 1)["physical_to_logical_map"]
    assert rows == [[0, 1, 2, 3, 4, 5, 0, 1]] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "5"], "16 experts cannot be divided over 5 ranks; --redundant 4 would fill them"),
        (["--ranks", "4", "--redundant", "2"], "16 experts and 2 redundant ones"),
        (["--ranks", "4", "--labels", "verse"], "no request with the label 'verse'"),
        (["--ranks", "4", "--zone", "1"], "--calibration and --zone belong together"),
        (["--ranks", "4", "--held-out", "0.001"], "leaves none to place experts by, or none to hold out"),
        (["--ranks", "4", "-o", "/nowhere/at/all.json"], "the placement cannot be written"),
    ],
)
def test_what_cannot_be_placed_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    _, path = recorded(tmp_path)
    assert main(["place-experts", path, "-o", str(tmp_path / "experts.json"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "experts.json").exists()


def test_a_calibration_of_another_model_or_without_the_zone_is_refused() -> None:
    trace = make_trace(requests=30, layers=3, experts=16)
    with pytest.raises(ReplayError, match="the calibration is for 3 layers x 8 experts, top-2, the trace has 3 layers"):
        requests_of(trace, None, make_calibration(), 0)
    with pytest.raises(ReplayError, match="no zone 4; the calibration has the zones 0 to 3"):
        requests_of(make_trace(requests=30, layers=3, experts=8), None, make_calibration(), 4)
