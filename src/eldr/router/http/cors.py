"""Cross-origin requests of browsers (the CORS protocol of the Fetch standard), for the origins that a setting allows.

A browser lets a page read an answer of another origin only if the answer allows it. Before a POST with JSON or with an
API key it asks for permission: a preflight, which is an OPTIONS request without a key. Credentials are never allowed,
because the router uses no cookies, and a page has to know the key that it sends. So `*` is safe to offer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

ANY: Final = "*"
METHODS: Final = b"GET, HEAD, POST"
# How long a browser may remember the answer to a preflight, in seconds.
MAX_AGE_S: Final = 600
# The headers of answers that a page may read besides Content-Type.
EXPOSED: Final = (
    b"x-request-id, retry-after, x-ratelimit-limit-requests, x-ratelimit-remaining-requests, "
    b"x-ratelimit-reset-requests, x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
# The names that a preflight may ask for. All are granted, because a page could send the same from anywhere else.
MAX_ASKED_BYTES: Final = 1024
ASKED: Final = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+( *, *[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")


class Cors:
    """What browsers are told. origins: those that are allowed, as browsers write them, or `*` for all."""

    def __init__(self, origins: Collection[str]) -> None:
        self.allow(origins)

    def allow(self, origins: Collection[str]) -> None:
        """Allow these origins from now on, and no others."""
        exposed = b"access-control-expose-headers: %b\r\n" % EXPOSED
        self._lines: dict[bytes, bytes] = {}
        self._other_lines = b""
        if ANY in origins:
            self._other_lines = b"access-control-allow-origin: *\r\n" + exposed
        elif origins:
            # Also on answers to others, which a cache must not give to a page that may read them.
            self._other_lines = b"vary: origin\r\n"
            for origin in origins:
                allowed = b"access-control-allow-origin: %b\r\n" % origin.encode()
                self._lines[origin.encode()] = b"vary: origin\r\n" + allowed + exposed

    def answer_lines(self, headers: Mapping[bytes, bytes]) -> bytes:
        """The header lines of any answer to a request with these headers."""
        lines = self._other_lines
        if self._lines:
            lines = self._lines.get(headers.get(b"origin", b""), lines)
        return lines

    def is_preflight(self, method: bytes, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a browser asks for permission. False if no origin is allowed at all."""
        return (
            method == b"OPTIONS"
            and self._other_lines != b""
            and b"origin" in headers
            and b"access-control-request-method" in headers
        )

    def allows(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether pages of the request's origin may read answers."""
        return headers.get(b"origin", b"") in self._lines if self._lines else self._other_lines != b""

    def granted(self, headers: Mapping[bytes, bytes]) -> bytes:
        """The header lines that answer the preflight of an allowed origin, besides `answer_lines`."""
        asked = headers.get(b"access-control-request-headers", b"")
        lines = b"access-control-allow-methods: %b\r\naccess-control-max-age: %d\r\n" % (METHODS, MAX_AGE_S)
        if len(asked) <= MAX_ASKED_BYTES and ASKED.fullmatch(asked) is not None:
            lines += b"access-control-allow-headers: %b\r\n" % asked
        return lines
