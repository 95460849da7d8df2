"""The wire form of the experts of generated tokens."""

import base64
import json
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from eldr.counts import CountsError, encode_unavailable
from eldr.expert_rows import decode_rows, encode_rows


@settings(max_examples=60, deadline=None)
@given(
    arrays(
        np.uint16,
        st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(1, 4)),
        elements=st.integers(0, 255) | st.integers(0, 4095),
    )
)
def test_round_trip_through_json(rows: NDArray[np.uint16]) -> None:
    back = decode_rows(json.loads(json.dumps(encode_rows(rows))))
    assert back.shape == rows.shape
    assert np.array_equal(back, rows)


@pytest.mark.parametrize(("largest", "dtype"), [(255, "u1"), (256, "u2")])
def test_the_smallest_dtype_is_used(largest: int, dtype: str) -> None:
    assert encode_rows(np.full((1, 1, 1), largest, dtype=np.int64))["dtype"] == dtype


@pytest.mark.parametrize("key", ["v", "tokens", "layers", "top_k", "dtype", "data"])
@pytest.mark.parametrize("value", [None, -1, 2**40, 1.5, True, "u4", [], "é", "AAAA"])
def test_a_wrong_field_is_an_error(key: str, value: Any) -> None:
    with pytest.raises(CountsError):
        decode_rows({**encode_rows(np.zeros((3, 2, 2), dtype=np.uint8)), key: value})


def test_a_deflate_bomb_is_cut_off() -> None:
    wire = encode_rows(np.zeros((3, 2, 2), dtype=np.uint8))
    with pytest.raises(CountsError, match="wrong data length for 3 x 2 x 2"):
        decode_rows({**wire, "data": base64.b64encode(zlib.compress(bytes(10_000_000))).decode()})


@pytest.mark.parametrize("wire", [None, [], "x", {}, {"v": 1}, {"v": 2}])
def test_foreign_objects_are_errors(wire: dict[str, int] | list[Any] | str | None) -> None:
    with pytest.raises(CountsError):
        decode_rows(wire)


def test_unavailable_rows_say_why() -> None:
    with pytest.raises(CountsError, match="speculative_decoding") as caught:
        decode_rows(encode_unavailable("speculative_decoding"))
    assert caught.value.reason == "unavailable"
