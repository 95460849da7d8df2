"""Traces: what is written is what is read, and what is not a sound trace is refused by name and reason."""

import contextlib
import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eldr.trace import Trace, TraceError, TraceMeta, read_trace, write_trace
from tests.synthetic import make_trace, packed

ARRAYS = ("prefill_counts", "prompt_tokens", "decode_experts", "decode_offsets", "label")


def arrays_of(trace: Trace) -> dict[str, Any]:
    """The arrays of a trace file, assembled here and not by the writer under test."""
    meta = {"format": "eldr-trace-v1", **dataclasses.asdict(trace.meta)}
    return {name: getattr(trace, name) for name in ARRAYS} | {"meta": np.array(json.dumps(meta))}


def save(path: Path, arrays: dict[str, Any]) -> Path:
    np.savez_compressed(path, **arrays)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.npz"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_reads_what_numpy_wrote(path: Path, dtype: type[Any]) -> None:
    trace = make_trace(dtype=dtype)
    save(path, arrays_of(trace))
    read = read_trace(path)
    for name in ARRAYS:
        assert getattr(read, name).dtype == getattr(trace, name).dtype
        assert np.array_equal(getattr(read, name), getattr(trace, name))
    assert read.meta == trace.meta
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_numpy_reads_what_was_written(path: Path) -> None:
    scores = np.random.default_rng(0).normal(size=(24, 3, 16)).astype(np.float32)
    trace = make_trace(arrival_s=np.arange(24.0), prefill_gate_logit=scores, prefill_gate_prob=np.abs(scores))
    write_trace(trace, path)
    with np.load(path, allow_pickle=False) as read:
        for name in (*ARRAYS, "arrival_s", "prefill_gate_logit", "prefill_gate_prob"):
            assert np.array_equal(read[name], getattr(trace, name)), name
        meta = json.loads(str(read["meta"]))
    expected = {"model": "tiny", "layers": 3, "experts": 16, "top_k": 2, "note": "synthetic"}
    assert meta == {"format": "eldr-trace-v1"} | expected
    assert np.array_equal(np.asarray(read_trace(path).prefill_gate_logit), scores)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=20), min_size=4, max_size=4))
