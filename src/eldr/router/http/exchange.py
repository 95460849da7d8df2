"""One exchange with a client: a request, and the answer that is written to it."""

from __future__ import annotations

import asyncio
from typing import Protocol

from eldr.router.http.errors import ApiError
from eldr.router.http.heads import answer_head, error_headers
from eldr.router.http.message import Request


class Listener(Protocol):
    """Is told when the client goes away or stops reading while its request is answered."""

    def on_client_gone(self) -> None: ...

    def on_client_stalled(self) -> None:
        """The client has stopped reading. Send no more until `on_client_reading`."""

    def on_client_reading(self) -> None: ...


class Channel(Protocol):
    """The client connection that an exchange runs on.

    stalled: whether the client has stopped reading.
    stopping: whether the router is stopping, so that the connection closes after the next answer.
    """

    @property
    def stalled(self) -> bool: ...

    @property
    def stopping(self) -> bool: ...

    def finish(self, keep_alive: bool) -> None:
        """The answer is complete. keep_alive: whether the connection can be used again."""

    def close(self) -> None: ...


class ClientExchange:
    """Answers one request, exactly once: with `respond`, or with `begin_stream`, `write` and `end_stream`.

    listener: is told about the client until the answer is complete. None if there is nothing to tell.
    streaming: whether a stream has begun and not ended.
    """

    def __init__(self, channel: Channel, transport: asyncio.Transport, request: Request) -> None:
        self.listener: Listener | None = None
        self._channel = channel
        self._transport = transport
        self._request = request
        self._keep_alive = request.keep_alive
        self._chunked = not request.http_1_0
        self._begun = False
        self.streaming = False

    @property
    def stalled(self) -> bool:
        """Whether the client has stopped reading."""
        return self._channel.stalled

    def respond(self, status: int, body: bytes, content_type: bytes = b"application/json", extra: bytes = b"") -> None:
        """Send a whole answer. `extra` holds further header lines, each ending in CRLF.

        If the request was already answered, closes the connection and raises RuntimeError.
        """
        self._begin()
        extra += self._request.answer_lines + self._connection_line()
        head = answer_head(status, content_type, len(body), extra)
        self._transport.write(head if self._request.method == b"HEAD" else head + body)
        self._finish()

    def respond_error(self, error: ApiError, extra: bytes = b"") -> None:
        """Send `error` as the answer. Raises like `respond`."""
        self.respond(error.status, error.body_for(self._request.path), extra=extra + error_headers(error))

    def begin_stream(self, content_type: bytes, extra: bytes = b"") -> None:
        """Start an answer of unknown length: chunked, or ended by the connection's close for HTTP/1.0.

        If the request was already answered, closes the connection and raises RuntimeError.
        """
        self._begin()
        extra += self._request.answer_lines
        self.streaming = True
        if self._chunked:
            extra += self._connection_line() + b"transfer-encoding: chunked\r\n"
        else:
            self._keep_alive = False
            extra += self._connection_line()
        self._transport.write(answer_head(200, content_type, None, extra))

    def write(self, data: bytes, framed: bytes | None = None) -> None:
        """Send a piece of the stream, not empty. framed: the same piece as an HTTP chunk, if it came as one."""
        if self._chunked:
            self._transport.write(framed or b"%x\r\n%b\r\n" % (len(data), data))
        else:
            self._transport.write(data)

    def end_stream(self) -> None:
        self.streaming = False
        if self._chunked:
            self._transport.write(b"0\r\n\r\n")
        self._finish()

    def break_stream(self) -> None:
        """Close the connection without ending the stream, so that nobody takes the truncated answer for a whole one."""
        self.listener = None
        self.streaming = False
        self._channel.close()

    def _begin(self) -> None:
        if self._begun:
            # The client must not take the second answer for the answer to its next request.
            self.break_stream()
            raise RuntimeError("a request was answered twice")
        self._begun = True

    def _connection_line(self) -> bytes:
        """The Connection header, if the head needs one."""
        if self._channel.stopping:
            self._keep_alive = False
        if not self._keep_alive:
            return b"connection: close\r\n"
        return b"" if self._chunked else b"connection: keep-alive\r\n"

    def _finish(self) -> None:
        self.listener = None
        self._channel.finish(self._keep_alive)
