"""Reads requests. llhttp (httptools) parses the bytes, and this module makes the checks that llhttp leaves to callers.

The checks cover the size of head, body and chunk framing, the headers that decide where a message ends (RFC 9112,
section 6), Host, Expect, and offers to switch to another protocol. A request is refused if it is unclear where it ends.
"""

from __future__ import annotations

import re
import time
from enum import Enum
from typing import Any, Final, Protocol

import httptools

from eldr.router.config.groups import ClientLimits
from eldr.router.http.body_memory import BodyMemory, Hold
from eldr.router.http.content_coding import coding_of
from eldr.router.http.errors import ApiError

MAX_HEAD_BYTES = 32 * 1024
MAX_HEADERS = 128
# How many bytes chunk sizes, chunk extensions and line ends may take: a fixed amount, and some for each byte of the
# body. A client that sends one byte a chunk is slow, but not an attack.
MAX_FRAMING_BYTES = 64 * 1024
MAX_FRAMING_PER_BYTE = 16

# Headers that must not be repeated, because a proxy and the router could each obey another copy.
SINGLE = frozenset(
    (b"host", b"content-length", b"transfer-encoding", b"authorization", b"x-api-key", b"api-key", b"content-type")
)
# RFC 9110, section 7.2. A Host of any other form is refused, because another party could read a different host in it.
HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+;=%-]*(:[0-9]*)?|\[[0-9A-Fa-f:.]+\](:[0-9]*)?")


class Request:
    """One complete request.

    query: with its question mark. Empty if there is none.
    headers: with names in lower case. The values of a repeated header are joined by commas.
    hold: counts the body, and is given up with it. None without a body.
    coding: how the body is compressed. Empty if it is not.
    client: the name that the client's key stands for. Empty if the router used none of its keys.
    answer_lines: header lines of any answer to it, each ending in CRLF.
    received_s: monotonic time of arrival.
    """

    __slots__ = (
        "answer_lines", "body", "client", "coding", "headers", "hold", "http_1_0", "keep_alive", "method", "path",
        "query", "received_s",
    )  # fmt: skip

    def __init__(
        self,
        method: bytes,
        path: bytes,
        headers: dict[bytes, bytes],
        body: bytes,
        *,
        hold: Hold | None = None,
        coding: bytes = b"",
        keep_alive: bool = True,
        http_1_0: bool = False,
        client: str = "",
        query: bytes = b"",
        answer_lines: bytes = b"",
    ) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body
        self.hold = hold
        self.coding = coding
        self.keep_alive = keep_alive
        self.http_1_0 = http_1_0
        self.client = client
        self.query = query
        self.answer_lines = answer_lines
        self.received_s = time.monotonic()


def is_hop_by_hop(headers: dict[bytes, bytes], name: bytes) -> bool:
    """Whether the Connection header lists the field, which must then not be forwarded (RFC 9110, section 7.6.1)."""
    connection = headers.get(b"connection")
    return connection is not None and name in (token.strip().lower() for token in connection.split(b","))


class Sink(Protocol):
    """Receives the requests of one client, in their order."""

    def answer_lines(self, headers: dict[bytes, bytes]) -> bytes:
        """The header lines of any answer to a request with these headers, an error included."""

    def permit(self, method: bytes, path: bytes, headers: dict[bytes, bytes]) -> str:
        """The client's name, decided before the body is read. Raises ApiError if the request is not allowed."""

    def on_expect(self) -> None:
        """The client waits for a 100 Continue before it sends the body."""

    def on_request(self, request: Request) -> None:
        """A request is complete. Raises ApiError if too many are waiting."""


class Stage(Enum):
    """How much of the next request has arrived."""

    AWAITED = "nothing"
    HEAD = "a part of its head"
    BODY = "its head"
    FAILED = "unreadable input, so that nothing after it can be read"


# Before Python 3.12, looking up an enum's member costs a function call.
AWAITED: Final = Stage.AWAITED
HEAD: Final = Stage.HEAD
BODY: Final = Stage.BODY
FAILED: Final = Stage.FAILED


