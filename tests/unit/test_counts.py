"""The wire form of expert counts: round trips, size, and every way in which it can be wrong."""

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.counts import CountsError, ExpertCounts, decode_counts, encode_counts, encode_unavailable, pack


def draw_counts(seed: int, layers: int, experts: int, top_k: int, prompt_tokens: int, skew: float) -> ExpertCounts:
    """Counts as a router makes them: every token picks top_k distinct experts, by Gumbel top-k over skewed logits."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, skew, (layers, 1, experts))
    gumbel = rng.gumbel(size=(layers, prompt_tokens, experts))
    chosen = np.argpartition(-(logits + gumbel), top_k - 1, axis=2)[:, :, :top_k]
    counts = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in chosen])
    return ExpertCounts(counts.astype(np.uint32), prompt_tokens, top_k)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    layers=st.integers(1, 6),
    experts=st.integers(1, 40),
    prompt_tokens=st.integers(1, 700),
    skew=st.floats(0, 5),
    data=st.data(),
)
def test_round_trip_through_json(
    seed: int, layers: int, experts: int, prompt_tokens: int, skew: float, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    counts = draw_counts(seed, layers, experts, top_k, prompt_tokens, skew)
    back = decode_counts(json.loads(json.dumps(encode_counts(counts))))
    assert back.counts.dtype == np.uint32
    assert np.array_equal(back.counts, counts.counts)
    assert (back.prompt_tokens, back.top_k) == (prompt_tokens, top_k)


@pytest.mark.parametrize("prompt_tokens", [1, 255, 256, 65_535, 65_536, 20_000_000])
def test_counts_of_any_size_survive(prompt_tokens: int) -> None:
    """One expert takes every token: values just below and above the byte boundaries."""
    counts = ExpertCounts(np.array([[prompt_tokens, 0, 0], [0, 0, prompt_tokens]], dtype=np.uint32), prompt_tokens, 1)
    assert np.array_equal(decode_counts(encode_counts(counts)).counts, counts.counts)


def unpacked(low_bits: int, high_bits: int, data: bytes, count: int) -> list[int]:
    """The numbers that `pack` wrote, read bit by bit as its documentation says."""
    stream = iter(data)

    def part(bits: int, numbers: int) -> list[int]:
        whole = int.from_bytes(bytes(next(stream) for _ in range((bits * numbers + 7) // 8)), "little")
        return [whole >> (bits * index) & ((1 << bits) - 1) for index in range(numbers)]

    low = part(low_bits, count)
    if high_bits:
        marks = part(1, count)
        high = iter(part(high_bits, sum(marks)))
        low = [number | (next(high) << low_bits if mark else 0) for number, mark in zip(low, marks, strict=True)]
    assert not list(stream)
    return low


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40) | st.integers(0, 2**32 - 1), min_size=1, max_size=200))
def test_packed_numbers_are_those_that_were_packed(numbers: list[int]) -> None:
    low_bits, high_bits, data = pack(np.array(numbers, dtype=np.uint32))
    assert unpacked(low_bits, high_bits, data, len(numbers)) == numbers
    most = max(numbers).bit_length()
    assert low_bits + high_bits == most
    for low in range(most + 1):  # no other split takes much less room
        larger = sum(number >> low > 0 for number in numbers)
        high = 0 if low == most else (len(numbers) + 7) // 8 + (larger * (most - low) + 7) // 8
        assert len(data) <= (len(numbers) * low + 7) // 8 + high + len(numbers) // 4


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0, 2.0, 4.0])
def test_a_500_token_prompt_at_48_x_128_takes_less_than_8_kib(skew: float) -> None:
    wire = encode_counts(draw_counts(7, 48, 128, 8, 500, skew))
    assert len(json.dumps({"eldr_counts": wire})) < 8 * 1024


def test_the_worst_case_of_a_500_token_prompt_takes_less_than_8_kib() -> None:
    """The geometric distribution has the largest entropy of all counts with the mean 500 x 8 / 128."""
    rng = np.random.default_rng(3)
    counts = np.minimum(rng.geometric(1 / 32.25, (48, 128)) - 1, 500)
    for row in counts:  # repair the sums, which the form requires
        while (gap := 4000 - int(row.sum())) != 0:
            expert = rng.integers(128)
            row[expert] = min(500, max(0, row[expert] + gap))
    wire = encode_counts(ExpertCounts(counts.astype(np.uint32), 500, 8))
    assert len(json.dumps({"eldr_counts": wire})) < 8 * 1024


def test_unavailable_counts_say_why() -> None:
    with pytest.raises(CountsError, match="kv_load") as caught:
        decode_counts(encode_unavailable("kv_load"))
    assert caught.value.reason == "unavailable"


def test_encoding_refuses_inconsistent_counts() -> None:
    with pytest.raises(CountsError, match="layer 1 counts 3 selections, expected 2 prompt tokens x top-1 = 2"):
        encode_counts(ExpertCounts(np.array([[1, 1], [2, 1]], dtype=np.uint32), 2, 1))


def valid_wire() -> dict[str, Any]:
    return encode_counts(draw_counts(1, 3, 8, 2, 20, 1.0))


@pytest.mark.parametrize("key", ["v", "layers", "experts", "top_k", "prompt_tokens", "low_bits", "high_bits", "data"])
@pytest.mark.parametrize("value", [None, -1, 0, 2**40, 1.5, True, "1", [], {}, "\0", "é", "AAAA"])
def test_a_wrong_field_is_an_error_and_nothing_else(key: str, value: Any) -> None:
    with pytest.raises(CountsError):
        decode_counts({**valid_wire(), key: value})


@pytest.mark.parametrize("wire", [None, 1, "x", [], b"", {}, {"v": 1}, {"v": 2}])
def test_foreign_objects_are_errors(wire: Any) -> None:
    with pytest.raises(CountsError):
        decode_counts(wire)


@pytest.mark.parametrize("change", [-1, 1, 50_000_000])
def test_data_of_another_length_is_refused(change: int) -> None:
    wire = valid_wire()
    data = base64.b64decode(wire["data"])
    data = data[:change] if change < 0 else data + bytes(change)
    with pytest.raises(CountsError, match="length"):
        decode_counts({**wire, "data": base64.b64encode(data).decode()})


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_data_never_passes_for_counts(data: st.DataObject) -> None:
    """Flip bytes of the payload: either an error, or counts that still satisfy the layer sums."""
    wire = valid_wire()
    raw = bytearray(base64.b64decode(wire["data"]))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        counts = decode_counts({**wire, "data": base64.b64encode(bytes(raw)).decode()})
    except CountsError:
        return
    assert (counts.counts.sum(axis=1) == 40).all()
    assert counts.counts.max() <= 20


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(valid_wire())) | st.just("unavailable"), json_values))
def test_any_json_object_is_an_error_or_counts(wire: Any) -> None:
    with pytest.raises(CountsError):
        decode_counts({"v": 2, **wire})
