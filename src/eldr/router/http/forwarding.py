"""Which headers the router passes on, from clients to workers and back. It drops all others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from eldr.router.http.admin_key import BARE_KEYS
from eldr.router.http.media_types import EVENT_STREAM, JSON, essence
from eldr.router.http.message import Request, is_hop_by_hop

PRINTABLE = re.compile(rb"[\x20-\x7e]+")
# A conversation's id. vLLM sets no limit; a UUID has 36 bytes.
MAX_SESSION_ID_BYTES = 512
# The content types that are passed on. A browser could take any other for a page of the router itself.
CONTENT_TYPES = frozenset((JSON, EVENT_STREAM, b"text/plain"))
UNKNOWN_TYPE = b"application/octet-stream"
KEY_HEADERS: Final = (b"authorization", *BARE_KEYS)
RETRY_AFTER = re.compile(rb"[0-9]{1,9}|[A-Za-z0-9:, ]{29}")


def session_line(request: Request) -> bytes:
    """The header line of X-Session-ID, by which vLLM knows a conversation. Empty if there is none to pass on."""
    given = request.headers.get(b"x-session-id")
    if not given or len(given) > MAX_SESSION_ID_BYTES or PRINTABLE.fullmatch(given) is None:
        return b""
    return b"" if is_hop_by_hop(request.headers, b"x-session-id") else b"x-session-id: %b\r\n" % given


def client_authorization(request: Request) -> bytes:
    """The header lines with the client's own keys, for workers that check keys themselves.

    Empty if the router has checked one.
    """
    headers, lines = request.headers, b""
    if request.client:
        return lines
    for name in KEY_HEADERS:
        given = headers.get(name)
        if given is not None and PRINTABLE.fullmatch(given) is not None and not is_hop_by_hop(headers, name):
            lines += b"%b: %b\r\n" % (name, given)
    return lines


def content_type(headers: Mapping[bytes, bytes]) -> bytes:
    """The content type to give the client for a worker's answer."""
    given = headers.get(b"content-type", JSON)
    return given if essence(given) in CONTENT_TYPES else UNKNOWN_TYPE


def answer_headers(headers: Mapping[bytes, bytes]) -> tuple[bytes, bytes]:
    """The headers of a worker's answer to pass on: the content type, and a Retry-After line if it is well-formed."""
    given = headers.get(b"retry-after")
    retry_after = b"retry-after: %b\r\n" % given if given is not None and RETRY_AFTER.fullmatch(given) else b""
    return content_type(headers), retry_after
