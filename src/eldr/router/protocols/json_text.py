"""JSON text as clients and workers write it: what its values begin with, and how it is encoded.

`eldr.kernels.JsonObject` reads it.
"""

from __future__ import annotations

import json
from typing import Final

import orjson

QUOTE: Final = ord('"')
OBJECT: Final = ord("{")
ARRAY: Final = ord("[")
SPACES: Final = b" \t\r\n"


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
