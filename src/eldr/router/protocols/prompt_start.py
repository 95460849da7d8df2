"""The start of a prompt, by which requests that share it are recognised, however it is written.

Spaces, escapes and the order of keys do not matter. Little more is parsed than is returned.
"""

from __future__ import annotations

import json
import zlib

import orjson

from eldr.kernels import json_elements, json_members
from eldr.router.protocols.json_object import ARRAY, OBJECT, QUOTE, SPACES
from eldr.router.protocols.openai import Endpoint

# A token id in a JSON array takes about this many bytes of text.
BYTES_PER_TOKEN = 4
# No id takes more, with the comma and one space: there are fewer than 2^32 of them.
MOST_BYTES_PER_TOKEN = 12
# A character is written with at most this many bytes, as an escape.
BYTES_PER_ESCAPE = 6
ROLE = frozenset(("role",))
CONTENT = frozenset(("content",))
TEXT = frozenset(("text",))
SYSTEM = frozenset((b'"system"', b'"developer"'))
# Messages that are found at a time.
SOME = 16


def prompt_start(endpoint: Endpoint, text: bytes, start: int, end: int, window_bytes: int) -> bytes:
    """Return the start of the prompt that stands at text[start:end], which is JSON.

    That is `window_bytes` of a text, as many bytes of token ids at four bytes each, or `chat_start`.
    """
    if text[start] == ARRAY:
        if endpoint.messages:
            return chat_start(text, start, end, window_bytes)
        first = json_elements(text, start, end, 2)
        if not first:
            return b""
        at, behind = first[0]
        if text[at] != QUOTE and text[at] != ARRAY:
            return _ids_start(text, start, end, window_bytes)
        if len(first) == 1:
            start, end = at, behind
    if text[start] == QUOTE:
        return _string_start(text, start, end, window_bytes)
    if text[start] == ARRAY:
        return _ids_start(text, start, end, window_bytes)
    return text[start : min(end, start + window_bytes)]


def system_start(text: bytes, start: int, end: int) -> bytes:
    """Return a mark of the instructions at text[start:end], which stand outside of the conversation."""
    return b"%d " % zlib.crc32(_canonical(text[start:end]))


def chat_start(text: bytes, start: int, end: int, window_bytes: int) -> bytes:
    """Return the start of the conversation in the array text[start:end], as canonical JSON.

    Many conversations share a system prompt. With a window from the very start, a long system prompt would send them
    all to one worker. So all leading system messages are part of it, by their checksum, and `window_bytes` beyond them.
    With this window, each worker caches the system prompt once, and conversations spread by what follows it.
    """
    most = SOME
    messages = json_elements(text, start, end, most)
    system, leading = 0, 0
    while True:
        while leading < len(messages) and _is_system(text, *messages[leading]):
            at, behind = messages[leading]
            system = zlib.crc32(_canonical(text[at:behind]), system)
            leading += 1
        if leading < len(messages) or len(messages) < most:
            break
        most *= 2
        messages = json_elements(text, start, end, most)
    rest = b""
    while True:
        for at, behind in messages[leading:]:
            rest += _message_start(text, at, behind, window_bytes)
            if len(rest) >= window_bytes:
                return b"%d %b" % (system, rest[:window_bytes])
        if len(messages) < most:
            return b"%d %b" % (system, rest)
        leading = most
        most *= 2
        messages = json_elements(text, start, end, most)


def _is_system(text: bytes, start: int, end: int) -> bool:
    if text[start] != OBJECT:
        return False
    span = _member(text, start, end, ROLE)
    if span is None:
        return False
    role = text[span[0] : span[1]]
    return role in SYSTEM or (b"\\" in role and json.dumps(json.loads(role)).encode() in SYSTEM)


def _message_start(text: bytes, start: int, end: int, window_bytes: int) -> bytes:
    """The canonical start of one message, at least `window_bytes` if it has as many."""
    if end - start > 2 * window_bytes and text[start] == OBJECT:
        long = _long_start(text, start, end, window_bytes)
        if long:
            return long
    return _canonical(text[start:end])


def _long_start(text: bytes, start: int, end: int, window_bytes: int) -> bytes:
    """The same of a message with a long text, without parsing all of it. Empty if its text is not long."""
    content = _member(text, start, end, CONTENT)
    head = b'{"content":"'
    if content is not None and text[content[0]] == ARRAY:
        first = json_elements(text, content[0], content[1], 1)
        if not first or text[first[0][0]] != OBJECT:
            return b""
        content = _member(text, *first[0], TEXT)
        head = b'{"content":[{"text":"'
    if content is None or text[content[0]] != QUOTE:
        return b""
    said = _string_start(text, *content, window_bytes)
    return head + orjson.dumps(said.decode("utf-8", "ignore"))[1:-1] if len(said) == window_bytes else b""


def _member(text: bytes, start: int, end: int, name: frozenset[str]) -> tuple[int, int] | None:
    """Where the value of the member with this one name stands. None if there is none."""
    found, _, _ = json_members(text, start, end, name, "")
    return (found[-1][2], found[-1][3]) if found else None


def _canonical(text: bytes) -> bytes:
    """A JSON text with sorted keys and without spaces. What orjson does not read is left in the order that it has."""
    try:
        return orjson.dumps(orjson.loads(text), option=orjson.OPT_SORT_KEYS)
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        return b"".join(text.split())


def _string_start(text: bytes, start: int, end: int, window_bytes: int) -> bytes:
    """The first bytes of the string whose quotes are text[start] and text[end - 1], without escapes."""
    window_end = start + 1 + window_bytes
    raw = text[start + 1 : min(end - 1, window_end)]
    if b"\\" not in raw:
        return raw
    raw = text[start + 1 : min(end - 1, start + 1 + BYTES_PER_ESCAPE * (window_bytes + 2))]
    if start + 1 + len(raw) < end - 1:
        cut = raw.rfind(b"\\")
        if cut >= len(raw) - BYTES_PER_ESCAPE:  # the last escape may be cut in two: leave it out
            raw = raw[:cut].rstrip(b"\\")
        raw = raw.decode("utf-8", "ignore").encode()
    decoded: str = json.loads(b'"%b"' % raw)
    return decoded[:window_bytes].encode("utf-8", "surrogatepass")[:window_bytes]


def _ids_start(text: bytes, start: int, end: int, window_bytes: int) -> bytes:
    """The first token ids of the array text[start:end], without spaces."""
    most = max(1, window_bytes // BYTES_PER_TOKEN)
    raw = text[start + 1 : min(end - 1, start + 1 + MOST_BYTES_PER_TOKEN * most)]
    ids = raw.translate(None, SPACES).split(b",", most)
    if len(ids) <= most and start + 1 + len(raw) < end - 1:
        ids.pop()  # the last one may be cut in two
    return b",".join(ids[:most])
