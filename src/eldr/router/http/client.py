"""One connection to a worker, and one exchange of request and answer on it at a time.

Whether a failed request can safely be sent again depends on whether any byte of it was sent. `ConnectError` means that
none was. `ExchangeError` means that the worker may have acted on the request.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from typing import ClassVar, Protocol, cast

import httptools
import orjson

from eldr.router.http.body_memory import BodyMemory, Hold
from eldr.router.http.keepalive import keep_alive

# vLLM closes a connection after 5 s without a request (VLLM_HTTP_TIMEOUT_KEEP_ALIVE). A connection is not reused when
# it is nearly that old: the request could cross the worker's close on the wire, and would then count as sent.
KEEP_IDLE_S = 3.0
# The kernel's receive buffer of one worker connection. Without a limit it would grow to megabytes for each client that
# does not read.
RECEIVE_BYTES = 64 * 1024
# How long the worker's kernel may leave bytes or keepalive probes unacknowledged. After that, the host is gone, or its
# full backlog dropped the connection. A stopped process does not trip this limit: its kernel still acknowledges.
UNACKNOWLEDGED_MS = 20_000
# On Linux, the limit above replaces the number of probes (tcp(7), TCP_USER_TIMEOUT) and counts from the last byte
# heard, silence included. These times let three probes go out within it, so the loss of one packet ends nothing.
PROBE_IDLE_S = 10
PROBE_INTERVAL_S = 3
MAX_HEAD_BYTES = 64 * 1024
# The largest answer that is held in memory. A long completion with logprobs takes a few MiB.
MAX_ANSWER_BYTES = 256 * 1024 * 1024
# Chunk sizes below 4 KiB, spelled as the router itself writes them, and the longest line that holds one.
CHUNK_SIZES = {b"%x" % size: size for size in range(1, 4096)}
SIZE_LINE_BYTES = 5


class UpstreamError(Exception):
    """A worker gave no valid HTTP answer. reason: why, as a metric label."""

    reason: ClassVar[str]
    timed_out: ClassVar[bool] = False


class ConnectError(UpstreamError):
    """No connection could be made: refused, unreachable, timed out or TLS failed. No byte of the request was sent."""

    reason: ClassVar[str] = "refused"


class ConnectTimeoutError(ConnectError):
    """The connection was not established in time."""

    timed_out: ClassVar[bool] = True


class ExchangeError(UpstreamError):
    """The exchange broke after bytes of the request may have been sent."""

    reason: ClassVar[str] = "failed"


class SilenceError(ExchangeError):
    """The answer, or its next byte, did not come in time."""

    reason: ClassVar[str] = "timeout"
    timed_out: ClassVar[bool] = True


class Exchange(Protocol):
    """Receives one answer as it arrives: `on_head`, then `on_body` for each piece, then `on_done`.

    `on_failed` can come at any time instead.
    Nothing is called after `on_done` or `on_failed`. Header names are lower-case.

    begun: whether a part of the answer has been passed on. From then on, only the limit on silence applies.
    memory: counts what is collected. The connection sets it before anything is called.
    """

    begun: bool
    memory: BodyMemory | None

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None: ...

    def on_body(self, data: bytes, framed: bytes | None = None) -> None:
        """A piece of the body. framed: the HTTP chunk that it came in, if it fills one exactly."""

    def on_done(self) -> None: ...

    def on_failed(self, error: ExchangeError) -> None: ...


class Answer:
    """Collects a whole answer in memory.

    finished: resolves when it is complete or has failed.
    failure: why it failed. None if it did not.
    no_room: whether it failed because the router has no memory left for it. The worker is not to blame then, and
        another attempt would not help.

    most_bytes: the largest body that is accepted.
    ours: whether the router asked for itself. It then always finds room, because a worker that cannot be probed would
        be taken out of service.
    """

    def __init__(self, most_bytes: int = MAX_ANSWER_BYTES, ours: bool = False) -> None:
        self.begun = False
        self.failure: ExchangeError | None = None
        self.no_room = False
        self._most_bytes = most_bytes
        self._ours = ours
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.memory: BodyMemory | None = None
        self._hold: Hold | None = None
        self._pieces: list[bytes] = []
        self._bytes = 0

    @property
    def body(self) -> bytes:
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    def replace_body(self, body: bytes) -> None:
        """Put a shorter body in the place of the one that was collected."""
        self._pieces = [body]

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status = status
        self.headers = headers

    def on_body(self, data: bytes, framed: bytes | None = None) -> None:
        size = len(data)
        if self._bytes + size > self._most_bytes:
            raise ExchangeError(f"the answer exceeds {self._most_bytes} bytes")
        if self.memory is not None:
            if not self._ours and not self.memory.admits_answer(self._bytes, size):
                self.no_room = True
                raise ExchangeError("no memory is left for the answer")
            if self._hold is None:
                self._hold = Hold(self.memory)
            self._hold.add(size)
        self._bytes += size
        self._pieces.append(data)

    def on_done(self) -> None:
        if not self.finished.done():
            self.finished.set_result(None)

    def on_failed(self, error: ExchangeError) -> None:
        if not self.finished.done():
            self.failure = error
            self.finished.set_result(None)

    def take_failure(self) -> ExchangeError:
        """Return the failure, to be raised. The answer keeps it no longer.

        An exception knows the frames that it passed, and they know the answer: together they would be a cycle.
        """
        failure, self.failure = self.failure, None
        assert failure is not None
        return failure

    def json(self) -> object:
        """The body, parsed as JSON. Raises ExchangeError if it is not JSON."""
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError as error:
            raise ExchangeError(f"the answer is not JSON: {error}") from None


class Pool(Protocol):
    """The pool that a connection belongs to. active: connections with an exchange under way."""

    url: str
    memory: BodyMemory
    active: set[WorkerConnection]

    def release(self, connection: WorkerConnection) -> None:
        """Take back a connection whose exchange is over, for the next one."""

    def forget(self, connection: WorkerConnection) -> None:
        """Drop a connection that was lost."""

    def close_idle(self) -> None:
        """Close the connections without an exchange."""


class WorkerConnection:
    """One connection to a worker. It carries one exchange at a time.

    It implements asyncio.Protocol without inheriting from it, because inheriting would slow the compiled class down.

    It has more attributes than a class should. They hold the exchange's time limits and the state of the parser: each
    token needs both, and a call to another object would cost time per token.
    """

    __deletable__ = ("_parser",)  # for mypyc

    _transport: asyncio.Transport
    _parser: httptools.HttpResponseParser

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._unsent = Hold(pool.memory)  # what waits for a worker that does not read
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
        # Only now, because a connection that is never made is never lost either.
        self._parser = httptools.HttpResponseParser(self)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
            keep_alive(sock, PROBE_IDLE_S, PROBE_INTERVAL_S)

    def pause_writing(self) -> None:
        """Only count what waits: the limit on bodies bounds a request, so its unsent rest may stay in the transport."""
        self._unsent.add(self._transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._unsent.release()

    def eof_received(self) -> None:
        """The worker sends no more. Returning None closes the transport."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        self._unsent.release()
        if self._exchange is not None:
            # If the worker has died, its idle connections are dead too, but the router may not know it yet.
            self._pool.close_idle()
        self.fail(f"the connection closed before the answer was complete{f' ({exc})' if exc else ''}")
        del self._parser  # it knows this connection: no cycle is left to the collector

    # The exchange.

    def start(self, exchange: Exchange, request: bytes, answer_limit_s: float, idle_limit_s: float = math.inf) -> None:
        """Send `request` and report the answer to `exchange`.

        The exchange fails if, after `answer_limit_s`, the answer is neither complete nor passed on in part
        (`Exchange.begun`). It also fails if `idle_limit_s` pass without a byte once the answer has begun.
        """
        self._exchange = exchange
        exchange.memory = self._pool.memory
        self.last_heard_s = time.monotonic()
        self._answer_by_s = self.last_heard_s + answer_limit_s
        self._idle_limit_s = idle_limit_s
        self._pool.active.add(self)
        self._transport.write(request)

    async def finish(self, answer: Answer) -> None:
        """Wait until the `answer` given to `start` is complete. A cancelled wait aborts it. Raises ExchangeError."""
        try:
            await answer.finished
        except asyncio.CancelledError:
            self.abort(answer)
            raise
        if answer.failure is not None:
            raise answer.take_failure()

    # These methods name the exchange that they are meant for. When it ends, the connection is released, and the next
    # exchange may be under way before the caller runs again. A call for the first must not affect the second.

    def abort(self, exchange: Exchange) -> None:
        """Abandon `exchange`, if it is under way, without notifying it.

        The connection closes, and vLLM then aborts the request.
        """
        if self._exchange is exchange:
            self._exchange = None
            self._pool.active.discard(self)
            self._transport.abort()

    def pause(self, exchange: Exchange) -> None:
        """Stop reading, because the client cannot keep up. Does nothing if `exchange` is not under way."""
        if self._exchange is exchange and not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def resume(self, exchange: Exchange) -> None:
        """Resume reading after `pause`."""
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
        """Fail the exchange, to be retried, unless part of its answer was passed on. Returns whether it failed."""
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
        """End the exchange with an error, and close the connection."""
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
                # Nearly every token comes as one whole chunk. It can bypass the parser, which expects a chunk next.
                size_end = data.find(b"\r\n", 0, SIZE_LINE_BYTES)
                if CHUNK_SIZES.get(data[:size_end]) == len(data) - size_end - 4 and data.endswith(b"\r\n"):
                    self._exchange.on_body(data[size_end + 2 : -2], data)
                    return
            began_in_head = self._in_head
            self._parser.feed_data(data)
            if self._between_chunks and not data.endswith(b"\r\n"):
                self._between_chunks = False  # the data ended inside the next chunk's size
            if began_in_head and self._too_long_a_head(len(data)):
                raise ExchangeError(f"headers exceed {MAX_HEAD_BYTES} bytes")
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ExchangeError) as error:
            if not self._complete:
                self.fail(*_why_unusable(error))
                return
            self._keep = False  # there was garbage after the answer
        if self._complete:
            self._finish()

    def _too_long_a_head(self, new_bytes: int) -> bool:
        """Whether an unfinished head exceeds the limit. The parser itself would buffer an endless line."""
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
            self._headers[name.lower()] = value.rstrip(b" \t")  # llhttp keeps trailing whitespace

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        headers, self._headers = self._headers, {}
        if status < 200:
            return
        self._in_head = False
        if b"content-length" not in headers and b"transfer-encoding" not in headers:
            # Such an answer ends when the connection closes, so a truncated one would look complete.
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
            # llhttp forgets the answer's head when this callback returns.
            self._keep = self._parser.should_keep_alive()


def _why_unusable(error: Exception) -> tuple[str, type[ExchangeError]]:
    """The reason, and the kind of error that tells it. The parser wraps what its callbacks raise.

    In the caller's frame the cause would be a cycle, because it knows that frame.
    """
    cause = error if isinstance(error, ExchangeError) else error.__context__
    kind = type(cause) if isinstance(cause, ExchangeError) else ExchangeError
    return f"unusable answer: {cause or error}", kind
