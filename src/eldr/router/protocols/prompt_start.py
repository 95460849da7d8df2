"""The start of a prompt, by which requests that share it are recognised, however it is written.

Spaces, escapes and the order of a message's keys do not matter. No more is read than is needed.
"""

from __future__ import annotations

import zlib

from eldr.kernels import json_chat_start, json_elements, json_start
from eldr.router.protocols.json_text import ARRAY, QUOTE, SPACES
from eldr.router.protocols.openai import Endpoint

# A token id in a JSON array takes about this many bytes of text.
BYTES_PER_TOKEN = 4
# No id takes more, with the comma and one space: there are fewer than 2^32 of them.
MOST_BYTES_PER_TOKEN = 12
SYSTEM = frozenset((b'"system"', b'"developer"'))


def prompt_start(endpoint: Endpoint, text: bytes, start: int, end: int, window_bytes: int) -> bytes:
    """Return the start of the prompt that stands at text[start:end], which is JSON.

    That is `window_bytes` of a text, as many bytes of token ids at four bytes each, or `chat_start`.
    """
    if text[start] == ARRAY:
        if endpoint.messages:
            return chat_start(text, start, end, window_bytes)
        start, end = single_prompt(text, start, end)
        if array_of_ids(text, start, end):
            return _ids_start(text, start, end, window_bytes)
    return json_start(text, start, end, 1 + window_bytes)


def single_prompt(text: bytes, start: int, end: int) -> tuple[int, int]:
    """Where the only element of the array text[start:end] stands, if that is a text or an array. Else the array."""
    first = json_elements(text, start, end, 2)
    return first[0] if len(first) == 1 and text[first[0][0]] in (QUOTE, ARRAY) else (start, end)


def array_of_ids(text: bytes, start: int, end: int) -> bool:
    """Whether text[start:end] is an array with something else than a text in front: token ids, as it should be."""
    if text[start] != ARRAY:
        return False
    first = json_elements(text, start, end, 1)
    return len(first) > 0 and text[first[0][0]] != QUOTE


def system_start(text: bytes, start: int, end: int) -> bytes:
    """Return a mark of the instructions at text[start:end], which stand outside of the conversation."""
    return b"%d " % zlib.crc32(json_start(text, start, end, end - start))


def chat_start(text: bytes, start: int, end: int, window_bytes: int) -> bytes:
    """Return the start of the conversation in the array text[start:end].

    Many conversations share a system prompt. With a window from the very start, a long system prompt would send them
    all to one worker. So all leading system messages are part of it, by their checksum, and `window_bytes` beyond them.
    With this window, each worker caches the system prompt once, and conversations spread by what follows it.
    """
    system, rest = json_chat_start(text, start, end, SYSTEM, window_bytes)
    return b"%d%b" % (zlib.crc32(system), rest)


def _ids_start(text: bytes, start: int, end: int, window_bytes: int) -> bytes:
    """The first token ids of the array text[start:end], without spaces."""
    most = max(1, window_bytes // BYTES_PER_TOKEN)
    raw = text[start + 1 : min(end - 1, start + 1 + MOST_BYTES_PER_TOKEN * most)]
    ids = raw.translate(None, SPACES).split(b",", most)
    if len(ids) <= most and start + 1 + len(raw) < end - 1:
        ids.pop()  # the last one may be cut in two
    return b",".join(ids[:most])
