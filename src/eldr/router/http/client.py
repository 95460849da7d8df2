"""One connection to a worker, and one exchange of request and answer on it at a time.

What a failure allows depends on whether any byte of the request has left: `ConnectError` means that none has,
`ExchangeError` that the worker may have acted on it.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from typing import ClassVar, Protocol, cast

import httptools
import orjson

# vLLM closes a connection after 5 s without a request (VLLM_HTTP_TIMEOUT_KEEP_ALIVE). One that is nearly that old is
# not used again: the request could cross the worker's close on the wire and count as sent.
KEEP_IDLE_S = 3.0
# The kernel's buffer for one worker connection. Left to itself it grows to megabytes for every client that does not
# read, and those are memory too.
RECEIVE_BYTES = 64 * 1024
# How long the worker's kernel may leave bytes unacknowledged: its host is gone, or never took the connection that its
# backlog of connections had no room for. A stopped process is not meant, its kernel acknowledges.
UNACKNOWLEDGED_MS = 10_000
MAX_HEAD_BYTES = 64 * 1024
# Largest answer that is held in memory: a long completion with logprobs takes a few MiB.
MAX_ANSWER_BYTES = 256 * 1024 * 1024
# Sizes of chunks up to 4 KiB, as the router itself writes them, and where their line ends at the latest.
CHUNK_SIZES = {b"%x" % size: size for size in range(1, 4096)}
SIZE_LINE_BYTES = 5


class UpstreamError(Exception):
    """A worker did not answer as HTTP wants it. reason: why, as a metric label."""

    reason: ClassVar[str]
    timed_out: ClassVar[bool] = False


class ConnectError(UpstreamError):
    """No connection: refused, unreachable, timed out or no TLS. No byte of the request was sent."""

    reason: ClassVar[str] = "refused"


class ConnectTimeoutError(ConnectError):
    """No connection in time."""

    timed_out: ClassVar[bool] = True


class ExchangeError(UpstreamError):
    """The exchange broke after bytes of the request may have been sent."""

    reason: ClassVar[str] = "failed"


class SilenceError(ExchangeError):
    """The answer, or the next byte of it, did not come in time."""

    reason: ClassVar[str] = "timeout"
    timed_out: ClassVar[bool] = True


class Exchange(Protocol):
    """Hears one answer as it arrives: `on_head`, any number of `on_body`, then `on_done`; or `on_failed` at any time.

    Nothing is called after `on_done` or `on_failed`. Header names are lower-case.

    begun: whether a part of the answer has been passed on, so that from here on only silence counts against it.
    """

    begun: bool

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None: ...

    def on_body(self, data: bytes, framed: bytes | None = None) -> None:
        """A piece of the body. framed: the same as the chunk that it came as, if it is exactly one, for whoever passes
        it on in chunks."""

    def on_done(self) -> None: ...

    def on_failed(self, error: ExchangeError) -> None: ...


class Answer:
    """A whole answer in memory. `finished` resolves when it is complete, or raises ExchangeError."""

    def __init__(self) -> None:
        self.begun = False
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []
        self._bytes = 0

    @property
    def body(self) -> bytes:
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status = status
        self.headers = headers

    def on_body(self, data: bytes, framed: bytes | None = None) -> None:
        self._bytes += len(data)
        if self._bytes > MAX_ANSWER_BYTES:
            raise ExchangeError(f"the answer exceeds {MAX_ANSWER_BYTES} bytes")
        self._pieces.append(data)

    def on_done(self) -> None:
        if not self.finished.done():
            self.finished.set_result(None)

    def on_failed(self, error: ExchangeError) -> None:
        if not self.finished.done():
            self.finished.set_exception(error)

    def json(self) -> object:
        """The body as JSON. Raises ExchangeError if it is none."""
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError as error:
            raise ExchangeError(f"the answer is not JSON: {error}") from None


class Pool(Protocol):
    """Where a connection belongs. active: connections with an exchange under way."""

    url: str
    active: set[WorkerConnection]

    def release(self, connection: WorkerConnection) -> None:
        """Its exchange is over, and it can be used again."""

    def forget(self, connection: WorkerConnection) -> None:
        """It is lost."""

    def close_idle(self) -> None:
        """Close the connections on which nothing is under way."""


class WorkerConnection:
    """One connection to a worker: an asyncio.Protocol, though not by name, which would slow the compiled class down.

    It has more attributes than a class should: the clock of an exchange, and how far its answer has come. Every token
    needs both, and no call of another object.
    """

    _transport: asyncio.Transport

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: Exchange | None = None
        self._answer_by_s = 0.0
        self._idle_limit_s = 0.0
        self._in_head = True
        self._between_chunks = False
        self._complete = False
        self._keep = False
        self._paused = False
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = 0
        self.last_heard_s = time.monotonic()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)

    def pause_writing(self) -> None:
        """Requests are bounded by the limit on bodies: what the worker does not take yet may wait in the transport."""

    def resume_writing(self) -> None: ...

    def eof_received(self) -> None:
        """Nothing more will come: the transport closes."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        if self._exchange is not None:
            # A worker that dies takes its other connections along, which may not have heard of it yet.
            self._pool.close_idle()
        self.fail(f"the connection closed before the answer was complete{f' ({exc})' if exc else ''}")

    # The exchange.

    def start(self, exchange: Exchange, request: bytes, answer_limit_s: float, idle_limit_s: float = math.inf) -> None:
        """Send `request` and report the answer to `exchange`.

        It fails unless the answer has begun (`Exchange.begun`) or is complete within `answer_limit_s`, however much
        came until then, and after that if more than `idle_limit_s` pass without a byte.
        """
        self._exchange = exchange
        self.last_heard_s = time.monotonic()
        self._answer_by_s = self.last_heard_s + answer_limit_s
        self._idle_limit_s = idle_limit_s
        self._pool.active.add(self)
        self._transport.write(request)

    async def finish(self, answer: Answer) -> None:
        """Wait for the answer that `start` was given; a cancelled wait aborts. Raises ExchangeError."""
        try:
            await answer.finished
        except asyncio.CancelledError:
            self.abort(answer)
            raise

    # An exchange that has ended has released the connection, and another may be under way on it before whoever waited
    # for the first one runs again: what is meant for the one must not reach the other.

    def abort(self, exchange: Exchange) -> None:
        """Give `exchange` up without a word to it, if it is under way. vLLM aborts what nobody listens to."""
        if self._exchange is exchange:
            self._exchange = None
            self._pool.active.discard(self)
            self._transport.abort()

    def pause(self, exchange: Exchange) -> None:
        """Read no more: whoever takes the answer cannot keep up. Nothing if `exchange` is not under way."""
        if self._exchange is exchange and not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def resume(self, exchange: Exchange) -> None:
        """Read on after `pause`."""
        if self._exchange is exchange:
            self._read_on()

    def _read_on(self) -> None:
        if self._paused and not self._transport.is_closing():
            self._paused = False
            self.last_heard_s = time.monotonic()
            self._transport.resume_reading()

    def check_silence(self, now_s: float) -> None:
        if self._paused or self._exchange is None:
            return
        if not self._exchange.begun:
            if now_s > self._answer_by_s:
                self.fail("no answer in time", SilenceError)
        elif now_s - self.last_heard_s > self._idle_limit_s:
            self.fail(f"no byte for {self._idle_limit_s:g} s", SilenceError)

    def give_up_waiting(self, reason: str) -> bool:
        """Fail the exchange if nothing of its answer was passed on, so that it can be tried elsewhere."""
        if self._exchange is None or self._exchange.begun:
            return False
        self.fail(reason, SilenceError)
        return True

    @property
    def usable(self) -> bool:
        return not self._transport.is_closing() and time.monotonic() - self.last_heard_s < KEEP_IDLE_S

    def close(self) -> None:
        self._transport.close()

    def fail(self, reason: str, kind: type[ExchangeError] = ExchangeError) -> None:
        """Give the exchange up and tell it why."""
        self._pool.active.discard(self)
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.on_failed(kind(f"{self._pool.url}: {reason}"))
        self._transport.abort()

    # Parsing.

    def data_received(self, data: bytes) -> None:
        if self._exchange is None:
            self._transport.abort()
            return
        self.last_heard_s = time.monotonic()
        try:
            if self._between_chunks:
                # Nearly every token comes as one chunk: a whole one needs no parser, which stays where it is.
                size_end = data.find(b"\r\n", 0, SIZE_LINE_BYTES)
                if CHUNK_SIZES.get(data[:size_end]) == len(data) - size_end - 4 and data.endswith(b"\r\n"):
                    self._exchange.on_body(data[size_end + 2 : -2], data)
                    return
            began_in_head = self._in_head
            self._parser.feed_data(data)
            if self._between_chunks and not data.endswith(b"\r\n"):
                self._between_chunks = False  # in the middle of the next one's size
            if began_in_head and self._too_long_a_head(len(data)):
                raise ExchangeError(f"headers exceed {MAX_HEAD_BYTES} bytes")
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ExchangeError) as error:
            if not self._complete:
                cause = error if isinstance(error, ExchangeError) else error.__context__
                kind = type(cause) if isinstance(cause, ExchangeError) else ExchangeError
                self.fail(f"unusable answer: {cause or error}", kind)
                return
            self._keep = False  # garbage after the answer
        if self._complete:
            self._finish()

    def _too_long_a_head(self, new_bytes: int) -> bool:
        """Whether the parser holds too much of a head; it would keep a line without an end for ever."""
        self._head_bytes += new_bytes
        return self._in_head and self._head_bytes > MAX_HEAD_BYTES

    def _finish(self) -> None:
        exchange, self._exchange = self._exchange, None
        self._complete = False
        self._in_head = True
        self._between_chunks = False
        self._head_bytes = 0
        self._pool.active.discard(self)
        self._read_on()
        if self._keep:
            self._pool.release(self)
        else:
            self._transport.close()
        if exchange is not None:
            exchange.on_done()

    def on_message_begin(self) -> None:
        if self._complete:
            raise ExchangeError("more than one answer")
        self._headers = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else a trailer
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        headers, self._headers = self._headers, {}
        if status < 200:
            return
        self._in_head = False
        if b"content-length" not in headers and b"transfer-encoding" not in headers:
            # Such an answer ends with the connection, so that a broken one looks whole.
            raise ExchangeError("neither Content-Length nor Transfer-Encoding")
        if self._exchange is not None:
            self._exchange.on_head(status, headers)

    def on_body(self, data: bytes) -> None:
        if self._exchange is not None:
            self._exchange.on_body(data)

    def on_chunk_header(self) -> None:
        self._between_chunks = False

    def on_chunk_complete(self) -> None:
        self._between_chunks = True

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() >= 200:
            self._complete = True
            # llhttp forgets the answer's head when it returns from here.
            self._keep = self._parser.should_keep_alive()
