"""Files of prompt models: the same after a round trip, and each kind of damage is refused with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eldr.calibration import CalibrationError, fit_calibration, load_calibration
from eldr.fileio import write_npz
from eldr.kernels import WORD_BUCKETS
from eldr.learning.kept import Kept, KeptError, load_kept
from eldr.prompt.model import ProfileMap, PromptModel, WordTable
from eldr.prompt.words import words_of_text
from eldr.trace import read_trace
from tests.synthetic import make_trace, prompts_of_kinds

RELEASED = Path(__file__).parents[2] / "data" / "0.1.0"
PROMPT = b"How often do these words come? 17 times, I think."


def make_model(rank: int = 3, layers: int = 2, experts: int = 4) -> PromptModel:
    rng = np.random.default_rng(rank)
    words = WordTable(
        rng.uniform(0, 3, WORD_BUCKETS).astype(np.float32),
        rng.integers(-127, 128, (WORD_BUCKETS, rank)).astype(np.int8),
        rng.uniform(0, 0.01, rank).astype(np.float32),
        rng.normal(0, 0.01, rank).astype(np.float32),
    )
    up = rng.normal(0, 0.2, (rank, layers * experts)).astype(np.float32)
    profiles = ProfileMap(rng.uniform(0.2, 0.8, layers * experts).astype(np.float32), up, layers, 2)
    return PromptModel(words, profiles, 0.3, True, 0.25, 77)


@pytest.mark.parametrize("rank", [0, 1, 8])
def test_a_model_is_the_same_after_a_round_trip(rank: int, tmp_path: Path) -> None:
    model = make_model(rank)
    save_model(model, tmp_path / "model.npz")
    found = load_model(tmp_path / "model.npz")
    for half in ("words", "profiles"):
        for name in ("weight", "table", "scale", "offset", "mean", "up", "layers", "top_k"):
            if hasattr(getattr(model, half), name):
                assert np.array_equal(getattr(getattr(found, half), name), getattr(getattr(model, half), name))
    assert (found.strength, found.idf, found.r2, found.requests) == (0.3, True, 0.25, 77)
    assert np.array_equal(found.predict(words_of_text(PROMPT)), model.predict(words_of_text(PROMPT)))


def save_model(model: PromptModel, path: Path) -> None:
    Kept(model, None).save(path)


def load_model(path: Path) -> PromptModel:
    model = load_kept(path).prompts
    assert model is not None
    return model


def contents(model: PromptModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of a model's file, and its meta, written down by hand."""
    arrays = {
        "prompt_weight": model.words.weight,
        "prompt_table": model.words.table,
        "prompt_scale": model.words.scale,
        "prompt_offset": model.words.offset,
        "prompt_mean": model.profiles.mean,
        "prompt_up": model.profiles.up,
    }
    prompt = {"strength": 0.3, "r2": 0.25, "idf": True, "requests": 77}
    meta = {"format": "eldr-learned-v1", "layers": 2, "experts": 4, "top_k": 2, "prompt": prompt}
    return arrays, meta


def test_a_file_written_by_hand_is_read(tmp_path: Path) -> None:
    model = make_model()
    arrays, meta = contents(model)
    write_npz(tmp_path / "model.npz", arrays | {"meta": np.array(json.dumps(meta))})
    assert load_model(tmp_path / "model.npz").predict(words_of_text(PROMPT)) == pytest.approx(
        model.predict(words_of_text(PROMPT)), abs=1e-6
    )


