"""The reader of JSON text in Python. It runs if the compiled kernels are missing, and its docstrings describe both.

A text is checked once, and nothing is built from it. What counts as JSON is what `json.loads` of CPython reads, because
vLLM reads the bodies of requests with it: RFC 8259, and besides NaN, Infinity, -Infinity, and surrogates on their own,
escaped or in three bytes of UTF-8.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import NamedTuple, cast

from eldr.kernels._types import (
    JSON_DEPTH,
    JSON_FAULTS,
    JSON_MEMBERS,
    NO_OBJECT,
    TOO_MANY_MEMBERS,
    JsonMember,
    JsonTextError,
    JsonValue,
)

SPACE = re.compile(rb"[ \t\n\r]*+")
STRING = rb'"(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+"'
NAME = re.compile(STRING)
SCALAR = re.compile(
    STRING + rb"|true|false|null|NaN|-?Infinity|-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?"
)
# Most of what is long is made of these: elements with commas behind them.
ELEMENTS = re.compile(rb"(?:(?:%b)[ \t\n\r]*+,[ \t\n\r]*+)*+" % SCALAR.pattern)
ESCAPE = re.compile(rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.)")
# The members of an object that are sorted: json_text.h.
SORTED = 32
NO_VALUE, NO_NAME, NO_COLON, NO_COMMA = 1, 2, 3, 4
UTF8, EXTRA, TOO_DEEP = (JSON_FAULTS.index(fault) for fault in ("Invalid UTF-8", "Extra data", JSON_FAULTS[10]))


class _Found(NamedTuple):
    """A member that was found: its name, where that and the value begin, where the value ends, and where the next is.

    next: of the last one, where the closing brace is.
    """

    member: str
    name: int
    value: int
    value_end: int
    next: int


class JsonNames:
    """The names of the members that somebody wants to know, for any number of texts.

    names: as they are without escapes.
    prefix: members whose names begin so are found as well, unless it is empty.
    """

    def __init__(self, names: Iterable[str], prefix: str = "") -> None:
        self.names = frozenset(names)
        self.prefix = prefix

    def want(self, name: str) -> bool:
        return name in self.names or (self.prefix != "" and name.startswith(self.prefix))


class JsonObject:
    """The text of an object, and where in it the members stand that somebody wants to know or to replace.

    Of duplicates the last one counts, as it does for Python's readers. It takes the memory of its text and a little
    more, and no value is parsed before it is asked for.

    text: UTF-8. The object is text[start:end], with spaces around it.
    names: the members to find. Names are compared without their escapes.
    Raises JsonTextError if that is not an object that CPython's json would read.
    """

    def __init__(self, text: bytes, names: JsonNames, start: int = 0, end: int | None = None) -> None:
        self.text = text
        self._start = start
        self._end = end = len(text) if end is None else end
        self._found: list[_Found] = []
        self._members_in_all = 0
        _check_utf8(text, start, end)
        at = _space(text, start, end)
        if text[at : min(at + 1, end)] != b"{":
            _no_more(text, _value(text, at, end), end)
            raise JsonTextError(NO_OBJECT, at)
        at = _space(text, at + 1, end)
        closed = text[at : min(at + 1, end)] == b"}"
        while not closed:
            value = _name(text, at, end)
            value_end = _value(text, value, end)
            following, closed = _behind(text, value_end, end, b"}")
            self._members_in_all += 1
            name = cast(str, json.loads(text[at : text.rindex(b'"', at, value) + 1]))
            if names.want(name):
                if len(self._found) == JSON_MEMBERS:
                    raise JsonTextError(TOO_MANY_MEMBERS, at)
                self._found.append(_Found(name, at, value, value_end, following))
            at = following
        _no_more(text, at + 1, end)
        self._close = at
        self._last = {found.member: found for found in self._found}

    @property
    def members(self) -> list[JsonMember]:
        """What was found, in order, with duplicates."""
        return [(found.member, found.value, found.value_end) for found in self._found]

    def __contains__(self, name: str) -> bool:
        return name in self._last

    def has_any(self, names: JsonNames) -> bool:
        """Whether there is a member that `names` want. They must be among those that were looked for."""
        return any(names.want(name) for name in self._last)

    def span(self, name: str) -> tuple[int, int] | None:
        """Where in `text` the value of a member begins and ends. None if there is no such member."""
        found = self._last.get(name)
        return None if found is None else (found.value, found.value_end)

    def raw(self, name: str) -> bytes | None:
        """The text of a member's value."""
        found = self._last.get(name)
        return None if found is None else self.text[found.value : found.value_end]

    def get(self, name: str) -> JsonValue:
        """A member's value. None if there is no such member, or if it is null."""
        raw = self.raw(name)
        return None if raw is None else _value_of(raw)

    def inner(self, name: str, names: JsonNames) -> JsonObject | None:
        """An object that is the value of a member. None if that is none, or repeats itself too often."""
        found = self._last.get(name)
        if found is None or self.text[found.value] != ord("{"):
            return None
        try:
            return JsonObject(self.text, names, found.value, found.value_end)
        except JsonTextError:
            return None

    def spliced(self, owned: frozenset[str], added: bytes = b"") -> bytes:
        """Return the object without the members in `owned`, and with those written in `added` at its end.

        owned: names that were wanted. All duplicates go, so that nothing is smuggled and no strict reader finds two.
        added: the text of members, without braces.
        All other bytes are those of `text`, in their order.
        """
        kept: list[bytes] = []
        left, at = self._members_in_all, self._start
        ends_in_comma = False
        for found in self._found:
            if found.member in owned:
                kept.append(self.text[at : found.name])
                left -= 1
                ends_in_comma = found.next == self._close
                at = found.next
        if not kept and not added:
            return self.text[self._start : self._end]
        kept.append(self.text[at : self._close])
        if added:
            if left and not ends_in_comma:
                kept.append(b",")
            kept.append(added)
        elif ends_in_comma and left:  # nothing but spaces is behind it
            kept = [b"".join(kept).rstrip(b" \t\r\n").removesuffix(b",")]
        kept.append(b"}")
        return b"".join(kept)


