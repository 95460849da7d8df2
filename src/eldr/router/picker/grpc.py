"""gRPC over HTTP/2, the server's side: messages in, messages out, and one status at the end of each call.

https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md. No message is compressed, since no peer has to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Final, Protocol
from urllib.parse import quote

from eldr.router.picker.http2 import Headers, Receiver, Stream

log = logging.getLogger("eldr.router")

TYPE: Final = b"application/grpc"
BEGIN: Final[Headers] = [(b":status", b"200"), (b"content-type", TYPE)]
# The length of a message stands in front of it, behind a byte that says whether it is compressed.
PREFIX_BYTES: Final = 5


class Status(IntEnum):
    """https://github.com/grpc/grpc/blob/master/doc/statuscodes.md"""

    OK = 0
    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class GrpcError(Exception):
    """A call that ends with an error. message: for people."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


class TooLongError(GrpcError):
    """A message that is longer than it may be."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(Status.RESOURCE_EXHAUSTED, f"a message exceeds {most_bytes} bytes")


class Answering(Protocol):
    """Answers one call."""

    def on_message(self, message: bytes) -> None:
        """Raises GrpcError, which ends the call."""

    def on_part(self, size: int) -> None:
        """So many bytes have come of a message that is not whole."""

    def on_too_long(self) -> None:
        """A message is longer than it may be. If this does not end the call, it ends with that error."""

    def on_end(self) -> None:
        """The peer sends nothing more. Raises GrpcError, which ends the call."""

    def on_gone(self) -> None:
        """The peer has left, or the call has ended with an error. Nothing can be sent any more."""


class MessageReader:
    """Finds the messages in the bytes of one call. most_bytes: of one message."""

    __slots__ = ("_held", "_held_bytes", "_most_bytes", "_wanted_bytes")

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._wanted_bytes = 0

    @property
    def empty(self) -> bool:
        """Whether nothing of a further message has come."""
        return not self._held

    @property
    def held_bytes(self) -> int:
        """How much of a further message has come."""
        return self._held_bytes if self._held else 0

    def let_go(self) -> None:
        """Forget what has come of a further message."""
        self._held.clear()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the messages that `data` completes. Raises GrpcError."""
        if not data:  # nothing limits how many frames are empty
            return []
        if self._held:
            self._held.append(data)
            self._held_bytes += len(data)
            if self._held_bytes < self._wanted_bytes:
                return []
            data = b"".join(self._held)
            self._held.clear()
        messages: list[bytes] = []
        at, end = 0, PREFIX_BYTES
        while len(data) >= at + PREFIX_BYTES:
            if data[at]:
                raise GrpcError(Status.UNIMPLEMENTED, "compressed messages are not read")
            size = int.from_bytes(data[at + 1 : at + PREFIX_BYTES], "big")
            if size > self._most_bytes:
                raise TooLongError(self._most_bytes)
            end = at + PREFIX_BYTES + size
            if end > len(data):
                break
            messages.append(data[at + PREFIX_BYTES : end])
            at, end = end, end + PREFIX_BYTES
        if at < len(data):
            self._held.append(data[at:])
            self._held_bytes, self._wanted_bytes = len(data) - at, end - at
        return messages


class Call:
    """One call. Nothing is sent after its end."""

    __slots__ = ("_answering", "_begun", "_reader", "_stream", "over")

    def __init__(self, stream: Stream, most_bytes: int) -> None:
        self._stream = stream
        self._reader = MessageReader(most_bytes)
        self._answering: Answering | None = None
        self._begun = False
        self.over = False

    def answer_with(self, answering: Answering) -> None:
        self._answering = answering

    def send(self, message: bytes) -> None:
        if self.over:
            return
        if not self._begun:
            self._begun = True
            self._stream.begin(BEGIN)
        self._stream.write(b"\0%b%b" % (len(message).to_bytes(4, "big"), message))

    def end(self, status: Status = Status.OK, message: str = "") -> None:
        """End the call after everything that was sent. Does nothing the second time."""
        if self.over:
            return
        self.over = True
        self._answering = None
        self._reader.let_go()
        trailers = [(b"grpc-status", b"%d" % status)]
        if message:
            trailers.append((b"grpc-message", quote(message, safe=" ").encode()))
        self._stream.end(trailers if self._begun else BEGIN + trailers)

    def fail(self, error: GrpcError) -> None:
        answering = self._answering
        self.end(error.status, str(error))
        if answering is not None:
            answering.on_gone()

    # Events of the stream.

    def on_data(self, data: bytes) -> None:
        if self.over:
            return
        try:
            for message in self._reader.feed(data):
                if self._answering is not None:
                    self._answering.on_message(message)
            part = self._reader.held_bytes
            if part and self._answering is not None:
                self._answering.on_part(part)
        except TooLongError as error:
            if self._answering is not None:
                self._answering.on_too_long()
            self.fail(error)
        except GrpcError as error:
            self.fail(error)
        except Exception:
            self._broken()

    def on_end(self) -> None:
        if self.over or self._answering is None:
            return
        try:
            if not self._reader.empty:
                raise GrpcError(Status.INVALID_ARGUMENT, "the call ended within a message")
            self._answering.on_end()
        except GrpcError as error:
            self.fail(error)
        except Exception:
            self._broken()

    def _broken(self) -> None:
        """An error inside the picker ends this call, and no other on its connection."""
        log.exception("a call failed inside the picker")
        self.fail(GrpcError(Status.INTERNAL, "internal error in the endpoint picker"))

    def on_gone(self) -> None:
        self.over = True
        answering, self._answering = self._answering, None
        if answering is not None:
            answering.on_gone()


Method = Callable[[Call], Answering]


def open_call(stream: Stream, headers: Headers, methods: Mapping[bytes, Method], most_bytes: int) -> Receiver:
    """Begin the call that these headers ask for. most_bytes: of one message."""
    call = Call(stream, most_bytes)
    fields = dict(headers)
    method = methods.get(fields.get(b":path", b""))
    if fields.get(b":method") != b"POST" or not fields.get(b"content-type", b"").startswith(TYPE):
        call.over = True
        stream.end([(b":status", b"415"), (b"content-length", b"0")])
    elif method is None:
        call.end(Status.UNIMPLEMENTED, "the methods are " + ", ".join(map(bytes.decode, methods)))
    else:
        call.answer_with(method(call))
    return call
