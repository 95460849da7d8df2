"""Calibration files: fitted from a trace, the same after a round trip, refused when they are not sound."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.calibration import Calibration, CalibrationError, fit_calibration, load_calibration
from eldr.signature import SignatureError
from eldr.trace import Trace, read_trace, write_trace
from eldr.zones import ZonesError
from tests.synthetic import make_calibration, make_trace


@pytest.fixture(scope="module")
def trace() -> Trace:
    return make_trace(requests=36, layers=4, experts=16, kinds=3, seed=2)


@pytest.fixture(scope="module")
def calibration(trace: Trace) -> Calibration:
    return fit_calibration(trace, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "calibration.npz"


def assert_equal(first: Any, second: Any) -> None:
    """Field by field, arrays bit by bit."""
    for field in dataclasses.fields(first):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if dataclasses.is_dataclass(one):
            assert_equal(one, other)
        elif isinstance(one, np.ndarray):
            assert one.dtype.kind == other.dtype.kind
            assert np.array_equal(one, other), field.name
        else:
            assert one == other, field.name


def test_zones_separate_the_kinds_of_the_trace(trace: Trace, calibration: Calibration) -> None:
    signatures = calibration.signature.transform(trace.prefill_counts)
    nearest = (signatures @ calibration.centroids.T).argmax(axis=1)
    assert len(set(zip(trace.label.tolist(), nearest.tolist(), strict=True))) == 3
    assert calibration.zone_sizes.tolist() == [12, 12, 12]
    assert calibration.rho["count_idf"] > 0.5
    assert set(calibration.rho) == {"count_idf", "count", "sqrt_count", "binary"}


def test_provenance_names_the_trace(trace: Trace, tmp_path: Path) -> None:
    write_trace(trace, tmp_path / "trace.npz")
    provenance = fit_calibration(read_trace(tmp_path / "trace.npz"), 2, seed=7).provenance
    assert provenance["trace_sha256"] == hashlib.sha256((tmp_path / "trace.npz").read_bytes()).hexdigest()
    assert (provenance["model"], provenance["requests"], provenance["seed"]) == ("tiny", 36, 7)
    assert provenance["note"] == "synthetic"
    assert provenance["versions"]["numpy"] == np.__version__


def test_gate_scores_are_compared_where_the_trace_has_them(trace: Trace) -> None:
    scores = trace.prefill_counts.astype(np.float32)
    with_scores = dataclasses.replace(trace, prefill_gate_prob=scores)
    fitted = fit_calibration(with_scores, 2)
    assert fitted.rho["gate_prob"] == pytest.approx(fitted.rho["count"])
    assert "gate_logit" not in fitted.rho


def test_the_picture_keeps_distances_in_a_plane(trace: Trace) -> None:
    """Kinds that lie in a plane stay exactly as far apart as they are."""
    counts = np.zeros((36, 4, 16), dtype=np.uint32)
    for request in range(36):
        counts[request, :, request % 3] = 8
        counts[request, :, 5] = request % 2
    fitted = fit_calibration(dataclasses.replace(trace, prefill_counts=counts), 3, transform="count")
    signatures = fitted.signature.transform(counts)
    spread = np.linalg.norm(signatures - signatures.mean(axis=0), axis=1)
    shown = np.linalg.norm(fitted.picture.points, axis=1)
    assert (shown <= spread + 1e-5).all()
    assert shown.mean() > 0.95 * spread.mean()
    assert fitted.picture.labels.tolist() == trace.label.tolist()


def test_one_trace_and_seed_one_calibration(trace: Trace, calibration: Calibration) -> None:
    again = fit_calibration(trace, 3)
    without_date = [
        dataclasses.replace(one, provenance=one.provenance | {"created_utc": ""}) for one in (calibration, again)
    ]
    assert_equal(*without_date)


def test_progress_is_told(trace: Trace) -> None:
    told: list[Any] = []
    fit_calibration(trace, 2, progress=told.append)
    assert told[0] == "layers for count_idf"
    assert "zones for 2 workers" in told


@pytest.mark.parametrize("transform", ["count_idf", "sqrt_count", "binary"])
def test_round_trip(path: Path, trace: Trace, transform: str) -> None:
    calibration = fit_calibration(trace, 3, transform=transform)
    calibration.save(path)
    loaded = load_calibration(path)
    assert_equal(calibration, loaded)
    assert loaded.workers == 3
    assert str(loaded.geometry) == "4 layers x 16 experts, top-2"


def test_refuses_what_cannot_be_fitted(trace: Trace) -> None:
    with pytest.raises(ZonesError, match="36 calibration requests are too few for 37"):
        fit_calibration(trace, 37)
    with pytest.raises(CalibrationError, match="cannot route on transform 'gate_prob'"):
        fit_calibration(trace, 2, transform="gate_prob")
    silent = dataclasses.replace(
        trace, decode_experts=trace.decode_experts[:0], decode_offsets=np.zeros(37, dtype=np.int64)
    )
    with pytest.raises(SignatureError, match="0 requests with decode steps"):
        fit_calibration(silent, 2)


def rewritten(path: Path, alter: Callable[..., Any]) -> None:
    with np.load(path) as file:
        arrays = {name: file[name].copy() for name in file.files}
    new = alter(arrays)
    np.savez_compressed(path, **(arrays | (new or {})))


def set_at(name: str, index: int | tuple[int, int], value: float) -> Callable[..., Any]:
    def alter(arrays: dict[str, Any]) -> None:
        arrays[name][index] = value

    return alter


def meta_with(**changes: Any) -> Callable[..., Any]:
    return lambda arrays: {"meta": np.array(json.dumps(json.loads(str(arrays["meta"])) | changes))}


BAD = {
    "NaN centroid": (set_at("centroids", (1, 2), np.nan), "centroids holds NaN"),
    "zero centroid": (set_at("centroids", 1, 0), "centroid 1 has length 0"),
    "long centroid": (lambda a: {"centroids": 2 * a["centroids"]}, "has length 2"),
    "NaN idf": (set_at("idf", (0, 0), np.nan), "idf holds NaN"),
    "negative idf": (set_at("idf", (0, 0), -1), "negative weights"),
    "idf of another geometry": (lambda a: {"idf": a["idf"][:, :-1]}, "shape"),
    "idf of other layers": (lambda a: {"idf": a["idf"][:-1]}, "layer_mask has shape"),
    "no layers": (lambda a: {"layer_mask": a["layer_mask"] & False}, "no layer is selected"),
    "other mask": (lambda a: {"layer_mask": ~a["layer_mask"]}, "layer"),
    "mask of numbers": (lambda a: {"layer_mask": a["layer_mask"].astype(np.int64)}, "layer_mask has dtype int64"),
    "float64 centroids": (lambda a: {"centroids": a["centroids"].astype(float)}, "centroids has dtype float64"),
    "no zones": (lambda a: {"centroids": a["centroids"][:0], "zone_sizes": a["zone_sizes"][:0]}, "no zones"),
    "sizes of other zones": (lambda a: {"zone_sizes": a["zone_sizes"][:1]}, "zone_sizes has shape"),
    "negative size": (set_at("zone_sizes", 0, -1), "out of range"),
    "picture of another zone": (set_at("picture_zones", 0, 3), "out of range"),
    "foreign format": (meta_with(format="eldr-calibration-v9"), "eldr-calibration-v9"),
    "top-k too large": (meta_with(top_k=17), "top_k is 17 with 16 experts"),
    "top-k no number": (meta_with(top_k="2"), "top_k is '2'"),
    "unknown transform": (meta_with(transform="magic"), "cannot route on transform 'magic'"),
    "transform a list": (meta_with(transform=[]), "cannot route on transform"),
    "gate transform": (meta_with(transform="gate_logit"), "cannot route on transform 'gate_logit'"),
    "rho NaN": (meta_with(rho={"count_idf": float("nan")}), "not a number from -1 to 1"),
    "rho missing": (meta_with(rho={}), "rho of the transform is missing"),
    "provenance missing": (meta_with(provenance=None), "provenance is missing"),
    "a trace": (meta_with(format="eldr-trace-v1"), "eldr-trace-v1"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_and_says_why(path: Path, calibration: Calibration, name: str) -> None:
    alter, reason = BAD[name]
    calibration.save(path)
    rewritten(path, alter)
    with pytest.raises(CalibrationError) as error:
        load_calibration(path)
    assert str(path) in str(error.value)
    assert reason in str(error.value)


def test_refuses_foreign_and_truncated_files(path: Path, trace: Trace, calibration: Calibration) -> None:
    write_trace(trace, path)
    with pytest.raises(CalibrationError, match="array idf is missing"):
        load_calibration(path)
    path.write_text("not an archive")
    with pytest.raises(CalibrationError, match=r"calibration\.npz: not a complete .npz"):
        load_calibration(path)
    calibration.save(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CalibrationError, match="not a complete"):
        load_calibration(path)
    with pytest.raises(CalibrationError, match="No such file"):
        load_calibration(path.with_name("none.npz"))
    with pytest.raises(CalibrationError, match="No such file"):
        calibration.save(path.parent / "none" / "file.npz")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_files_raise_calibration_errors_only(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "calibration.npz"
    make_calibration().save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    with contextlib.suppress(CalibrationError):  # a byte that says nothing may be damaged
        load_calibration(path)