class IncomingMessage:
    """The part of one request that has arrived. Raises ApiError once it exceeds a limit."""

    def __init__(self, max_body_bytes: int, memory: BodyMemory) -> None:
        self.url = b""
        self.path = b""
        self.query = b""
        self.answer_lines = b""
        self.http_1_0 = False
        self.headers: dict[bytes, bytes] = {}
        self.client = ""
        self.coding = b""
        self.body_bytes = 0
        self.hold: Hold | None = None
        self._memory = memory
        self._max_body_bytes = min(max_body_bytes, memory.most_request_bytes)
        self._header_lines = 0
        self._pieces: list[bytes] = []
        self._trailer_bytes = 0

    @property
    def body(self) -> bytes:
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)

    def add_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        value = value.rstrip(b" \t")  # llhttp keeps trailing whitespace
        headers = self.headers
        if name in headers:
            if name in SINGLE:
                raise ApiError(400, f"header {name.decode('latin-1')} is given twice")
            value = headers[name] + b", " + value
        headers[name] = value
        self._header_lines += 1
        if self._header_lines > MAX_HEADERS:
            raise ApiError(431, f"more than {MAX_HEADERS} headers")

    def check_head_bytes(self) -> None:
        if len(self.url) + sum(map(len, self.headers.values())) > MAX_HEAD_BYTES:
            raise _head_too_large()

    def check_framing(self) -> None:
        """Raises ApiError if it is unclear where the body ends, or if the body is too large."""
        headers = self.headers
        coding = headers.get(b"transfer-encoding")
        length = headers.get(b"content-length")
        if coding is not None and (length is not None or self.http_1_0 or coding.lower() != b"chunked"):
            raise ApiError(400, "Transfer-Encoding must be chunked, alone and without Content-Length")
        if length is not None and int(length) > self._max_body_bytes:
            raise self._body_too_large()

    def check_room(self) -> None:
        """Raises ApiError if the body is known not to find room in memory."""
        length = self.headers.get(b"content-length")
        if length is not None:
            self._memory.admit_request(0, int(length))

    def add_body(self, data: bytes) -> None:
        size = len(data)
        if self.body_bytes + size > self._max_body_bytes:
            raise self._body_too_large()
        self._memory.admit_request(self.body_bytes, size)
        if self.hold is None:
            self.hold = Hold(self._memory)
        self.hold.add(size)
        self._pieces.append(data)
        self.body_bytes += size

    def add_trailer(self, name: bytes, value: bytes) -> None:
        """Count a trailer of a chunked body and drop it. Raises ApiError if trailers are too large."""
        self._trailer_bytes += len(name) + len(value)
        if self._trailer_bytes > MAX_HEAD_BYTES:
            raise ApiError(431, f"trailers exceed {MAX_HEAD_BYTES} bytes")

    def _body_too_large(self) -> ApiError:
        return ApiError(413, f"the request body exceeds {self._max_body_bytes} bytes")