def json_elements(text: bytes, start: int, end: int, most: int) -> list[tuple[int, int]]:
    """Return where the first `most` elements of the JSON array text[start:end] begin and end.

    No more than these are checked. Raises JsonTextError.
    """
    at = _space(text, start, end)
    if text[at : min(at + 1, end)] != b"[":
        raise JsonTextError(NO_VALUE, at)
    found: list[tuple[int, int]] = []
    at = _space(text, at + 1, end)
    closed = text[at : min(at + 1, end)] == b"]"
    while not closed and len(found) < most:
        value_end = _value(text, at, end)
        found.append((at, value_end))
        at, closed = _behind(text, value_end, end, b"]")
    return found


def json_known_parts(text: bytes, start: int, end: int, known: frozenset[str]) -> bool:
    """Whether all parts of all messages in text[start:end] are of a known `type`.

    Messages are objects in an array. Parts are objects in an array that is a message's `content`. All else is skipped.
    Raises JsonTextError.
    """
    for message, message_end in _objects(text, start, end):
        content = _last(text, message, message_end, "content")
        if content is None:
            continue
        for part, part_end in _objects(text, *content):
            kind = _last(text, part, part_end, "type")
            if kind is None or text[kind[0]] != ord('"') or json.loads(text[kind[0] : kind[1]]) not in known:
                return False
    return True


def json_start(text: bytes, start: int, end: int, most: int) -> bytes:
    """Return the first `most` bytes of the JSON text[start:end], written in one way.

    That is without spaces, and with characters instead of their escapes.
    """
    return b"".join(_pieces(text, start, end))[: max(0, most)]


def json_chat_start(text: bytes, start: int, end: int, leading: frozenset[bytes], most: int) -> tuple[bytes, bytes]:
    """Return how the JSON array of messages text[start:end] begins, written in one way.

    That is as for `json_start`, and with the members of each message sorted by their names. The first part has the
    messages before the first one whose `role`, as it is written, is not in `leading`. The second has `most` bytes of
    the others. Raises JsonTextError.
    """
    system: list[bytes] = []
    rest: list[bytes] = []
    for at, behind in json_elements(text, start, end, end):
        members = _written_members(text, at, behind) if text[at] == ord("{") else None
        if members is not None and len(members) > SORTED:
            members = None
        whole = json_start(text, at, behind, behind) if members is None else b"".join(_sorted(text, members))
        if not rest and any(text[a:b] == b'"role"' and text[c:d] in leading for a, b, c, d in members or ()):
            system.append(whole)
        else:
            rest.append(whole)
    return b"".join(system), b"".join(rest)[: max(0, most)]


def _value_of(text: bytes) -> JsonValue:
    """The value of a text that was found to be JSON."""
    if text[0] in b"{[":
        return text
    try:
        value: str | int | float | bool | None = json.loads(text)
    except ValueError:  # an integer with more digits than Python reads
        return math.copysign(math.inf, float(text))
    return value