def with_number(value: float, at: int = 1) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        changed = array.copy()
        changed.reshape(-1)[at] = value
        return changed

    return change


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("prompt_weight", None, r"prompt_weight|incomplete"),
        ("prompt_up", None, r"prompt_up|incomplete"),
        ("prompt_weight", lambda array: array[:-1], r"prompt_weight has shape \(65535,\)"),
        ("prompt_table", lambda array: array[:, :2], r"prompt_table has shape \(65536, 2\)"),
        ("prompt_table", lambda array: array.astype(np.int16), "prompt_table"),
        ("prompt_table", lambda array: array.astype(np.uint8), "prompt_table"),
        ("prompt_scale", lambda array: array[None], "prompt_scale"),
        ("prompt_offset", lambda array: array[:2], r"prompt_offset has shape \(2,\)"),
        ("prompt_up", lambda array: array[:, :7], r"prompt_up has shape \(3, 7\)"),
        ("prompt_mean", lambda array: array.astype(np.float64), "prompt_mean"),
        ("prompt_weight", with_number(-1), "prompt_weight holds negative weights"),
        ("prompt_weight", with_number(np.nan), "prompt_weight holds .*NaN"),
        ("prompt_weight", with_number(3e38), "prompt_weight holds a number beyond"),
        ("prompt_scale", with_number(np.inf), "prompt_scale holds"),
        ("prompt_offset", with_number(-1e30), "prompt_offset holds"),
        ("prompt_mean", with_number(np.nan), "prompt_mean holds"),
        ("prompt_up", with_number(1e38), "prompt_up holds"),
    ],
)
def test_arrays_that_cannot_be_right_are_refused(
    name: str, change: Callable[[Any], Any] | None, reason: str, tmp_path: Path
) -> None:
    arrays, meta = contents(make_model())
    if change is None:
        del arrays[name]
    else:
        arrays[name] = change(arrays[name])
    path = tmp_path / "model.npz"
    write_npz(path, arrays | {"meta": np.array(json.dumps(meta))})
    with pytest.raises(KeptError, match=reason) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"learned models {path}: ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "eldr-calibration-v1"}, "not an eldr-learned-v1 file"),
        ({"layers": 3}, "of 8 experts, expected 12"),
        ({"layers": 0}, "0 layers x 4 experts is not"),
        ({"experts": True}, "layers, experts or top_k"),
        ({"top_k": 5}, "layers, experts or top_k"),
        ({"top_k": 0}, "layers, experts or top_k"),
        ({"top_k": None}, "layers, experts or top_k"),
        ({"prompt": None}, "incomplete"),
        ({"prompt": []}, "incomplete"),
        ({"prompt": {"r2": None}}, "r2"),
        ({"prompt": {"strength": "0.3"}}, "strength"),
        ({"prompt": {"idf": 1}}, "idf"),
        ({"prompt": {"requests": 1.5}}, "requests"),
    ],
)
def test_what_the_meta_says_wrongly_is_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    arrays, meta = contents(make_model())
    if isinstance(change.get("prompt"), dict):
        change = {"prompt": {**meta["prompt"], **change["prompt"]}}
    write_npz(tmp_path / "model.npz", arrays | {"meta": np.array(json.dumps({**meta, **change}))})
    with pytest.raises(KeptError, match=reason):
        load_model(tmp_path / "model.npz")


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    save_model(make_model(), path)
    whole = path.read_bytes()
    for content in (b"", b"PK", whole[:-40], whole[: len(whole) // 2], b"no archive"):
        path.write_bytes(content)
        with pytest.raises(KeptError):
            load_model(path)
    with pytest.raises(KeptError, match="No such file"):
        load_model(tmp_path / "none.npz")
    with pytest.raises(KeptError, match=r"exists|Not a directory"):
        save_model(make_model(), path / "model.npz")
    save_model(make_model(), tmp_path / "new" / "folder" / "model.npz")
    assert load_model(tmp_path / "new" / "folder" / "model.npz").requests == 77
    write_npz(path, {"meta": np.array(json.dumps(contents(make_model())[1]))})
    with pytest.raises(KeptError):
        load_model(path)


def test_the_largest_numbers_that_are_read_make_no_nan(tmp_path: Path) -> None:
    arrays, meta = contents(make_model())
    for sign in (1, -1):
        for name in ("prompt_scale", "prompt_offset", "prompt_mean", "prompt_up"):
            arrays[name] = np.full_like(arrays[name], sign * 1e6)
        arrays["prompt_weight"] = np.full_like(arrays["prompt_weight"], 1e6)
        arrays["prompt_table"] = np.full_like(arrays["prompt_table"], 127)
        write_npz(tmp_path / "model.npz", arrays | {"meta": np.array(json.dumps(meta))})
        model = load_model(tmp_path / "model.npz")
        for text in (PROMPT, b"a " * 8000, bytes(range(256)) * 60):
            assert np.isfinite(model.predict(words_of_text(text))).all()


# Within a calibration.


def test_a_calibration_keeps_the_model_of_a_trace_with_prompts(tmp_path: Path) -> None:
    trace = make_trace(requests=60, layers=2, experts=16, **prompts_of_kinds(60))
    calibration = fit_calibration(trace, 2, compare=False)
    assert calibration.prompts is not None
    calibration.save(tmp_path / "calibration.npz")
    found = load_calibration(tmp_path / "calibration.npz").prompts
    assert found is not None
    words = words_of_text(trace.prompt(5))
    assert np.array_equal(found.predict(words), calibration.prompts.predict(words))
    assert (found.r2, found.requests) == (calibration.prompts.r2, 60)


def test_a_calibration_with_half_a_model_is_refused(tmp_path: Path) -> None:
    trace = make_trace(requests=60, layers=2, experts=16, **prompts_of_kinds(60))
    path = tmp_path / "calibration.npz"
    fit_calibration(trace, 2, compare=False).save(path)
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta"]))
    for name in ("prompt_table", "prompt_mean"):
        write_npz(path, {each: array for each, array in arrays.items() if each != name})
        with pytest.raises(CalibrationError, match="the prompt model is incomplete"):
            load_calibration(path)
    without = {**arrays, "meta": np.array(json.dumps({key: meta[key] for key in meta if key != "prompt"}))}
    write_npz(path, without)
    with pytest.raises(CalibrationError, match="the prompt model is incomplete"):
        load_calibration(path)
    only_meta = {name: array for name, array in arrays.items() if not name.startswith("prompt_")}
    write_npz(path, only_meta)
    with pytest.raises(CalibrationError, match="the prompt model is incomplete"):
        load_calibration(path)
    other = {
        **arrays,
        "prompt_mean": np.zeros(16, np.float32),
        "prompt_up": np.zeros((len(arrays["prompt_up"]), 16), np.float32),
    }
    write_npz(path, other)
    with pytest.raises(CalibrationError, match="of 16 experts, expected 32"):
        load_calibration(path)


def test_files_of_the_first_release_have_no_model() -> None:
    assert load_calibration(RELEASED / "calibration.eldr.npz").prompts is None
    trace = read_trace(RELEASED / "trace.npz")
    assert not trace.has_prompts
    assert fit_calibration(trace, 2, compare=False).prompts is None
