"""The side towards clients: HTTP/1.1 requests in, answers out, one protocol object per connection.

llhttp (httptools) parses. What it leaves to the caller is checked here: limits, the headers that decide where a
message ends (RFC 9112, section 6), pipelining, and that a client which went away is noticed at once. Where it is in
doubt where a message ends, the answer is an error and the connection closes.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections import deque
from typing import Protocol, cast

import httptools

from eldr.router.config.groups import ClientLimits
from eldr.router.http.errors import ApiError
from eldr.router.http.heads import answer_head, error_headers

MAX_HEAD_BYTES = 32 * 1024
MAX_HEADERS = 128
# Requests that may wait behind the one that is answered. A piece of input holds thousands, and takes as long to parse.
MAX_PIPELINED = 256
# Unsent bytes to a client above which its worker is no longer read from.
WRITE_HIGH_BYTES = 64 * 1024
# The same within the kernel, which else takes megabytes for a client that does not read.
KERNEL_HIGH_BYTES = 64 * 1024
# How long a refused client may go on sending before the connection is reset; closing at once could destroy the
# answer before the client has read it.
LINGER_S = 2.0
# What chunk sizes, chunk extensions and line ends may take, beside so many bytes for each byte of the body: single
# bytes as chunks are slow, but no attack.
MAX_FRAMING_BYTES = 64 * 1024
MAX_FRAMING_PER_BYTE = 16
# A body may come as slowly as this, beside its time limit.
LEAST_BYTES_PER_S = 16 * 1024

# Headers of which a second copy could make two parties see two different messages.
SINGLE = frozenset((b"host", b"content-length", b"transfer-encoding", b"authorization", b"content-type"))
# RFC 9110, section 7.2: a Host that is no host and port is refused, lest somebody else reads another one into it.
HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+;=%-]*(:[0-9]*)?|\[[0-9A-Fa-f:.]+\](:[0-9]*)?")


class Request:
    """One complete request.

    headers: names in lower case; values given several times are joined by commas.
    client: the name that the client's API key stands for, empty where no keys are asked for.
    received_s: monotonic time.
    """

    __slots__ = ("body", "client", "headers", "http_1_0", "keep_alive", "method", "path", "received_s")

    def __init__(
        self,
        method: bytes,
        path: bytes,
        headers: dict[bytes, bytes],
        body: bytes,
        *,
        keep_alive: bool = True,
        http_1_0: bool = False,
        client: str = "",
    ) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body
        self.keep_alive = keep_alive
        self.http_1_0 = http_1_0
        self.client = client
        self.received_s = time.monotonic()


class Listener(Protocol):
    """What runs while a request is answered and must hear of its client."""

    def on_client_gone(self) -> None: ...

    def on_client_stalled(self) -> None:
        """The client does not read: send no more until `on_client_reading`."""

    def on_client_reading(self) -> None: ...


class Handler(Protocol):
    """What answers requests: exactly one answer each, now or later."""

    connections: set[ClientConnection]
    closing: bool

    def permit(self, path: bytes, headers: dict[bytes, bytes]) -> str:
        """The name of the client that asks, before its body is read. Raises ApiError if it may not ask."""

    def handle(self, request: Request, connection: ClientConnection) -> None: ...

    def refused(self, error: ApiError) -> None:
        """A request was so malformed that it was answered without being handled."""


class ClientConnection:
    """One client connection. Requests are answered one after the other in the order in which they came.

    It is an asyncio.Protocol, though not by name, which would slow the compiled class down.
    """

    _transport: asyncio.Transport

    def __init__(self, handler: Handler, limits: ClientLimits) -> None:
        self._handler = handler
        self._limits = limits
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[Request] = deque()
        self._active: Request | None = None
        self._refusal: ApiError | None = None
        self._lingering = False
        self._paused_reading = False
        self._stalled = False
        self._stalled_since_s = 0.0
        self._upgrade_offered = False
        self._host = b""
        # When what is waited for now began: the next request, the rest of its head, the rest of its body.
        self._since_s = time.monotonic()
        self.listener: Listener | None = None
        self._reset()

    def _reset(self) -> None:
        self._in_head = True
        self._receiving = False
        self._upgrade = False
        self._head_bytes = 0
        self._header_lines = 0
        self._url = b""
        self._path = b""
        self._http_1_0 = False
        self._client = ""
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._wire_bytes = 0
        self._trailer_bytes = 0

    # The connection.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, KERNEL_HIGH_BYTES)
        connections = self._handler.connections
        connections.add(self)
        if len(connections) > self._limits.max_connections:
            # No lingering here: it is connections that there are too many of.
            self._refusal = ApiError(503, "the router has as many clients as it can take", retry_after_s=1)
            self._write_refusal(self._refusal)
            self._transport.close()

    def eof_received(self) -> None:
        """The client has closed its side, and so is gone."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._handler.connections.discard(self)
        self._waiting.clear()
        if self.listener is not None:
            listener, self.listener = self.listener, None
            listener.on_client_gone()

    def pause_writing(self) -> None:
        self._stalled = True
        self._stalled_since_s = time.monotonic()
        if self.listener is not None:
            self.listener.on_client_stalled()

    def resume_writing(self) -> None:
        self._stalled = False
        if self.listener is not None:
            self.listener.on_client_reading()
        elif self._active is None and not self._lingering and not self._transport.is_closing():
            self._go_on()

    def close_if_idle(self) -> None:
        """Close unless a request is being received or answered; used when the router stops."""
        if self._active is None and not self._waiting and not self._receiving and not self._lingering:
            self._transport.close()

    def check(self, now_s: float) -> None:
        """End the connection if its client has let a time limit pass."""
        limits, waited_s = self._limits, now_s - self._since_s - self._body_bytes / LEAST_BYTES_PER_S
        if self._stalled and now_s - self._stalled_since_s > limits.stall_timeout_s:
            self._handler.refused(ApiError(408, "the client does not read"))
            self._transport.abort()
        elif self._transport.is_closing():
            if waited_s > limits.stall_timeout_s:  # the last bytes, too few to stall, that nobody takes
                self._transport.abort()
        elif self._active is not None or self._refusal is not None:
            return
        elif not self._receiving:
            if waited_s > limits.idle_timeout_s:
                self.close()
        elif waited_s > (limits.head_timeout_s if self._in_head else limits.body_timeout_s):
            self._refuse(ApiError(408, "the request takes too long to arrive"))

    def close(self) -> None:
        """Close once everything written has been sent."""
        self._since_s = time.monotonic()
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    @property
    def stalled(self) -> bool:
        """Whether the client has stopped reading."""
        return self._stalled

    # Parsing.

    def data_received(self, data: bytes) -> None:
        if self._lingering or self._refusal is not None or self._transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
        else:
            self._wire_bytes += len(data)
        upgrade_at: int | None = None
        try:
            self._parser.feed_data(data)
            if self._in_head:
                if self._head_bytes > MAX_HEAD_BYTES:
                    raise _head_too_large()
            elif self._wire_bytes > MAX_FRAMING_BYTES + (1 + MAX_FRAMING_PER_BYTE) * self._body_bytes:
                raise ApiError(400, "the chunks of the body are framed by more than they hold")
        except ApiError as error:
            self._refuse(error)
        except httptools.HttpParserUpgrade as stop:
            upgrade_at = stop.args[0]
        except httptools.HttpParserError as error:
            cause = error.__context__
            refusal = cause if isinstance(cause, ApiError) else ApiError(400, f"malformed HTTP request: {error}")
            self._refuse(refusal)
        if upgrade_at is not None:
            self._pass_over_upgrade(data[upgrade_at:])

    def _pass_over_upgrade(self, rest: bytes) -> None:
        """Parse a request that offers another protocol as if it did not (RFC 9110, section 7.8).

        Clients that would rather speak HTTP/2 make the offer in passing. llhttp takes what follows the head for the
        other protocol, so the head is parsed again without it.
        """
        parser = self._parser
        fields = {name: value for name, value in self._headers.items() if name not in (b"upgrade", b"connection")}
        if not parser.should_keep_alive():
            fields[b"connection"] = b"close"
        lines = b"".join(b"%b: %b\r\n" % field for field in fields.items())
        version = parser.get_http_version().encode()
        head = b"%b %b HTTP/%b\r\n%b\r\n" % (parser.get_method(), self._url, version, lines)
        self._parser = httptools.HttpRequestParser(self)
        self._upgrade_offered = True
        self._reset()
        self.data_received(head + rest)

    def on_message_begin(self) -> None:
        self._receiving = True
        self._since_s = time.monotonic()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # a trailer of a chunked body: of no use, but not without bounds
            self._trailer_bytes += len(name) + len(value)
            if self._trailer_bytes > MAX_HEAD_BYTES:
                raise ApiError(431, f"trailers exceed {MAX_HEAD_BYTES} bytes")
            return
        name = name.lower()
        value = value.rstrip(b" \t")  # llhttp leaves what is behind a value
        headers = self._headers
        if name in headers:
            if name in SINGLE:
                raise ApiError(400, f"header {name.decode('latin-1')} is given twice")
            value = headers[name] + b", " + value
        headers[name] = value
        self._header_lines += 1
        if self._header_lines > MAX_HEADERS:
            raise ApiError(431, f"more than {MAX_HEADERS} headers")

    def on_headers_complete(self) -> None:
        self._in_head = False
        headers = self._headers
        if len(self._url) + sum(map(len, headers.values())) > MAX_HEAD_BYTES:
            raise _head_too_large()
        version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise ApiError(505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
        self._http_1_0 = http_1_0 = version == "1.0"
        host = headers.get(b"host")
        if host is None:
            if not http_1_0:
                raise ApiError(400, "an HTTP/1.1 request needs a Host header")
        elif host != self._host:  # a client asks for the same one again and again
            if HOST.fullmatch(host) is None:
                raise ApiError(400, "the Host header names no host")
            self._host = host
        if self._parser.get_method() == b"CONNECT":
            raise ApiError(400, "CONNECT is not supported")
        self._upgrade = self._parser.should_upgrade()
        if self._upgrade:
            if self._upgrade_offered:
                raise ApiError(400, "a change of protocol is not supported, and was offered before")
            return  # see _pass_over_upgrade
        coding = headers.get(b"transfer-encoding")
        length = headers.get(b"content-length")
        if coding is not None and (length is not None or http_1_0 or coding.lower() != b"chunked"):
            raise ApiError(400, "Transfer-Encoding must be chunked, alone and without Content-Length")
        if length is not None and int(length) > self._limits.max_body_bytes:
            raise self._too_large()
        self._path = _path(self._url)
        self._client = self._handler.permit(self._path, headers)
        self._since_s = time.monotonic()
        expect = headers.get(b"expect")
        if expect is not None:
            if expect.lower() != b"100-continue":
                raise ApiError(417, "only Expect: 100-continue is understood")
            if self._active is None and not http_1_0:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        self._body.append(data)
        self._body_bytes += len(data)
        if self._body_bytes > self._limits.max_body_bytes:
            raise self._too_large()

    def on_message_complete(self) -> None:
        if self._upgrade or self._transport.is_closing():
            return
        request = Request(
            self._parser.get_method(),
            self._path,
            self._headers,
            self._body[0] if len(self._body) == 1 else b"".join(self._body),
            keep_alive=self._parser.should_keep_alive(),
            http_1_0=self._http_1_0,
            client=self._client,
        )
        self._reset()
        if self._active is None and not self._waiting and not self._stalled:
            self._begin(request)
            return
        # Pipelined: it waits, and nothing more is read until its turn. So it does while earlier answers are not read.
        if len(self._waiting) == MAX_PIPELINED:
            raise ApiError(400, f"more than {MAX_PIPELINED} requests wait on this connection")
        self._waiting.append(request)
        if not self._paused_reading:
            self._paused_reading = True
            self._transport.pause_reading()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request body exceeds {self._limits.max_body_bytes} bytes")

    def _refuse(self, error: ApiError) -> None:
        """Answer what cannot be parsed, after the requests before it, and close."""
        if self._transport.is_closing():
            return  # bytes behind a request that was the last one
        self._refusal = error
        if self._active is None and not self._waiting:
            self._answer_refusal()

    def _answer_refusal(self) -> None:
        error = cast(ApiError, self._refusal)
        self._handler.refused(error)
        if self._transport.is_closing():
            return
        self._write_refusal(error)
        self._lingering = True
        if self._paused_reading:
            self._transport.resume_reading()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_S, self._transport.abort)

    def _write_refusal(self, error: ApiError) -> None:
        body = error.body()
        extra = error_headers(error) + b"connection: close\r\n"
        self._transport.write(answer_head(error.status, b"application/json", len(body), extra) + body)

    # Answering.

    def _begin(self, request: Request) -> None:
        self._active = request
        self._handler.handle(request, self)

    def respond(self, status: int, body: bytes, content_type: bytes = b"application/json", extra: bytes = b"") -> None:
        """The whole answer to the active request. `extra` holds further header lines, each ended by CRLF."""
        request = cast(Request, self._active)
        if self._handler.closing:
            request.keep_alive = False
        if not request.keep_alive:
            extra += b"connection: close\r\n"
        elif request.http_1_0:
            extra += b"connection: keep-alive\r\n"
        head = answer_head(status, content_type, len(body), extra)
        self._transport.write(head if request.method == b"HEAD" else head + body)
        self._finish()

    def respond_error(self, error: ApiError, extra: bytes = b"") -> None:
        self.respond(error.status, error.body(), extra=extra + error_headers(error))

    def begin_stream(self, content_type: bytes, extra: bytes = b"") -> None:
        """Start an answer of unknown length: chunked, or until the end of the connection for HTTP/1.0."""
        request = cast(Request, self._active)
        if request.http_1_0 or self._handler.closing:
            request.keep_alive = False
        if not request.keep_alive:
            extra += b"connection: close\r\n"
        if not request.http_1_0:
            extra += b"transfer-encoding: chunked\r\n"
        self._transport.write(answer_head(200, content_type, None, extra))

    def write(self, data: bytes, framed: bytes | None = None) -> None:
        """A piece, not empty, of the answer that `begin_stream` started. framed: the same as a chunk, if it is one."""
        if self._active.http_1_0:  # type: ignore[union-attr]
            self._transport.write(data)
        else:
            self._transport.write(framed or b"%x\r\n%b\r\n" % (len(data), data))

    def end_stream(self) -> None:
        if not cast(Request, self._active).http_1_0:
            self._transport.write(b"0\r\n\r\n")
        self._finish()

    def break_stream(self) -> None:
        """Close without the end of the answer, so that nobody takes what was sent for all of it."""
        self.listener = None
        self.close()

    def _finish(self) -> None:
        request = cast(Request, self._active)
        self._active = None
        self._since_s = time.monotonic()
        self.listener = None
        if not request.keep_alive:
            self._transport.close()
        elif not self._stalled:
            self._go_on()

    def _go_on(self) -> None:
        """Turn to what the client sent behind the request that was answered."""
        if self._waiting:
            # Not from here: a handler that answers at once would recurse once for each pipelined request.
            asyncio.get_running_loop().call_soon(self._next)
        elif self._refusal is not None:
            self._answer_refusal()
        elif self._paused_reading:
            self._paused_reading = False
            self._transport.resume_reading()

    def _next(self) -> None:
        if self._waiting and self._active is None and not self._stalled:
            self._begin(self._waiting.popleft())


def _head_too_large() -> ApiError:
    return ApiError(431, f"request line and headers exceed {MAX_HEAD_BYTES} bytes")


def _path(url: bytes) -> bytes:
    """The path of a request target, without its query; an absolute target names its path too."""
    if not url.startswith(b"/"):
        try:
            url = httptools.parse_url(url).path or b"/"
        except httptools.HttpParserInvalidURLError:
            raise ApiError(400, "the request target is malformed") from None
    return url.partition(b"?")[0]