def test_prompts_come_back_byte_for_byte(tmp_path_factory: pytest.TempPathFactory, texts: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("prompts") / "trace.npz"
    text, offsets = packed(texts)
    write_trace(make_trace(requests=4, prompt_text=text, prompt_text_offsets=offsets), path)
    read = read_trace(path)
    assert read.has_prompts
    assert [read.prompt(request) for request in range(4)] == texts


def test_a_trace_without_prompts_says_how_to_get_them(path: Path) -> None:
    write_trace(make_trace(), path)
    assert not read_trace(path).has_prompts
    with pytest.raises(TraceError, match="--keep-prompts"):
        read_trace(path).prompt(0)


def test_byte_order_and_memory_order_do_not_matter(path: Path) -> None:
    trace = make_trace()
    arrays = arrays_of(trace)
    arrays["prefill_counts"] = np.asfortranarray(arrays["prefill_counts"]).astype(">u4")
    save(path, arrays)
    assert np.array_equal(read_trace(path).prefill_counts, trace.prefill_counts)
    assert read_trace(path).prefill_counts.dtype.isnative


def test_decode_profiles_are_shares_of_steps() -> None:
    trace = make_trace()
    profiles = trace.decode_profiles()
    for request in range(trace.requests):
        rows = trace.decode_experts[trace.decode_offsets[request] : trace.decode_offsets[request + 1]]
        for layer in range(3):
            for expert in range(16):
                share = sum(expert in row[layer].tolist() for row in rows) / len(rows)
                assert profiles[request, layer, expert] == pytest.approx(share)
        assert np.array_equal(trace.decode_profile(request), profiles[request])


def test_a_request_without_decode_steps_has_an_empty_profile() -> None:
    trace = make_trace()
    offsets = trace.decode_offsets.copy()
    offsets[5] = offsets[4]  # request 4 gives its rows to request 5
    profiles = dataclasses.replace(trace, decode_offsets=offsets).decode_profiles()
    assert not profiles[4].any()
    assert np.allclose(profiles[5].sum(axis=-1), 2)


def altered(name: str, change: Callable[..., Any]) -> Callable[..., Any]:
    def alter(arrays: dict[str, Any]) -> None:
        array = arrays[name].copy()
        arrays[name] = array if (new := change(array)) is None else new

    return alter


def set_at(index: Any, value: int) -> Callable[..., Any]:
    def change(array: NDArray[Any]) -> None:
        array[index] = value

    return change


def move_one(array: NDArray[np.uint32]) -> None:
    """One selection moved to another layer: the request's total still fits."""
    array[3, 0, int(array[3, 0].argmax())] -= 1
    array[3, 1, 0] += 1


def over_prompt(array: NDArray[np.uint32]) -> None:
    array[2, 1] = 0
    array[2, 1, 0] = array[2, 0].sum()


def meta_with(**changes: Any) -> Callable[..., Any]:
    return lambda arrays: arrays.update(meta=np.array(json.dumps(json.loads(str(arrays["meta"])) | changes)))


def drop(name: str) -> Callable[..., Any]:
    return lambda arrays: arrays.pop(name)


def put(**new: Any) -> Callable[..., Any]:
    return lambda arrays: arrays.update(new)


TEXT, TEXT_OFFSETS = packed([b"\xff"] * 24)
FLOATS = np.ones((24, 3, 16), dtype=np.float32)
BAD = {
    "counts as int64": (altered("prefill_counts", lambda a: a.astype(np.int64)), "prefill_counts has dtype int64"),
    "counts as float": (altered("prefill_counts", lambda a: a.astype(np.float32)), "prefill_counts has dtype float32"),
    "experts as int32": (altered("decode_experts", lambda a: a.astype(np.int32)), "decode_experts has dtype int32"),
    "experts flat": (altered("decode_experts", lambda a: a.reshape(-1)), "expected 3 dimensions"),
    "selection in the wrong layer": (altered("prefill_counts", move_one), "request 3 counts"),
    "expert over prompt": (altered("prefill_counts", over_prompt), "more often than there are prompt tokens"),
    "negative prompt": (altered("prompt_tokens", set_at(1, -4)), "request 1 has -4 prompt tokens"),
    "expert out of range": (altered("decode_experts", set_at((7, 2, 1), 16)), "row 7 names expert 16 of 16"),
    "expert twice": (altered("decode_experts", set_at((5, 1), 3)), "row 5 names an expert twice"),
    "offsets fall": (altered("decode_offsets", set_at(3, 10**6)), "decode_offsets do not rise"),
    "offsets start late": (altered("decode_offsets", set_at(0, 1)), "decode_offsets do not rise"),
    "offsets end early": (altered("decode_offsets", lambda a: np.minimum(a, a[-1] - 1)), "decode_offsets do not rise"),
    "offsets too few": (altered("decode_offsets", lambda a: a[:-1]), "decode_offsets has shape"),
    "labels too few": (altered("label", lambda a: a[:-1]), "label has shape"),
    "mixed layers": (altered("decode_experts", lambda a: a[:, :2]), "3 layers, decode_experts 2"),
    "meta of other layers": (meta_with(layers=4), "meta says"),
    "meta of other experts": (meta_with(experts=17), "meta says"),
    "meta of other top-k": (meta_with(top_k=3), "meta says"),
    "meta true": (meta_with(layers=True), "layers is True"),
    "foreign format": (meta_with(format="eldr-trace-v9"), "eldr-trace-v9"),
    "model no text": (meta_with(model=["x"]), "model is not text"),
    "meta no JSON": (put(meta=np.array("{")), "not JSON"),
    "meta deep": (put(meta=np.array("[" * 100_000)), "not JSON"),
    "meta a list": (put(meta=np.array("[]")), "not an eldr-trace-v1"),
    "meta missing": (drop("meta"), "meta is missing"),
    "counts missing": (drop("prefill_counts"), "prefill_counts is missing"),
    "object array": (put(label=np.array([{}] * 24, dtype=object)), "pickled"),
    "arrival NaN": (put(arrival_s=np.full(24, np.nan)), "arrival_s holds NaN"),
    "arrival negative": (put(arrival_s=np.full(24, -1.0)), "arrival_s holds negative"),
    "scores infinite": (put(prefill_gate_logit=FLOATS * np.inf), "prefill_gate_logit holds NaN or inf"),
    "probability negative": (put(prefill_gate_prob=-FLOATS), "prefill_gate_prob holds negative"),
    "scores of another geometry": (put(prefill_gate_prob=FLOATS[:, :2]), "prefill_gate_prob has shape"),
    "prompts without offsets": (put(prompt_text=TEXT), "has only one"),
    "offsets without prompts": (put(prompt_text_offsets=TEXT_OFFSETS), "has only one"),
    "prompts too few": (put(prompt_text=TEXT[:-1], prompt_text_offsets=TEXT_OFFSETS[:-1]), "text_offsets has shape"),
    "prompts too short": (put(prompt_text=TEXT[:-1], prompt_text_offsets=TEXT_OFFSETS), "text_offsets do not rise"),
    "prompts out of order": (
        put(prompt_text=TEXT, prompt_text_offsets=np.append(TEXT_OFFSETS[-2::-1], 24)),
        "text_offsets do not rise",
    ),
    "prompts as text": (put(prompt_text=np.array("abc"), prompt_text_offsets=TEXT_OFFSETS), "prompt_text has dtype"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_and_says_why(path: Path, name: str) -> None:
    alter, reason = BAD[name]
    arrays = arrays_of(make_trace())
    alter(arrays)
    save(path, arrays)
    with pytest.raises(TraceError) as error:
        read_trace(path)
    assert str(path) in str(error.value)
    assert reason in str(error.value)


def test_refuses_an_empty_trace(path: Path) -> None:
    trace = make_trace()
    arrays = arrays_of(trace) | {
        "prefill_counts": trace.prefill_counts[:0],
        "prompt_tokens": trace.prompt_tokens[:0],
        "decode_experts": trace.decode_experts[:0],
        "decode_offsets": trace.decode_offsets[:1],
        "label": trace.label[:0],
    }
    with pytest.raises(TraceError, match="no requests"):
        read_trace(save(path, arrays))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a zip at all", b"\x93NUMPY\x01\x00"])
def test_refuses_foreign_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(TraceError, match=r"trace\.npz: "):
        read_trace(path)


def test_refuses_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="directory"):
        read_trace(tmp_path)
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none.npz")


def member(shape: tuple[int, int, int], payload: bytes = b"", dtype: str = "<u4") -> bytes:
    """A .npy with a header that claims `shape` and any payload."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue() + payload


def rewrite(path: Path, name: str, data: bytes) -> None:
    """Replace the member `name` of an archive by raw bytes."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for filename, old in members.items():
            archive.writestr(filename, data if filename == f"{name}.npy" else old)


@pytest.mark.parametrize("shape", [(24, 3, 10**12), (2**62, 4, 4), (-1, 3, 16), (24, 3, 15)])
def test_a_claimed_shape_allocates_nothing(path: Path, shape: tuple[int, int, int]) -> None:
    save(path, arrays_of(make_trace()))
    rewrite(path, "prefill_counts", member(shape, bytes(24 * 3 * 16 * 4)))
    with pytest.raises(TraceError, match="prefill_counts"):
        read_trace(path)


def test_a_decompression_bomb_is_not_unpacked(path: Path) -> None:
    layers, experts, requests = 512, 4096, 20
    save(path, arrays_of(make_trace()))
    zeros = bytes(layers * experts * 4)
    with zipfile.ZipFile(path) as archive:
        members = {i.filename: archive.read(i) for i in archive.infolist() if i.filename != "prefill_counts.npy"}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        with archive.open("prefill_counts.npy", "w", force_zip64=True) as file:
            file.write(member((requests, layers, experts)))
            for _ in range(requests):
                file.write(zeros)
    with pytest.raises(TraceError, match="claim to unpack to"):
        read_trace(path)


def test_an_array_twice_is_refused(path: Path) -> None:
    save(path, arrays_of(make_trace()))
    with zipfile.ZipFile(path, "a") as archive:
        data = archive.read("label.npy")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("label.npy", data)
    with pytest.raises(TraceError, match="label appears twice"):
        read_trace(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_raise_trace_errors_only(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    path = save(folder / "trace.npz", arrays_of(make_trace(requests=4)))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(TraceError):  # a byte that says nothing may be damaged
        read_trace(path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([*ARRAYS, "meta"]))
def test_damaged_arrays_raise_trace_errors_only(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, name: str
) -> None:
    path = save(tmp_path_factory.mktemp("fuzz") / "trace.npz", arrays_of(make_trace(requests=4)))
    rewrite(path, name, b"\x93NUMPY\x01\x00" + len(raw).to_bytes(2, "little") + raw)
    with pytest.raises(TraceError):
        read_trace(path)


def test_an_invalid_trace_is_not_written(path: Path) -> None:
    trace = make_trace()
    path.write_bytes(b"old")
    wrong = dataclasses.replace(trace, meta=TraceMeta("tiny", 3, 16, 4))
    with pytest.raises(TraceError, match="meta says"):
        write_trace(wrong, path)
    with pytest.raises(TraceError, match="float64"):
        write_trace(dataclasses.replace(trace, prefill_counts=trace.prefill_counts.astype(float)), path)
    with pytest.raises(TraceError, match="No such file"):
        write_trace(trace, path.parent / "none" / "trace.npz")
    assert path.read_bytes() == b"old"
    assert [file.name for file in path.parent.iterdir()] == ["trace.npz"]
