"""The frames that replicas exchange: what they hold, their bytes, and the limits of what is believed.

All numbers are little-endian. A frame begins with `EL`, the version, its kind, and the origin: 8 random bytes that a
replica draws when it starts, so that one that comes back is another. Texts and tables state their lengths first. A
frame that breaks any limit is refused whole, with FrameError.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from eldr.errors import EldrError
from eldr.learning.lessons import Asked, Lesson
from eldr.policies.shares import Share
from eldr.prompt.words import Words

MAGIC: Final = b"EL"
VERSION: Final = 1
# Kinds of frames.
EVENTS: Final = 1
HEARTBEAT: Final = 2
SNAPSHOT: Final = 3
ASK: Final = 4
BYE: Final = 5
TAUGHT: Final = 6

# NATS refuses messages of more than 1 MiB, unless it is configured otherwise.
MOST_FRAME_BYTES: Final = 2**20
# Senders begin another frame beyond this. One more start fits behind it.
FULL_FRAME_BYTES: Final = 2**19
# The most that one request's profile may have: 256 layers of 1,024 experts.
MOST_CODES: Final = 2**18
MOST_URL_BYTES: Final = 2048
MOST_NAME_BYTES: Final = 1024
MOST_GROUPS: Final = 4096
MOST_WORDS: Final = 2**14
MOST_COUNT: Final = 2**31 - 1

# Bits of a start.
_CODES, _KNOWN, _COMPUTES, _COMPUTED, _SHARE = 1, 2, 4, 8, 16

_HEAD: Final = struct.Struct("<2sBBQ")
_EVENTS: Final = struct.Struct("<Q")
_HEARTBEAT: Final = struct.Struct("<QIQ")
_SNAPSHOT: Final = struct.Struct("<QQI?")
_COUNT: Final = struct.Struct("<I")
_SHORT: Final = struct.Struct("<H")
# Number, index of the worker's URL in the frame, bits, context tokens, uncached tokens, length of the codes.
_START: Final = struct.Struct("<QHBIII")
_LEVEL: Final = struct.Struct("<I?")
# Layers, experts, top-k, tokens of the prompt, number of words, whether the frequencies of the prompt are there.
_LESSON: Final = struct.Struct("<HHHII?")


class FrameError(EldrError):
    """Bytes that are no frame, or one beyond the limits."""


class Start(NamedTuple):
    """One running request.

    number: of the request, in the order of starts at its origin. From 1.
    url: of its worker.
    share: what a policy must know of it, or None.
    computed: whether its worker has computed its prompt, or does not have to.
    """

    number: int
    url: str
    share: Share | None
    computed: bool


class Level(NamedTuple):
    """What a replica needs of the workers of one base model.

    promised: its admitted requests that have no worker yet.
    waits: whether more would start if there were free slots.
    """

    promised: int
    waits: bool


class Events(NamedTuple):
    """What has changed. Within a frame, starts come first.

    sequence: 1 for the first frame of an origin, and one more for each.
    computed: numbers of requests whose prompt has been computed.
    ended: numbers of requests that no longer run.
    levels: name of a base model -> what has changed of its level.
    """

    origin: int
    sequence: int
    starts: Sequence[Start]
    computed: Sequence[int]
    ended: Sequence[int]
    levels: Mapping[str, Level]


class Heartbeat(NamedTuple):
    """A sign of life, with which others check what they know.

    sequence: of the last frame of events. running: how many requests run. digest: see `digest_of`.
    levels: name of a base model -> its level. Those that are not there are zero.
    """

    origin: int
    sequence: int
    running: int
    digest: int
    levels: Mapping[str, Level]


class Snapshot(NamedTuple):
    """A part of all that an origin ran after the frame with this sequence.

    next_number: that its next request will have.
    part: its index, from 0. last: whether it is the last one.
    """

    origin: int
    sequence: int
    next_number: int
    part: int
    last: bool
    starts: Sequence[Start]


class Ask(NamedTuple):
    """The origin wants a snapshot of whoever gets this."""

    origin: int


class Bye(NamedTuple):
    """The origin ends, and so have its requests."""

    origin: int


class Taught(NamedTuple):
    """A finished request that all replicas may learn from. model: the name of its base model."""

    origin: int
    model: str
    lesson: Lesson


Frame = Events | Heartbeat | Snapshot | Ask | Bye | Taught


def digest_of(numbers: Iterable[int]) -> int:
    """A checksum of the running requests that can be kept up to date: the sum of their numbers, modulo 2^64."""
    return sum(numbers) % 2**64


def encode(frame: Frame) -> bytes:
    """Return the bytes of a frame, whose values must be within the limits."""
    if isinstance(frame, Events):
        starts = _starts(frame.starts)
        return b"".join(
            (
                _HEAD.pack(MAGIC, VERSION, EVENTS, frame.origin),
                _EVENTS.pack(frame.sequence),
                *starts,
                _numbers(frame.computed),
                _numbers(frame.ended),
                _levels(frame.levels),
            )
        )
    if isinstance(frame, Heartbeat):
        head = _HEAD.pack(MAGIC, VERSION, HEARTBEAT, frame.origin)
        return head + _HEARTBEAT.pack(frame.sequence, frame.running, frame.digest) + _levels(frame.levels)
    if isinstance(frame, Snapshot):
        head = _HEAD.pack(MAGIC, VERSION, SNAPSHOT, frame.origin)
        part = _SNAPSHOT.pack(frame.sequence, frame.next_number, frame.part, frame.last)
        return b"".join((head, part, *_starts(frame.starts)))
    if isinstance(frame, Taught):
        return _HEAD.pack(MAGIC, VERSION, TAUGHT, frame.origin) + _text(frame.model) + _lesson(frame.lesson)
    return _HEAD.pack(MAGIC, VERSION, ASK if isinstance(frame, Ask) else BYE, frame.origin)


def start_bytes(start: Start) -> int:
    """About how many bytes a start takes, with the URL that it may share with others."""
    share = start.share
    codes = 0 if share is None or share.codes is None else len(share.codes)
    return _START.size + codes + len(start.url)


def _starts(starts: Sequence[Start]) -> list[bytes]:
    urls: dict[str, int] = {}
    parts: list[bytes] = [b"", b"", _COUNT.pack(len(starts))]
    for number, url, share, computed in starts:
        at = urls.setdefault(url, len(urls))
        bits, context, uncached, codes = _COMPUTED * computed, 0, 0, b""
        if share is not None:
            bits |= _SHARE | _KNOWN * share.known | _COMPUTES * share.computes_prompt
            context = min(max(share.context_tokens, 0), MOST_COUNT)
            uncached = min(max(share.uncached_tokens, 0), MOST_COUNT)
            if share.codes is not None and len(share.codes) <= MOST_CODES:
                bits |= _CODES
                codes = share.codes.tobytes()
        parts.append(_START.pack(number, at, bits, context, uncached, len(codes)))
        if codes:
            parts.append(codes)
    parts[0] = _SHORT.pack(len(urls))
    parts[1] = b"".join(_text(url) for url in urls)
    return parts


def _lesson(lesson: Lesson) -> bytes:
    asked = lesson.asked
    words, frequencies = asked.words, asked.frequencies
    parts = [
        _LESSON.pack(
            lesson.layers,
            lesson.experts,
            lesson.top_k,
            min(max(asked.prompt_tokens, 0), MOST_COUNT),
            0 if words is None else len(words),
            frequencies is not None,
        )
    ]
    if words is not None:
        parts += (words.buckets.astype("<u2").tobytes(), words.counts.astype("<u2").tobytes())
    if frequencies is not None:
        parts.append(frequencies.tobytes())
    parts.append(lesson.profile.tobytes())
    return b"".join(parts)


def _numbers(numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<I{len(numbers)}Q", len(numbers), *numbers)


def _levels(levels: Mapping[str, Level]) -> bytes:
    parts = [_SHORT.pack(len(levels))]
    for name, level in levels.items():
        parts += (_text(name), _LEVEL.pack(*level))
    return b"".join(parts)


def text_bytes(text: str) -> bytes:
    """A text as it is sent. Names of models come from JSON, which has more than Unicode."""
    return text.encode("utf-8", "surrogatepass")


def _text(text: str) -> bytes:
    data = text_bytes(text)
    return _SHORT.pack(len(data)) + data


def decode(data: bytes) -> Frame:
    """Read a frame. Raises FrameError, and nothing else, whatever the bytes are."""
    if len(data) > MOST_FRAME_BYTES:
        raise FrameError(f"a frame of {len(data)} bytes, more than {MOST_FRAME_BYTES}")
    try:
        return _decode(data)
    except struct.error:
        raise FrameError("the frame ends too early") from None
    except UnicodeDecodeError:
        raise FrameError("a text is not UTF-8") from None


def _decode(data: bytes) -> Frame:
    magic, version, kind, origin = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise FrameError("it does not begin as a frame does")
    if version != VERSION:
        raise FrameError(f"version {version} of frames, and this router knows {VERSION}")
    reader = _Reader(data, _HEAD.size)
    frame: Frame
    if kind == EVENTS:
        (sequence,) = reader.take(_EVENTS)
        starts, computed, ended = reader.starts(), reader.numbers(), reader.numbers()
        frame = Events(origin, sequence, starts, computed, ended, reader.levels())
    elif kind == HEARTBEAT:
        sequence, running, digest = reader.take(_HEARTBEAT)
        frame = Heartbeat(origin, sequence, running, digest, reader.levels())
    elif kind == SNAPSHOT:
        sequence, next_number, part, last = reader.take(_SNAPSHOT)
        frame = Snapshot(origin, sequence, next_number, part, bool(last), reader.starts())
    elif kind == ASK:
        frame = Ask(origin)
    elif kind == BYE:
        frame = Bye(origin)
    elif kind == TAUGHT:
        frame = Taught(origin, reader.text(MOST_NAME_BYTES), reader.lesson())
    else:
        raise FrameError(f"unknown kind {kind} of frame")
    reader.end()
    return frame


class _Reader:
    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at

    def take(self, form: struct.Struct) -> tuple[int, ...]:
        found = form.unpack_from(self._data, self._at)
        self._at += form.size
        return found

    def end(self) -> None:
        if self._at != len(self._data):
            raise FrameError("something follows the end of the frame")

    def _bytes(self, length: int) -> bytes:
        found = self._data[self._at : self._at + length]
        if len(found) != length:
            raise FrameError("the frame ends too early")
        self._at += length
        return found

    def text(self, most: int) -> str:
        (length,) = self.take(_SHORT)
        if length > most:
            raise FrameError(f"a text of {length} bytes, more than {most}")
        return self._bytes(length).decode("utf-8", "surrogatepass")

    def numbers(self) -> Sequence[int]:
        (count,) = self.take(_COUNT)
        return struct.unpack(f"<{count}Q", self._bytes(8 * count))

    def starts(self) -> list[Start]:
        (urls,) = self.take(_SHORT)
        url = [self.text(MOST_URL_BYTES) for _ in range(urls)]
        (count,) = self.take(_COUNT)
        return [self._start(url) for _ in range(count)]

    def _start(self, urls: Sequence[str]) -> Start:
        number, at, bits, context, uncached, length = self.take(_START)
        if at >= len(urls) or number < 1 or max(context, uncached) > MOST_COUNT:
            raise FrameError("a start beyond the limits")
        if length > MOST_CODES or (length > 0) != bool(bits & _CODES) or bits >= 2 * _SHARE:
            raise FrameError("a start whose profile does not fit its bits")
        if not bits & _SHARE:
            if bits & ~_COMPUTED or context or uncached:
                raise FrameError("a start that says what it has not")
            return Start(number, urls[at], None, bool(bits & _COMPUTED))
        # A copy, or the whole frame would stay as long as one of its requests runs.
        codes = np.frombuffer(self._bytes(length), dtype=np.uint8) if length else None
        share = Share(codes, context, bool(bits & _KNOWN), bool(bits & _COMPUTES), uncached)
        return Start(number, urls[at], share, bool(bits & _COMPUTED))

    def lesson(self) -> Lesson:
        layers, experts, top_k, prompt_tokens, count, has_frequencies = self.take(_LESSON)
        size = layers * experts
        if not 0 < size <= MOST_CODES or not 0 < top_k <= experts or count > MOST_WORDS or prompt_tokens > MOST_COUNT:
            raise FrameError("a lesson beyond the limits")
        words: Words | None = None
        if count:
            buckets, seen = (np.frombuffer(self._bytes(2 * count), dtype="<u2").astype(np.uint16) for _ in range(2))
            if len(np.unique(buckets)) != count or not seen.all():
                raise FrameError("the words of a lesson are not different ones")
            words = Words(buckets, seen)
        frequencies = np.frombuffer(self._bytes(size), dtype=np.uint8) if has_frequencies else None
        if frequencies is not None and not prompt_tokens:
            raise FrameError("a lesson with frequencies of no tokens")
        profile = np.frombuffer(self._bytes(size), dtype=np.uint8)
        return Lesson(layers, experts, top_k, Asked(words, prompt_tokens, frequencies), profile)

    def levels(self) -> dict[str, Level]:
        (count,) = self.take(_SHORT)
        if count > MOST_GROUPS:
            raise FrameError(f"{count} models, more than {MOST_GROUPS}")
        levels: dict[str, Level] = {}
        for _ in range(count):
            name = self.text(MOST_NAME_BYTES)
            promised, waits = self.take(_LEVEL)
            if promised > MOST_COUNT:
                raise FrameError("more requests than there can be")
            levels[name] = Level(promised, bool(waits))
        return levels
