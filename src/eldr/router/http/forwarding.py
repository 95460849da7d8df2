"""Which headers the router passes on, from clients to workers and back. It drops all others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from eldr.router.http.admin_key import BARE_KEYS
from eldr.router.http.media_types import EVENT_STREAM, JSON, essence
from eldr.router.http.message import Request

# W3C Trace Context. A malformed traceparent is dropped, and so is a tracestate without a traceparent.
TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
PRINTABLE = re.compile(rb"[\x20-\x7e]+")
MAX_TRACESTATE_BYTES = 512
# The content types that are passed on. A browser could take any other for a page of the router itself.
CONTENT_TYPES = frozenset((JSON, EVENT_STREAM, b"text/plain"))
UNKNOWN_TYPE = b"application/octet-stream"
KEY_HEADERS: Final = (b"authorization", *BARE_KEYS)
RETRY_AFTER = re.compile(rb"[0-9]{1,9}|[A-Za-z0-9:, ]{29}")


def trace_context(request: Request) -> tuple[bytes | None, bytes | None]:
    """The traceparent and tracestate of a request. Each is None if it is absent or must not be passed on."""
    headers = request.headers
    parent = headers.get(b"traceparent")
    if parent is None or TRACEPARENT.fullmatch(parent) is None or _meant_for_us(headers, b"traceparent"):
        return None, None
    state = headers.get(b"tracestate")
    if state is not None and (
        len(state) > MAX_TRACESTATE_BYTES or PRINTABLE.fullmatch(state) is None or _meant_for_us(headers, b"tracestate")
    ):
        state = None
    return parent, state


def trace_lines(parent: bytes | None, state: bytes | None) -> bytes:
    """The header lines of a trace context."""
    if parent is None:
        return b""
    line = b"traceparent: %b\r\n" % parent
    return line if state is None else b"%btracestate: %b\r\n" % (line, state)


def client_authorization(request: Request) -> bytes:
    """The header lines with the client's own keys, for workers that check keys themselves.

    Empty if the router has checked one.
    """
    headers, lines = request.headers, b""
    if request.client:
        return lines
    for name in KEY_HEADERS:
        given = headers.get(name)
        if given is not None and PRINTABLE.fullmatch(given) is not None and not _meant_for_us(headers, name):
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


def _meant_for_us(headers: dict[bytes, bytes], name: bytes) -> bool:
    """Whether the Connection header lists the field, which must then not be forwarded (RFC 9110, section 7.6.1)."""
    connection = headers.get(b"connection")
    return connection is not None and name in (token.strip().lower() for token in connection.split(b","))
