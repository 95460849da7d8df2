"""Deadlines of a request: the router's own limit, and the client's if it states one.

Clients, and proxies in front of the router, are known to send these headers:

- `X-Request-Timeout-Ms` and `X-Envoy-Expected-Rq-Timeout-Ms` (Envoy, on every request it routes) limit the whole
  answer.
- `X-Stainless-Timeout` (openai for Node) and `X-Stainless-Read-Timeout` (openai for Python), in seconds: these clients
  give up if nothing has arrived by then, so they limit the time to the first byte. For an answer that is not streamed
  they limit the whole answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

TOTAL_MS = (b"x-request-timeout-ms", b"x-envoy-expected-rq-timeout-ms")
FIRST_BYTE_S = (b"x-stainless-read-timeout", b"x-stainless-timeout")
MAX_HEADER_BYTES = 32


class Deadlines:
    """Monotonic times by which the first byte must be on its way to the client, and by which the answer must end."""

    __slots__ = ("first_byte_s", "total_s")

    def __init__(self, first_byte_s: float, total_s: float) -> None:
        self.first_byte_s = first_byte_s
        self.total_s = total_s

    @staticmethod
    def of(headers: Mapping[bytes, bytes], received_s: float, limit_s: float) -> Deadlines:
        """Read the deadlines from request headers.

        A client can only shorten the router's own limit. Values that are not positive numbers are ignored.
        """
        total_s = min(limit_s, _least(headers, TOTAL_MS) / 1000)
        first_byte_s = min(total_s, _least(headers, FIRST_BYTE_S))
        return Deadlines(received_s + first_byte_s, received_s + total_s)


def _least(headers: Mapping[bytes, bytes], names: Iterable[bytes]) -> float:
    least = math.inf
    for name in names:
        text = headers.get(name)
        if text is not None and len(text) <= MAX_HEADER_BYTES:
            try:
                value = float(text)
            except ValueError:
                continue
            if value > 0:
                least = min(least, value)
    return least
