"""Media types (RFC 9110, section 8.3.1): names ignore case, and parameters may follow."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

JSON: Final = b"application/json"
EVENT_STREAM: Final = b"text/event-stream"

# More can only be an attempt to keep the expression below busy.
MAX_BYTES: Final = 256
TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
QUOTED: Final = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e]|\\[\t -~])*"'
PARAMETERS: Final = b"(?:[ \t]*;[ \t]*(?:%b=(?:%b|%b))?)*" % (TOKEN, TOKEN, QUOTED)
MEDIA_TYPE: Final = re.compile(b"[ \t]*(%b/%b)(%b)[ \t]*" % (TOKEN, TOKEN, PARAMETERS))
REFUSED: Final = re.compile(rb";[ \t]*q=0(?:\.0*)?[ \t]*(?:;|$)", re.IGNORECASE)


def essence(value: bytes) -> bytes:
    """Return the type and subtype in lower case, without parameters. Empty for a value that is not a media type."""
    if value == JSON:
        return JSON
    return _essence(value) if len(value) <= MAX_BYTES else b""


@lru_cache(maxsize=64)  # workers and clients send the same few again and again
def _essence(value: bytes) -> bytes:
    found = MEDIA_TYPE.fullmatch(value)
    return b"" if found is None else found[1].lower()


def accepts(accept: bytes, media_type: bytes) -> bool:
    """Whether an Accept header (section 12.5.1) names `media_type`, other than to refuse it with a weight of 0."""
    for each in accept.split(b","):
        if essence(each) == media_type and REFUSED.search(each.rstrip(b" \t")) is None:
            return True
    return False
