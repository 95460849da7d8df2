"""Experts as engines state them: numpy's own files are read, and nothing else gets through."""

import base64
import contextlib
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from eldr.counts import CountsError
from eldr.routed_experts import count_rows, decode_ids, decode_npy, moe_rows, parse_geometry


def as_npy(array: np.ndarray, *, pickled: bool = False) -> bytes:
    """vLLM's numpy2base64: base64 of what np.save writes."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=pickled)
    return base64.b64encode(file.getvalue())


def as_ids(array: np.ndarray) -> bytes:
    """SGLang's form: the numbers alone."""
    return base64.b64encode(array.astype("<i4").tobytes())


shapes = st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(1, 3))


@given(st.sampled_from(["u1", "<u2", "<i4"]).flatmap(lambda dtype: arrays.arrays(dtype, shapes)))
def test_reads_what_numpy_saves(rows: np.ndarray) -> None:
    read = decode_npy(as_npy(rows))
    assert read.dtype == np.int32
    assert np.array_equal(read, rows.astype(np.int32))


@given(arrays.arrays("<i4", st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))))
def test_the_layers_follow_from_the_length(rows: np.ndarray) -> None:
    assert np.array_equal(decode_ids(as_ids(rows), rows.shape[0], rows.shape[2]), rows)


def header(declared: str, payload: bytes = b"") -> bytes:
    text = declared.encode().ljust(117) + b"\n"
    return base64.b64encode(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + payload)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "header"),
        (b"no base64!", "cannot be decoded"),
        ("ä".encode(), "cannot be decoded"),
        (base64.b64encode(b"\x93NUMPY\x09\x00"), "header"),
        (as_npy(np.zeros((2, 2, 2))), "dtype <f8"),
        (as_npy(np.zeros((2, 2), "u1")), "2 dimensions"),
        (as_npy(np.asfortranarray(np.zeros((2, 3, 2), "u1"))), "dimensions"),
        (as_npy(np.full((1, 1, 1), {}, dtype=object), pickled=True), "dtype |O"),
        (as_npy(np.zeros((2, 2, 2), ">u2")), "dtype >u2"),
        (as_npy(np.zeros((1, 600, 1), "u1")), "or too large"),
        (as_npy(np.zeros((1, 0, 1), "u1")), "or too large"),
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 2, 2), }"), "or too large"),
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (10**9, 2, 2), }"), "header"),
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (999999999, 2, 2), }"), "or too large"),
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 2, 2), }", b"1234567"), "fit their length"),
        (header("{'descr': '|u1', 'fortran_order': False, 'shape': (2, 2, 2), }", b"123456789"), "fit their length"),
        (header("__import__('os').abort()"), "header"),
    ],
)
def test_what_is_no_experts_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(CountsError, match=message) as error:
        decode_npy(text)
    assert error.value.reason == "malformed"


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 128))
def test_damage_raises_counts_errors_only(noise: bytes, at: int) -> None:
    raw = bytearray(base64.b64decode(as_npy(np.arange(12, dtype="u1").reshape(3, 2, 2))))
    raw[at : at + len(noise)] = noise
    with contextlib.suppress(CountsError):
        decode_npy(base64.b64encode(raw))
    with contextlib.suppress(CountsError):
        decode_npy(noise)


@pytest.mark.parametrize(("length", "rows", "top_k"), [(7, 1, 1), (8, 3, 1), (8, 0, 2), (8, -1, 2), (0, 1, 1)])
def test_ids_that_are_no_rows_are_refused(length: int, rows: int, top_k: int) -> None:
    with pytest.raises(CountsError):
        decode_ids(base64.b64encode(bytes(length)), rows, top_k)


def some_rows(tokens: int = 4, layers: int = 3, experts: int = 8, top_k: int = 2) -> np.ndarray:
    rng = np.random.default_rng(5)
    rows = np.argsort(rng.random((tokens, layers, experts)), axis=-1)[..., :top_k]
    return np.asarray(rows, dtype=np.int32)


@pytest.mark.parametrize("filling", [0, -1])
def test_layers_without_experts_are_left_out(filling: int) -> None:
    rows = some_rows()
    dense = np.full((4, 1, 2), filling, dtype=np.int32)
    with_dense = np.concatenate([dense, rows[:, :2], dense, rows[:, 2:]], axis=1)
    assert np.array_equal(moe_rows(with_dense, 3, 8, 2), rows)
    assert np.array_equal(moe_rows(rows, 3, 8, 2), rows)


def test_a_top_1_layer_that_always_takes_one_expert_is_kept() -> None:
    rows = np.zeros((4, 2, 1), dtype=np.int32)
    assert moe_rows(rows, 2, 8, 1).shape == (4, 2, 1)
    with pytest.raises(CountsError, match="2 layers"):
        moe_rows(rows, 1, 8, 1)


def test_no_rows_are_fine() -> None:
    assert moe_rows(np.zeros((0, 3, 2), dtype=np.int32), 3, 8, 2).shape == (0, 3, 2)


def changed(index: Any, value: Any) -> np.ndarray:
    rows = some_rows()
    rows[index] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (some_rows(layers=2), "geometry"),
        (some_rows(layers=4), "geometry"),
        (some_rows(top_k=3), "geometry"),
        (changed((1, 1, 1), 8), "geometry"),
        (changed((1, 1, 1), -1), "geometry"),
        (changed((2, 0), (5, 5)), "inconsistent"),
    ],
)
def test_rows_that_the_model_cannot_choose_are_refused(rows: np.ndarray, reason: str) -> None:
    with pytest.raises(CountsError) as error:
        moe_rows(rows, 3, 8, 2)
    assert error.value.reason == reason


def test_counts_are_those_of_a_loop() -> None:
    rows = some_rows(tokens=50)
    counted = count_rows(moe_rows(rows, 3, 8, 2), 8)
    counted.check()
    expected = np.zeros((3, 8), dtype=int)
    for token in rows:
        for layer in range(3):
            for expert in token[layer]:
                expected[layer, expert] += 1
    assert np.array_equal(counted.counts, expected)
    assert (counted.prompt_tokens, counted.top_k) == (50, 2)


def test_geometries() -> None:
    assert parse_geometry("48x128x8") == (48, 128, 8)
    for text in ("", "48x128", "48x128x129", "0x1x1", "48x128x8x1", "-1x2x1", "9999x8x2", "48 x 128 x 8"):
        with pytest.raises(CountsError, match="such as 48x128x8"):
            parse_geometry(text)
