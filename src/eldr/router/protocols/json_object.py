"""A JSON object as the text that it was sent as: a few members are looked at, and the rest is passed on untouched."""

from __future__ import annotations

import json
import math
from typing import Final

import orjson

from eldr.kernels import JsonMember, JsonTextError, json_members

# A JSON value. An array or an object is its own text.
Value = str | int | float | bool | bytes | None

QUOTE: Final = ord('"')
OBJECT: Final = ord("{")
ARRAY: Final = ord("[")
# Python reads no integer of more than 4,300 digits.
MOST_DIGITS: Final = 4300
LONG_BYTES: Final = 65536
SPACES: Final = b" \t\r\n"


class JsonObject:
    """The text of an object, and where in it the members stand that somebody wants to know or to replace.

    Of duplicate keys the last one counts, as it does for Python's readers. It takes the memory of its text and a little
    more, and no value is parsed before it is asked for.

    text: UTF-8.
    wanted: the names of the members to find. prefix: those whose names begin so are found as well, unless it is empty.
    members: what was found, in order, with duplicates (`eldr.kernels.JsonMember`).
    Raises JsonTextError if the text is not an object that CPython's json would read.
    """

    def __init__(self, text: bytes, wanted: frozenset[str], prefix: str = "") -> None:
        members, last, count, close = json_members(text, 0, len(text), wanted, prefix)
        self.text = text
        self.members: list[JsonMember] = members
        self._last: dict[str, JsonMember] = last
        self._count = count
        self._close = close

    def __contains__(self, name: str) -> bool:
        return name in self._last

    def span(self, name: str) -> tuple[int, int] | None:
        """Where the value of a member begins and ends. None if there is no such member."""
        member = self._last.get(name)
        return None if member is None else (member[2], member[3])

    def raw(self, name: str) -> bytes | None:
        """The text of a member's value."""
        member = self._last.get(name)
        return None if member is None else self.text[member[2] : member[3]]

    def get(self, name: str) -> Value:
        """A member's value. None if there is no such member, or if it is null."""
        member = self._last.get(name)
        return None if member is None else value_of(self.text[member[2] : member[3]])

    def spliced(self, owned: frozenset[str], added: bytes = b"") -> bytes:
        """Return the object without the members in `owned`, and with those written in `added` at its end.

        owned: names that were wanted. All duplicates go, so that nothing is smuggled and no strict reader finds two.
        added: the text of members, without braces.
        All other bytes are those of `text`, in their order.
        """
        text, close = self.text, self._close
        spans: list[tuple[int, int]] = []
        left, at = self._count, 0
        ends_in_comma = False
        for name, start, _, _, following in self.members:
            if name in owned:
                spans.append((at, start))
                left -= 1
                ends_in_comma = following == close
                at = following
        if not at and not added:
            return text
        spans.append((at, close))
        if ends_in_comma and left and not added:
            self._drop_comma(spans)
        # A slice is a copy, which counts for what is long. A view takes longer to make, which counts for the rest.
        source: bytes | memoryview = text if close < LONG_BYTES else memoryview(text)
        pieces: list[bytes | memoryview] = [source[start:end] for start, end in spans]
        if added:
            if left and not ends_in_comma:
                pieces.append(b",")
            pieces.append(added)
        pieces.append(b"}")
        return b"".join(pieces)

    def _drop_comma(self, spans: list[tuple[int, int]]) -> None:
        """Take the last comma out of what is kept. Nothing but spaces is behind it."""
        while True:
            start, end = spans.pop()
            while end > start and self.text[end - 1] in SPACES:
                end -= 1
            if end > start:
                spans.append((start, end - 1))
                return


def value_of(text: bytes) -> Value:
    """The value of a JSON text that was found to be one."""
    first = text[0]
    if first == QUOTE:
        if b"\\" not in text:
            return text[1:-1].decode("utf-8", "surrogatepass")
    elif first in (OBJECT, ARRAY):
        return text
    elif text.isdigit() and len(text) < MOST_DIGITS:
        return int(text)
    elif text == b"true":
        return True
    elif text == b"false":
        return False
    elif text == b"null":
        return None
    try:
        value: str | int | float = json.loads(text)
    except ValueError:  # an integer of more than MOST_DIGITS
        return math.copysign(math.inf, float(text))
    return value


def tree_of(text: bytes | None) -> object:
    """Parse a small text that a worker wrote. None if there is none, or if it is nested too deeply to be what it is."""
    if text is None:
        return None
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def inner_object(text: bytes | None, wanted: frozenset[str]) -> JsonObject | None:
    """Return an object that stands in a text that was found to be JSON. None if it is none, or repeats itself a lot."""
    try:
        return JsonObject(text, wanted) if text is not None and text[0] == OBJECT else None
    except JsonTextError:
        return None


def utf8(raw: bytes) -> bytes:
    """Return a JSON text as UTF-8 without a byte order mark, as RFC 8259 wants it to be sent.

    vLLM also reads UTF-16 and UTF-32 (`json.detect_encoding`), so these are rewritten: the workers then get one form.
    Raises UnicodeDecodeError.
    """
    # A text in UTF-8 begins with two bytes that are neither null nor part of a byte order mark.
    if len(raw) < 2 or (0 < raw[0] < 0x80 and raw[1]):
        return raw
    encoding = json.detect_encoding(raw)
    if encoding == "utf-8":
        return raw
    if encoding == "utf-8-sig":
        return raw[3:]
    return raw.decode(encoding, "surrogatepass").encode("utf-8", "surrogatepass")
