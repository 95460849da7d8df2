"""The frames' bytes: what is written is read again, and whatever is read is within the limits."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eldr.learning.lessons import Asked, Lesson
from eldr.policies.shares import Share
from eldr.prompt.words import Words
from eldr.router.peers import wire
from eldr.router.peers.wire import Ask, Bye, Events, Frame, FrameError, Heartbeat, Level, Snapshot, Start, Taught

numbers = st.integers(0, 2**64 - 1)
some = st.integers(0, 2**31 - 1)
codes = st.none() | st.binary(min_size=1, max_size=50).map(lambda data: np.frombuffer(data, dtype=np.uint8))
shares = st.none() | st.builds(Share, codes, some, st.booleans(), st.booleans(), some)
texts = st.text(st.characters(exclude_categories=()), max_size=20)
starts = st.lists(st.builds(Start, st.integers(1, 2**64 - 1), texts, shares, st.booleans()), max_size=6)
levels = st.dictionaries(texts, st.builds(Level, some, st.booleans()), max_size=4)


@st.composite
def lessons(draw: st.DrawFn) -> Lesson:
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    profile = st.binary(min_size=layers * experts, max_size=layers * experts)
    buckets = draw(st.lists(st.integers(0, 65535), unique=True, max_size=8))
    counts = draw(st.lists(st.integers(1, 65535), min_size=len(buckets), max_size=len(buckets)))
    words = Words(np.array(buckets, dtype=np.uint16), np.array(counts, dtype=np.uint16)) if buckets else None
    frequencies = draw(st.none() | profile.map(array))
    asked = Asked(words, draw(st.integers(1, 2**31 - 1)), frequencies)
    return Lesson(layers, experts, draw(st.integers(1, experts)), asked, array(draw(profile)))


def array(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(data, dtype=np.uint8)


ids = st.lists(numbers, max_size=5).map(tuple)
frames: st.SearchStrategy[Frame] = st.one_of(
    st.builds(Events, numbers, numbers, starts, ids, ids, levels),
    st.builds(Heartbeat, numbers, numbers, st.integers(0, 2**32 - 1), numbers, levels),
    st.builds(Snapshot, numbers, numbers, numbers, st.integers(0, 2**32 - 1), st.booleans(), starts),
    st.builds(Ask, numbers),
    st.builds(Bye, numbers),
    st.builds(Taught, numbers, texts, lessons()),
)


def plain(value: Any) -> Any:
    """The same without objects that are never equal."""
    if isinstance(value, Share):
        kept = None if value.codes is None else value.codes.tobytes()
        return kept, value.context_tokens, value.known, value.computes_prompt, value.uncached_tokens
    if isinstance(value, Lesson):
        words, frequencies = value.asked.words, value.asked.frequencies
        return (
            (value.layers, value.experts, value.top_k, value.profile.tobytes(), value.asked.prompt_tokens),
            None if words is None else (words.buckets.tolist(), words.counts.tolist()),
            None if frequencies is None else frequencies.tobytes(),
        )
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    return value


@given(frames)
def test_a_frame_is_read_as_it_was_written(frame: Frame) -> None:
    read = wire.decode(wire.encode(frame))
    assert type(read) is type(frame)
    assert plain(read) == plain(frame)


@given(frames, st.data())
def test_a_frame_that_is_cut_or_has_more_is_refused(frame: Frame, data: st.DataObject) -> None:
    whole = wire.encode(frame)
    with pytest.raises(FrameError):
        wire.decode(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(FrameError):
        wire.decode(whole + b"\0")


@given(frames, st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_frame_with_wrong_bytes_is_refused_or_within_the_limits(frame: Frame, changes: list[tuple[int, int]]) -> None:
    changed = bytearray(wire.encode(frame))
    for at, byte in changes:
        changed[at % len(changed)] = byte
    try:
        read = wire.decode(bytes(changed))
    except FrameError:
        return
    for start in getattr(read, "starts", ()):
        assert start.number > 0
        assert start.share is None or 0 <= start.share.context_tokens <= wire.MOST_COUNT


def test_the_bytes_of_a_start_by_hand() -> None:
    """The form is fixed: replicas of two versions meet while a fleet is upgraded."""
    share = Share(np.array([7, 255], dtype=np.uint8), 300, known=True)
    frame = Events(5, 9, [Start(4, "http://d", share, True)], [], [3], {"m": Level(2, True)})
    assert wire.encode(frame) == (
        b"EL\x01\x01" + struct.pack("<QQ", 5, 9)
        + struct.pack("<HH", 1, 8) + b"http://d"
        + struct.pack("<IQHBIII", 1, 4, 0, 0b11011, 300, 0, 2) + b"\x07\xff"
        + struct.pack("<I", 0) + struct.pack("<IQ", 1, 3)
        + struct.pack("<HH", 1, 1) + b"m" + struct.pack("<I?", 2, True)
    )  # fmt: skip


def test_a_frame_that_is_too_large_is_refused_unread() -> None:
    with pytest.raises(FrameError, match="more than"):
        wire.decode(b"EL\x01\x01" + bytes(wire.MOST_FRAME_BYTES))


def test_a_frame_of_another_version_is_refused_by_number() -> None:
    with pytest.raises(FrameError, match="version 2"):
        wire.decode(b"EL\x02" + wire.encode(Bye(1))[3:])


def test_a_profile_that_nothing_has_is_refused() -> None:
    share = Share(np.zeros(wire.MOST_CODES + 1, dtype=np.uint8), 1)
    with_none = wire.decode(wire.encode(Events(1, 1, [Start(1, "u", share, True)], [], [], {})))
    assert isinstance(with_none, Events)
    assert with_none.starts[0].share.codes is None


@pytest.mark.parametrize(
    ("buckets", "counts", "shape"), [([1, 1], [1, 1], (1, 4, 2)), ([1], [0], (1, 4, 2)), ([1], [1], (1, 4, 5))]
)
def test_a_lesson_that_nobody_had_is_refused(
    buckets: list[int], counts: list[int], shape: tuple[int, int, int]
) -> None:
    words = Words(np.array(buckets, dtype=np.uint16), np.array(counts, dtype=np.uint16))
    lesson = Lesson(*shape, Asked(words), np.zeros(4, dtype=np.uint8))
    with pytest.raises(FrameError):
        wire.decode(wire.encode(Taught(1, "m", lesson)))