def _pieces(text: bytes, start: int, end: int) -> list[bytes]:
    pieces: list[bytes] = []
    while start < end:
        match = NAME.match(text, start, end)
        if match is None:
            pieces.append(text[start : start + 1].strip())
            start += 1
        else:
            pieces.append(ESCAPE.sub(_unescaped, match[0]))
            start = match.end()
    return pieces


def _unescaped(match: re.Match[bytes]) -> bytes:
    """The character that an escape writes; as it is if it must be escaped."""
    escape = match[0]
    if escape == rb"\/":
        return b"/"
    if len(escape) == 2:
        return escape
    character: str = json.loads(b'"%b"' % escape)
    return escape if character < " " or character in '"\\' else character.encode("utf-8", "surrogatepass")


def _written_members(text: bytes, start: int, end: int) -> list[tuple[int, int, int, int]]:
    """Where the names and values of an object begin and end."""
    found: list[tuple[int, int, int, int]] = []
    at = _space(text, start + 1, end)
    closed = text[at : at + 1] == b"}"
    while not closed:
        value = _name(text, at, end)
        value_end = _value(text, value, end)
        found.append((at, text.rindex(b'"', at, value) + 1, value, value_end))
        at, closed = _behind(text, value_end, end, b"}")
    return found


def _sorted(text: bytes, members: list[tuple[int, int, int, int]]) -> list[bytes]:
    pieces: list[bytes] = []
    for name, name_end, value, value_end in sorted(members, key=lambda member: text[member[0] : member[1] - 1]):
        pieces += [b"," if pieces else b"{", *_pieces(text, name, name_end), b":", *_pieces(text, value, value_end)]
    return pieces


def _objects(text: bytes, start: int, end: int) -> list[tuple[int, int]]:
    """The objects among the elements of a value, if it is an array."""
    if text[start] != ord("["):
        return []
    return [(at, behind) for at, behind in json_elements(text, start, end, end) if text[at] == ord("{")]


def _last(text: bytes, start: int, end: int, name: str) -> tuple[int, int] | None:
    """Where the value of a member is: of duplicates, the last."""
    found = None
    for at, name_end, value, value_end in _written_members(text, start, end):
        if json.loads(text[at:name_end]) == name:
            found = value, value_end
    return found


def _check_utf8(text: bytes, start: int, end: int) -> None:
    try:
        text[start:end].decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise JsonTextError(UTF8, start + error.start) from None


def _space(text: bytes, at: int, end: int) -> int:
    match = SPACE.match(text, at, end)
    return at if match is None else match.end()


def _no_more(text: bytes, at: int, end: int) -> None:
    at = _space(text, at, end)
    if at < end:
        raise JsonTextError(EXTRA, at)


def _name(text: bytes, at: int, end: int) -> int:
    """The start of the value behind a name."""
    match = NAME.match(text, at, end)
    if match is None:
        raise JsonTextError(NO_NAME, at)
    at = _space(text, match.end(), end)
    if text[at : min(at + 1, end)] != b":":
        raise JsonTextError(NO_COLON, at)
    return _space(text, at + 1, end)


def _behind(text: bytes, at: int, end: int, closing: bytes) -> tuple[int, bool]:
    """The start of what follows a value, and whether that is the closing bracket."""
    at = _space(text, at, end)
    mark = text[at : min(at + 1, end)]
    if mark == closing:
        return at, True
    if mark != b",":
        raise JsonTextError(NO_COMMA, at)
    return _space(text, at + 1, end), False


def _value(text: bytes, at: int, end: int) -> int:
    """The end of the value that starts here."""
    closings: list[bytes] = []
    while True:
        mark = text[at : min(at + 1, end)]
        if mark in (b"{", b"["):
            if len(closings) == JSON_DEPTH:
                raise JsonTextError(TOO_DEEP, at)
            closing = b"}" if mark == b"{" else b"]"
            closings.append(closing)
            at = _space(text, at + 1, end)
            if text[at : min(at + 1, end)] != closing:
                at = _name(text, at, end) if mark == b"{" else _skipped(text, at, end)
                continue
            closings.pop()
            at += 1
        else:
            match = SCALAR.match(text, at, end)
            if match is None:
                raise JsonTextError(NO_VALUE, at)
            at = match.end()
        closed = True
        while closings and closed:
            at, closed = _behind(text, at, end, closings[-1])
            if closed:
                closings.pop()
                at += 1
        if closed:
            return at
        if closings[-1] == b"}":
            at = _name(text, at, end)


def _skipped(text: bytes, at: int, end: int) -> int:
    match = ELEMENTS.match(text, at, end)
    return at if match is None else match.end()
