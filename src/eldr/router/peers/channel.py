"""Messages between the processes of one router: over a pair of sockets from each of them to the parent."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Final, cast

# Kind, number, and length of what follows.
_HEAD: Final = struct.Struct("<BQI")
# Kinds of messages.
HELLO: Final = 1  # number: the origin of this process
FRAME: Final = 2  # number: the origin that it is for, 0 for all
ASK: Final = 3  # number: of the question
EXPECT: Final = 4  # number: of the question; data: how many answers there will be
ANSWER: Final = 5  # number: of the question
TELL: Final = 6
KEEP: Final = 7
READY: Final = 8
FORGET: Final = 9

# What waits for a process that does not read takes no more memory than this. The rest is lost.
MOST_WAITING_BYTES: Final = 64 * 2**20


class Channel(asyncio.Protocol):
    """One end of a pair of sockets.

    hear: called with each message: kind, number, data. gone: called when the other end has closed.
    """

    def __init__(self, hear: Callable[[int, int, bytes], None], gone: Callable[[], None]) -> None:
        self._hear = hear
        self._gone = gone
        self._transport: asyncio.Transport | None = None
        self._read = bytearray()

    @property
    def open(self) -> bool:
        return self._transport is not None

    @property
    def backlog_bytes(self) -> int:
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def send(self, kind: int, number: int, data: bytes = b"") -> bool:
        """Send a message, without waiting. Returns False if it is lost."""
        transport = self._transport
        if transport is None or self.backlog_bytes > MOST_WAITING_BYTES:
            return False
        transport.write(_HEAD.pack(kind, number, len(data)) + data)
        return True

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # For the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        read = self._read
        read += data
        at = 0
        while len(read) - at >= _HEAD.size:
            kind, number, length = _HEAD.unpack_from(read, at)
            end = at + _HEAD.size + length
            if len(read) < end:
                break
            message = bytes(read[at + _HEAD.size : end])
            at = end
            self._hear(kind, number, message)
        del read[:at]

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._gone()


async def open_channel(
    sock: socket.socket, hear: Callable[[int, int, bytes], None], gone: Callable[[], None]
) -> Channel:
    """Return this process's end of a pair of sockets."""
    sock.setblocking(False)
    _, channel = await asyncio.get_running_loop().create_connection(lambda: Channel(hear, gone), sock=sock)
    return channel