class RequestReader:
    """Reads the requests of one client from its bytes.

    stage: how much of the next request has arrived.
    since_s: monotonic time at which the head of that request began to arrive or, after its head, the body.
    """

    __deletable__ = ("_parser", "_sink")  # for mypyc

    def __init__(self, limits: ClientLimits, memory: BodyMemory, sink: Sink) -> None:
        self._limits = limits
        self._memory = memory
        self._sink = sink
        self._parser = httptools.HttpRequestParser(self)
        self._upgrade_offered = False
        self._host = b""
        self.since_s = 0.0
        self._await_next()

    def _await_next(self) -> None:
        self.stage: Stage = AWAITED
        self._message = IncomingMessage(self._limits.max_body_bytes, self._memory)
        # Bytes of the head so far or, after the head, of the body. The piece in which the body began is not counted.
        self._fed_bytes = 0

    @property
    def answer_lines(self) -> bytes:
        """Header lines for an answer that refuses the next request. Empty until its head has arrived."""
        return self._message.answer_lines

    @property
    def path(self) -> bytes:
        """The path of the next request. Empty until its head has arrived."""
        return self._message.path

    @property
    def body_bytes(self) -> int:
        """How much of the next request's body has arrived."""
        return self._message.body_bytes

    def feed(self, data: bytes) -> None:
        """Read more input, and give the sink each request that it completes.

        Raises ApiError if the input cannot be read. Feed nothing more after that.
        """
        try:
            self._feed(data)
        except ApiError:
            self._fail()
            raise

    def close(self) -> None:
        """Let go of what has arrived, of the sink and of the parser, which know this reader. Call nothing after that.

        Otherwise memory would wait for the garbage collector, which comes rarely.
        """
        self._fail()
        del self._parser, self._sink

    def _fail(self) -> None:
        """Keep only what the answer to the unreadable request depends on."""
        self.stage = FAILED
        message, self._message = self._message, IncomingMessage(0, self._memory)
        self._message.path, self._message.answer_lines = message.path, message.answer_lines

    def _feed(self, data: bytes) -> None:
        self._fed_bytes += len(data)
        upgrade_at: int | None = None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as stop:
            upgrade_at = stop.args[0]
        except httptools.HttpParserError as error:
            if error.__context__ is not None:  # raised by one of the callbacks below
                raise error.__context__ from None
            raise ApiError(400, f"malformed HTTP request: {error}") from None
        if upgrade_at is not None:
            self._pass_over_upgrade(data[upgrade_at:])
        elif self.stage is not BODY:
            if self._fed_bytes > MAX_HEAD_BYTES:
                raise _head_too_large()
        elif self._fed_bytes > MAX_FRAMING_BYTES + (1 + MAX_FRAMING_PER_BYTE) * self._message.body_bytes:
            raise ApiError(400, "the chunk framing of the body is larger than its content")

    def _pass_over_upgrade(self, rest: bytes) -> None:
        """Ignore a request's offer to switch to another protocol (RFC 9110, section 7.8).

        Some clients offer HTTP/2 this way in ordinary requests. llhttp treats everything after such a head as the other
        protocol, so the head is parsed again without the offer.
        """
        parser, message = self._parser, self._message
        fields = {name: value for name, value in message.headers.items() if name not in (b"upgrade", b"connection")}
        if not parser.should_keep_alive():
            fields[b"connection"] = b"close"
        lines = b"".join(b"%b: %b\r\n" % field for field in fields.items())
        version = parser.get_http_version().encode()
        head = b"%b %b HTTP/%b\r\n%b\r\n" % (parser.get_method(), message.url, version, lines)
        self._parser = httptools.HttpRequestParser(self)
        self._upgrade_offered = True
        self._await_next()
        self._feed(head + rest)

    # Callbacks of the parser.

    def on_message_begin(self) -> None:
        self.stage = HEAD
        self.since_s = time.monotonic()

    def on_url(self, url: bytes) -> None:
        self._message.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.stage is BODY:
            self._message.add_trailer(name, value)
        else:
            self._message.add_header(name, value)

    def on_headers_complete(self) -> None:
        message = self._message
        headers = message.headers
        self.stage = BODY
        self._fed_bytes = 0
        message.check_head_bytes()
        version = self._parser.get_http_version()
        if version not in ("1.1", "1.0"):
            raise ApiError(505, "only HTTP/1.1 and HTTP/1.0 are supported")
        message.http_1_0 = version == "1.0"
        self._check_host(headers.get(b"host"))
        if self._parser.get_method() == b"CONNECT":
            raise ApiError(400, "CONNECT is not supported")
        if self._parser.should_upgrade():
            if self._upgrade_offered:
                raise ApiError(400, "switching protocols is not supported, and this connection offered it before")
            return  # see _pass_over_upgrade
        message.answer_lines = self._sink.answer_lines(headers)
        message.path, message.query = _path_and_query(message.url)
        message.check_framing()
        message.client = self._sink.permit(self._parser.get_method(), message.path, headers)
        message.coding = coding_of(headers)
        message.check_room()
        self.since_s = time.monotonic()
        expect = headers.get(b"expect")
        if expect is not None:
            if expect.lower() != b"100-continue":
                raise ApiError(417, "the only supported Expect is 100-continue")
            if not message.http_1_0:
                self._sink.on_expect()

    def _check_host(self, host: bytes | None) -> None:
        if host is None:
            if not self._message.http_1_0:
                raise ApiError(400, "an HTTP/1.1 request needs a Host header")
        elif host != self._host:  # a client sends the same one every time
            if HOST.fullmatch(host) is None:
                raise ApiError(400, "the Host header is malformed")
            self._host = host

    def on_body(self, data: bytes) -> None:
        self._message.add_body(data)

    def on_message_complete(self) -> None:
        parser, message = self._parser, self._message
        if parser.should_upgrade():
            return
        request = Request(
            parser.get_method(),
            message.path,
            message.headers,
            message.body,
            hold=message.hold,
            coding=message.coding,
            keep_alive=parser.should_keep_alive(),
            http_1_0=message.http_1_0,
            client=message.client,
            query=message.query,
            answer_lines=message.answer_lines,
        )
        self._await_next()
        self._sink.on_request(request)


def _head_too_large() -> ApiError:
    return ApiError(431, f"request line and headers exceed {MAX_HEAD_BYTES} bytes")


def _path_and_query(url: bytes) -> tuple[bytes, bytes]:
    """The path of a request target, and its query with the question mark. The target may be an absolute URL."""
    if not url.startswith(b"/"):
        try:
            parts: Any = httptools.parse_url(url)  # its stubs leave out that path and query can be None
        except httptools.HttpParserInvalidURLError:
            raise ApiError(400, "the request target is malformed") from None
        return parts.path or b"/", b"" if parts.query is None else b"?" + parts.query
    path, mark, query = url.partition(b"?")
    return path, mark + query
