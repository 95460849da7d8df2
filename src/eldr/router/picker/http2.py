"""Connections of HTTP/2 (RFC 9113), as far as gRPC needs them: streams, flow control, keepalive and graceful ends.

h2 reads and writes the frames, and refuses what is none. What it leaves to its user is here: when to send, what waits
for a window, and when to give back the windows of what came.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any, Final, Protocol, cast

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame

from eldr.router.config.groups import ClientLimits
from eldr.router.http.body_memory import BodyMemory, Hold
from eldr.router.http.keepalive import keep_alive
from eldr.router.http.server import PROBE_IDLE_S, PROBE_INTERVAL_S

Headers = list[tuple[bytes, bytes]]

# What a peer may send before it hears that it was read: on one stream, and on all of a connection.
STREAM_WINDOW: Final = 1024 * 1024
CONNECTION_WINDOW: Final = 16 * 1024 * 1024
# What h2 begins with.
FIRST_WINDOW: Final = 65535
MOST_HEADER_BYTES: Final = 64 * 1024
# What is written is kept in pieces of no more than this.
PIECE_BYTES: Final = 64 * 1024
# With more than this unsent on a stream, what its peer sends is no longer acknowledged, so that it stops.
UNSENT_HIGH_BYTES: Final = 1024 * 1024
# A connection that is silent for so long gets a PING, and is given up if nothing comes for so long after that.
PING_AFTER_S: Final = 30.0
PONG_WITHIN_S: Final = 10.0
# While a peer reads nothing, it may still make this side write: the answers to its pings and settings. No more of them
# are kept than this.
UNREAD_MOST_BYTES: Final = 256 * 1024
# A stream that is reset at once, before anything was sent on it, was work for nothing, and the limit on streams does
# not hold it back (CVE-2023-44487). So many may come at once, and so many a second after that. Streams of clients that
# leave the queue are older: Envoy resets these, too.
EARLY_RESET_S: Final = 1.0
EARLY_RESETS: Final = 1000
EARLY_RESETS_A_SECOND: Final = 100
# The streams of a connection that ends gracefully are those up to this number: any that are on their way.
ANY_STREAM: Final = 2**31 - 1


class Receiver(Protocol):
    """Hears what happens on one stream. Nothing follows `on_gone`."""

    def on_data(self, data: bytes) -> None: ...

    def on_end(self) -> None:
        """The peer sends nothing more. It may still receive."""

    def on_gone(self) -> None:
        """The stream was reset, or its connection was lost. Nothing can be sent any more."""


class Service(Protocol):
    """Answers requests: one receiver for each."""

    connections: set[Any]
    closing: bool

    def open(self, stream: Stream, headers: Headers) -> Receiver: ...


class Frames(H2Connection):
    """h2's state of one connection.

    For each new stream, h2 looks at all that there are, to count the open ones and drop the others. Here that is done
    less often the more there are, so the time for each stays the same.
    """

    def __init__(self, config: H2Configuration) -> None:
        super().__init__(config)
        self._open = 0
        self._looks_left = 0

    @property
    def open_inbound_streams(self) -> int:
        if self._looks_left and self._open + 2 < self.local_settings.max_concurrent_streams:
            self._looks_left -= 1
            self._open += 1  # at most
        else:
            self._open = super().open_inbound_streams
            self._looks_left = self._open // 2
        return self._open


class Stream:
    """One stream, to which this side answers. Nothing is sent before the event loop's turn or input is over."""

    __slots__ = (
        "_connection", "_end", "_headers", "_unsent", "begun", "number", "opened_s", "peer_ended", "receiver",
        "unacknowledged", "unsent_bytes",
    )  # fmt: skip

    def __init__(self, connection: Http2Connection, number: int, opened_s: float) -> None:
        self._connection = connection
        self._headers: Headers | None = None
        self._unsent: deque[bytes] = deque()
        self._end: Headers | None = None
        self.begun = False
        self.number = number
        self.opened_s = opened_s
        self.receiver: Receiver | None = None
        self.peer_ended = False
        self.unacknowledged = 0
        self.unsent_bytes = 0

    def begin(self, headers: Headers) -> None:
        """Send the headers of the answer."""
        self._headers = headers
        self._connection.has_to_send(self)

    def write(self, data: bytes) -> None:
        if len(data) <= PIECE_BYTES:
            self._unsent.append(data)
        else:  # of a long one, no window is filled by a copy of all that is left
            self._unsent.extend(data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES))
        self.unsent_bytes += len(data)
        self._connection.unsent_bytes += len(data)
        self._connection.has_to_send(self)

    def end(self, trailers: Headers) -> None:
        """End the answer after everything that was written."""
        self._end = trailers
        self._connection.has_to_send(self)

    def pump(self, frames: H2Connection) -> None:
        """Give h2 what the windows have room for. Raises ProtocolError if the stream is no longer open."""
        if self._headers is not None:
            frames.send_headers(self.number, self._headers)
            self._headers = None
            self.begun = True
        if self._unsent:
            # A window may have become negative (RFC 9113, section 6.9.2).
            data = self._take(max(0, frames.local_flow_control_window(self.number)))
            for start in range(0, len(data), frames.max_outbound_frame_size):
                frames.send_data(self.number, data[start : start + frames.max_outbound_frame_size])
            if self.unsent_bytes:
                return
        if self._end is not None:
            frames.send_headers(self.number, self._end, end_stream=True)
            self._end = None
            if not self.peer_ended:  # it need not send the rest (RFC 9113, section 8.1)
                frames.reset_stream(self.number, ErrorCodes.NO_ERROR)
            self._connection.ended(self)

    def _take(self, most_bytes: int) -> bytes:
        """Take so much of what is unsent, or all of it."""
        pieces: list[bytes] = []
        while self._unsent and most_bytes > 0:
            piece = self._unsent.popleft()
            if len(piece) > most_bytes:
                self._unsent.appendleft(piece[most_bytes:])
                piece = piece[:most_bytes]
            pieces.append(piece)
            most_bytes -= len(piece)
            self.unsent_bytes -= len(piece)
            self._connection.unsent_bytes -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Http2Connection:
    """The server's side of one connection. It implements asyncio.Protocol.

    limits: those of clients. most_streams: on one connection. memory: counts what waits for a peer that does not read.
    unsent_bytes: what waits for windows.
    """

    _transport: asyncio.Transport

    def __init__(self, service: Service, limits: ClientLimits, most_streams: int, memory: BodyMemory) -> None:
        self._service = service
        self._limits = limits
        config = H2Configuration(
            client_side=False,
            header_encoding=None,
            # What is said of a request is looked at by whoever answers it, and our own headers are what they should be.
            validate_inbound_headers=False,
            normalize_inbound_headers=False,
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        self._frames = Frames(config)
        self._frames.local_settings[SettingCodes.INITIAL_WINDOW_SIZE] = STREAM_WINDOW
        self._frames.local_settings[SettingCodes.MAX_CONCURRENT_STREAMS] = most_streams
        self._frames.local_settings[SettingCodes.MAX_HEADER_LIST_SIZE] = MOST_HEADER_BYTES
        self._frames.local_settings.acknowledge()
        self._streams: dict[int, Stream] = {}
        self._to_send: dict[Stream, None] = {}
        self._blocked: dict[Stream, None] = {}  # those that wait for a window
        self._flushing = False  # it is done soon
        self._paused = False
        self._closed = False
        self._draining = False
        self._heard_s = time.monotonic()
        self._pinged_s: float | None = None
        self._begun = False
        self._stalled_since_s: float | None = None
        self._unread_bytes = 0
        self.unsent_bytes = 0
        self._unsent = Hold(memory)
        self._resets_left = float(EARLY_RESETS)
        self._reset_s = self._heard_s

    # Events of the connection.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            keep_alive(sock, PROBE_IDLE_S, PROBE_INTERVAL_S)
        self._service.connections.add(self)
        if len(self._service.connections) > self._limits.max_connections:
            self.abort()
            return
        self._frames.initiate_connection()
        self._frames.increment_flow_control_window(CONNECTION_WINDOW - FIRST_WINDOW)
        self._flush()

    def data_received(self, data: bytes) -> None:
        if self._closed:
            return
        self._begun = True
        self._heard_s = time.monotonic()
        self._pinged_s = None
        self._flushing = True  # at the end of this
        try:
            events = self._frames.receive_data(data)
        except ProtocolError:  # h2 has written the GOAWAY that says what was wrong, and sends nothing more
            self._transport.write(self._frames.data_to_send())
            self._shut()
            return
        for event in events:
            self._take(event)
            if self._transport.is_closing():
                return
        self._flush()

    def eof_received(self) -> None:
        """Returning None closes the transport: a peer that sends nothing more cannot be told anything new."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self._service.connections.discard(self)
        streams, self._streams = self._streams, {}
        self._to_send.clear()
        self._blocked.clear()
        self._unsent.release()
        for stream in streams.values():
            self._tell_gone(stream)

    def pause_writing(self) -> None:
        self._paused = True
        self._stalled_since_s = time.monotonic()

    def resume_writing(self) -> None:
        self._paused = False
        self._unread_bytes = 0
        self._stalled_since_s = None
        self._flush()

    # Events of streams.

    def _take(self, event: Event) -> None:
        # In the order of how often they come.
        if isinstance(event, DataReceived):
            self._on_data(event)
        elif isinstance(event, StreamEnded):
            stream = self._streams.get(event.stream_id)
            if stream is not None:
                stream.peer_ended = True
                if stream.receiver is not None:
                    stream.receiver.on_end()
        elif isinstance(event, RequestReceived):
            self._on_request(event)
        elif isinstance(event, WindowUpdated | RemoteSettingsChanged):
            self._to_send.update(self._blocked)
            self._blocked.clear()
        elif isinstance(event, StreamReset):
            stream = self._streams.pop(event.stream_id, None)
            if stream is not None:
                self._drop(stream)
                if not stream.begun and self._heard_s - stream.opened_s < EARLY_RESET_S:
                    self._count_early_reset()
        elif isinstance(event, ConnectionTerminated):  # h2 sends nothing after it
            self._shut()

    def _on_request(self, event: RequestReceived) -> None:
        number = event.stream_id
        stream = self._streams[number] = Stream(self, number, self._heard_s)
        stream.receiver = self._service.open(stream, event.headers)

    def _on_data(self, event: DataReceived) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is None or stream.receiver is None:
            self._frames.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            return
        stream.unacknowledged += event.flow_controlled_length
        stream.receiver.on_data(event.data)
        self._acknowledge(stream)

    def _acknowledge(self, stream: Stream) -> None:
        """Let the peer send more, unless it does not take what it gets."""
        if stream.unacknowledged and stream.unsent_bytes < UNSENT_HIGH_BYTES and not self._closed:
            self._frames.acknowledge_received_data(stream.unacknowledged, stream.number)
            stream.unacknowledged = 0

    def _drop(self, stream: Stream) -> None:
        """A stream was reset. The connection's window is shared by all streams, so this one gives back what it took."""
        self._to_send.pop(stream, None)
        self._blocked.pop(stream, None)
        if stream.unacknowledged:
            self._frames.acknowledge_received_data(stream.unacknowledged, stream.number)
            stream.unacknowledged = 0
        self.unsent_bytes -= stream.unsent_bytes
        stream.unsent_bytes = 0
        self._count_unsent()
        self._tell_gone(stream)

    def _count_early_reset(self) -> None:
        """End the connection of a peer that opens streams only to reset them."""
        left = self._resets_left + (self._heard_s - self._reset_s) * EARLY_RESETS_A_SECOND
        self._resets_left, self._reset_s = min(left, EARLY_RESETS) - 1, self._heard_s
        if self._resets_left < 0:
            self._frames.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
            self._transport.write(self._frames.data_to_send())
            self._shut()

    def _tell_gone(self, stream: Stream) -> None:
        receiver, stream.receiver = stream.receiver, None
        if receiver is not None:
            receiver.on_gone()

    # Sending.

    def has_to_send(self, stream: Stream) -> None:
        """Something was written on a stream. It is sent with all else that this turn of the event loop writes."""
        self._to_send[stream] = None
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def ended(self, stream: Stream) -> None:
        """Everything was sent on a stream."""
        if self._streams.pop(stream.number, None) is not None and stream.unacknowledged:
            self._frames.acknowledge_received_data(stream.unacknowledged, stream.number)
        stream.receiver = None

    def _flush(self) -> None:
        self._flushing = False
        if self._closed:
            return
        if not self._paused:
            to_send, self._to_send = self._to_send, {}
            for stream in to_send:
                if stream.number not in self._streams:  # it was reset
                    continue
                try:
                    stream.pump(self._frames)
                except ProtocolError:  # h2 has closed it
                    del self._streams[stream.number]
                    self._drop(stream)
                else:
                    if stream.unsent_bytes:
                        self._blocked[stream] = None
                    self._acknowledge(stream)
        data = self._frames.data_to_send()
        if data:
            if self._paused:
                self._unread_bytes += len(data)
                if self._unread_bytes > UNREAD_MOST_BYTES:
                    self.abort()
                    return
            self._transport.write(data)
        self._count_unsent()

    def _count_unsent(self) -> None:
        size = self.unsent_bytes + (self._transport.get_write_buffer_size() if self._paused else 0)
        if size != self._unsent.size:
            self._unsent.add(size - self._unsent.size)

    # Ends.

    def check(self, now_s: float) -> None:
        """End the connection if its peer has let a time limit pass, and see whether a silent one is still there."""
        limits, silent_s = self._limits, now_s - self._heard_s
        if self._stalled_since_s is not None and now_s - self._stalled_since_s > limits.stall_timeout_s:
            self.abort()
        elif not self._begun:
            if silent_s > limits.head_timeout_s:
                self.abort()
        elif self._pinged_s is not None:
            if now_s - self._pinged_s > PONG_WITHIN_S:
                self.abort()
        elif silent_s > PING_AFTER_S and not self._closed:
            self._pinged_s = now_s
            self._frames.ping(b"eldr epp")
            self._flush()

    def drain(self) -> None:
        """Ask the peer to open no more streams. Those that there are, or that cross this, are served."""
        if self._closed or self._draining:
            return
        self._draining = True
        # h2 knows no graceful end: it would refuse to send on the streams that there are.
        self._flush()
        self._transport.write(GoAwayFrame(0, last_stream_id=ANY_STREAM).serialize())

    def close_if_idle(self) -> None:
        """Close if there is no stream, and ask for no more of them otherwise. Called again and again at the end."""
        if self._streams:
            self.drain()
        else:
            self.close()

    def close(self) -> None:
        """Close after sending everything that was written. The peer hears which of its streams were not seen."""
        if self._closed:
            return
        self._flush()
        self._frames.close_connection()
        self._transport.write(self._frames.data_to_send())
        self._shut()

    def _shut(self) -> None:
        self._closed = True
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._closed = True
        self._transport.abort()
