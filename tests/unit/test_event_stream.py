"""Server-sent events: the same however they arrive, and the same as a plain reading of the standard."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eldr.event_stream import EventReader
from tests.unit.events_by_the_standard import Told, by_the_standard

KEEP = 12


def read(pieces: list[bytes], keep_bytes: int = KEEP) -> list[Told]:
    reader = EventReader(keep_bytes)
    return [(event.type, event.data, event.whole) for piece in pieces for event in reader.feed(piece)]


def cut(stream: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(stream), *(each % (len(stream) + 1) for each in cuts)})
    return [stream[i:j] for i, j in pairwise(at)]


WORDS = st.sampled_from([
    b"data", b"event", b"id", b"retry", b":", b" ", b"\r", b"\n", b"\r\n", b"\n\n", b"\r\n\r\n", b"\xef\xbb\xbf", b"\0",
    b"data: {}\n\n", b"data:[DONE]\n\n", b": ping\n\n", b"event: error\n", b"data: ", b"{1}", b"x" * KEEP, b"y" * 40,
])  # fmt: skip


@given(st.lists(WORDS | st.binary(max_size=3), max_size=30).map(b"".join), st.lists(st.integers(0, 999), max_size=12))
def test_any_cut_gives_the_events_of_the_standard(stream: bytes, cuts: list[int]) -> None:
    expected = by_the_standard(stream, KEEP)
    assert read(cut(stream, cuts)) == expected
    assert read([stream[i : i + 1] for i in range(len(stream))]) == expected


@given(st.lists(WORDS | st.binary(max_size=3), max_size=30))
def test_a_plain_piece_is_one_event_and_changes_nothing(pieces: list[bytes]) -> None:
    reader, fed = EventReader(KEEP), EventReader(KEEP)
    for piece in (*pieces, b"data: {}\n\n"):
        plain = reader.is_plain(piece)
        events = fed.feed(piece)
        if plain:
            assert [event.data for event in events] == [piece[6:-2][:KEEP]]
        else:
            reader.feed(piece)
        assert reader.between == fed.between


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"data: a\n\n", [(b"", b"a")]),
        (b"data:a\n\n", [(b"", b"a")]),
        (b"data:  a \n\n", [(b"", b" a ")]),
        (b"data: a\r\ndata: b\r\rdata\n\n", [(b"", b"a\nb"), (b"", b"")]),
        (b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n", [(b"", b"a")]),
        (b"event: error\ndata: {}\n\ndata: a\n\n", [(b"error", b"{}"), (b"", b"a")]),
        (b"event: ping\n\ndata: a\n\n", [(b"", b"a")]),
        (b": ping\n\nretry: 10\n\nid: 7\n\n", []),
        (b"DATA: a\n\n data: b\n\nid: 1\ndata: c\n\n", [(b"", b"c")]),
        (b"data: a\n\ndata: [DONE]\n", [(b"", b"a")]),
    ],
)
def test_examples(stream: bytes, expected: list[tuple[bytes, bytes]]) -> None:
    assert read([stream]) == [(*event, True) for event in expected]


def test_the_start_of_an_event_without_end_can_be_seen() -> None:
    reader = EventReader(KEEP)
    reader.feed(b"\xef\xbb\xbfevent: big\ndata: 0123")
    assert reader.overlong is None
    unfinished = reader.unfinished
    assert unfinished is not None
    assert (unfinished.type, unfinished.data, unfinished.whole) == (b"big", b"0123", True)
    for _ in range(1000):
        reader.feed(b"456789" * 100)
    start = reader.overlong
    assert start is not None
    assert (start.type, start.data, start.whole) == (b"big", b"012345678945", False)
    (event,) = reader.feed(b"\n\n")
    assert (event.type, event.data, event.whole) == (b"big", b"012345678945", False)
    assert reader.unfinished is None


@pytest.mark.parametrize(
    ("fed", "between"),
    [(b"", False), (b": a\n", True), (b": a", False), (b"data: a\n", False), (b"event: a\n", False), (b"\n\r\n", True)],
)
def test_a_comment_fits_only_between_events(fed: bytes, between: bool) -> None:
    reader = EventReader(KEEP)
    reader.feed(fed)
    assert reader.between is between
