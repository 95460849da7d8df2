"""One request and the answer to it, as it is written to the client."""

from __future__ import annotations

import asyncio
from typing import Protocol

from eldr.router.http.errors import ApiError
from eldr.router.http.heads import answer_head, error_headers
from eldr.router.http.message import Request


class Listener(Protocol):
    """What runs while a request is answered and must hear of its client."""

    def on_client_gone(self) -> None: ...

    def on_client_stalled(self) -> None:
        """The client does not read: send no more until `on_client_reading`."""

    def on_client_reading(self) -> None: ...


class Channel(Protocol):
    """The connection that an exchange runs on.

    stalled: whether the client has stopped reading. stopping: whether the router stops, so that the next answer is the
    last one.
    """

    @property
    def stalled(self) -> bool: ...

    @property
    def stopping(self) -> bool: ...

    def finish(self, keep_alive: bool) -> None:
        """The answer is complete. keep_alive: whether the connection can be used again."""

    def close(self) -> None: ...


class ClientExchange:
    """Answers one request, once: by `respond`, or by `begin_stream`, any number of `write` and an end.

    listener: hears of the client until the answer is complete; None if nobody needs to.
    """

    def __init__(self, channel: Channel, transport: asyncio.Transport, request: Request) -> None:
        self.listener: Listener | None = None
        self._channel = channel
        self._transport = transport
        self._request = request
        self._keep_alive = request.keep_alive
        self._chunked = not request.http_1_0
        self._begun = False

    @property
    def stalled(self) -> bool:
        """Whether the client has stopped reading."""
        return self._channel.stalled

    def respond(self, status: int, body: bytes, content_type: bytes = b"application/json", extra: bytes = b"") -> None:
        """The whole answer. `extra` holds further header lines, each ended by CRLF.

        Raises RuntimeError, and closes the connection, if there is an answer already.
        """
        self._begin()
        head = answer_head(status, content_type, len(body), extra + self._connection_line())
        self._transport.write(head if self._request.method == b"HEAD" else head + body)
        self._finish()

    def respond_error(self, error: ApiError, extra: bytes = b"") -> None:
        """The same, with an error for an answer."""
        self.respond(error.status, error.body(), extra=extra + error_headers(error))

    def begin_stream(self, content_type: bytes, extra: bytes = b"") -> None:
        """Start an answer of unknown length: chunked, or until the end of the connection for HTTP/1.0.

        Raises RuntimeError, and closes the connection, if there is an answer already.
        """
        self._begin()
        if self._chunked:
            extra += self._connection_line() + b"transfer-encoding: chunked\r\n"
        else:
            self._keep_alive = False
            extra += self._connection_line()
        self._transport.write(answer_head(200, content_type, None, extra))

    def write(self, data: bytes, framed: bytes | None = None) -> None:
        """A piece, not empty, of the answer that `begin_stream` started. framed: the same as a chunk, if it is one."""
        if self._chunked:
            self._transport.write(framed or b"%x\r\n%b\r\n" % (len(data), data))
        else:
            self._transport.write(data)

    def end_stream(self) -> None:
        if self._chunked:
            self._transport.write(b"0\r\n\r\n")
        self._finish()

    def break_stream(self) -> None:
        """Close without the end of the answer, so that nobody takes what was sent for all of it."""
        self.listener = None
        self._channel.close()

    def _begin(self) -> None:
        if self._begun:
            # Whatever went wrong, the client must not take a second answer for that to its next request.
            self.break_stream()
            raise RuntimeError("a request was answered twice")
        self._begun = True

    def _connection_line(self) -> bytes:
        """What the head says about the connection."""
        if self._channel.stopping:
            self._keep_alive = False
        if not self._keep_alive:
            return b"connection: close\r\n"
        return b"" if self._chunked else b"connection: keep-alive\r\n"

    def _finish(self) -> None:
        self.listener = None
        self._channel.finish(self._keep_alive)
