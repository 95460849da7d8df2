"""Status lines and headers of answers to clients."""

from __future__ import annotations

import time
from email.utils import formatdate
from http import HTTPStatus

from eldr.router.http.errors import ApiError

# nosniff: a browser must not guess another content type than the one given.
STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\nx-content-type-options: nosniff\r\n".encode()
    for status in HTTPStatus
}


class _Clock:
    """The Date header, formatted once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._line = b""

    def line(self) -> bytes:
        now = int(time.time())
        if now != self._second:
            self._second = now
            self._line = b"date: " + formatdate(now, usegmt=True).encode() + b"\r\n"
        return self._line


_clock = _Clock()


def answer_head(status: int, content_type: bytes, length: int | None, extra: bytes) -> bytes:
    """The status line and headers.

    length: bytes of the body. If it is None, `extra` says how the body ends.
    extra: further header lines, each ending in CRLF.
    """
    head = b"%bcontent-type: %b\r\n%b%b" % (STATUS_LINES[status], content_type, _clock.line(), extra)
    return head + (b"\r\n" if length is None else b"content-length: %d\r\n\r\n" % length)


def error_headers(error: ApiError) -> bytes:
    """The header lines that belong to an error."""
    lines = error.headers
    if error.status == 401:
        lines += b"www-authenticate: Bearer\r\n"
    if error.retry_after_s is not None:
        lines += b"retry-after: %d\r\n" % error.retry_after_s
    return lines
