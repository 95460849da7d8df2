"""HTTP/2 as gRPC needs it, against h2's client: windows, limits, pings, ends, and bytes that are no HTTP/2."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import ssl
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
import pytest
from hyperframe.frame import GoAwayFrame, PingFrame
from hypothesis import given
from hypothesis import strategies as st

from eldr.router.picker.grpc import GrpcError, MessageReader, Status
from eldr.router.picker.http2 import Http2Connection
from eldr.router.picker.messages_pb2 import (
    HttpBody,
    HttpHeaders,
    ProcessingMode,
    ProcessingRequest,
    ProcessingResponse,
    ProtocolConfiguration,
)
from tests.router.certificates import certificate
from tests.router.harness import until
from tests.router.memory import LIMITS, MemoryTransport
from tests.router.picker.client import ASK, PROCESS, Gateway, header_map, picking
from tests.router.picker.memory import CALL_OF_A_GATEWAY, Choosing
from tests.router.picker.test_choice import all_over

CALL = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", PROCESS),
    (":authority", "picker"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]
BODY = json.dumps(ASK).encode()
# By it a peer is asked to open no more streams. All are seen that it has opened (RFC 9113, section 6.8).
LEAVE = GoAwayFrame(0, last_stream_id=2**31 - 1).serialize()


def framed(message: ProcessingRequest) -> bytes:
    data = message.SerializeToString()
    return b"\0" + len(data).to_bytes(4, "big") + data


def request_headers(response_mode: ProcessingMode.BodySendMode = ProcessingMode.NONE) -> bytes:
    fields = {":method": "POST", ":path": "/v1/completions", "content-type": "application/json"}
    modes = ProtocolConfiguration(
        request_body_mode=ProcessingMode.FULL_DUPLEX_STREAMED, response_body_mode=response_mode
    )
    return framed(ProcessingRequest(request_headers=HttpHeaders(headers=header_map(fields)), protocol_config=modes))


def request_body(body: bytes) -> bytes:
    return framed(ProcessingRequest(request_body=HttpBody(body=body, end_of_stream=True)))


class Peer:
    """A client over h2. events: all that came. data: by stream. is_to_leave: whether it should open no more streams.

    window: of each stream, which the test then manages.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, window: int | None) -> None:
        self._reader, self._writer, self._window = reader, writer, window
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
        if window is not None:
            self.h2.local_settings[h2.settings.SettingCodes.INITIAL_WINDOW_SIZE] = window
            self.h2.local_settings.acknowledge()
        self.events: list[Any] = []
        self.data: dict[int, bytes] = {}
        self.is_to_leave = False
        self.h2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self._writer.write(self.h2.data_to_send())

    def call(self, *messages: bytes) -> int:
        """Open a call with these messages. Returns its stream."""
        number = self.h2.get_next_available_stream_id()
        self.h2.send_headers(number, CALL)
        for message in messages:
            self.send(number, message)
        self.flush()
        return number

    def send(self, number: int, data: bytes) -> None:
        for start in range(0, len(data), 16384):
            self.h2.send_data(number, data[start : start + 16384])
        self.flush()

    async def hear(self) -> bool:
        """Take what came. False at the end of the connection."""
        async with asyncio.timeout(20):
            raw = await self._reader.read(65536)
        if not raw:
            return False
        if LEAVE in raw:  # h2 would take nothing after it, although the streams go on
            self.is_to_leave = True
            raw = raw.replace(LEAVE, b"")
        for event in self.h2.receive_data(raw):
            self.events.append(event)
            if isinstance(event, h2.events.DataReceived):
                self.data[event.stream_id] = self.data.get(event.stream_id, b"") + event.data
                if self._window is None:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        self.flush()
        return True

    async def until(self, kind: type[Any]) -> Any:
        """The first event of this kind."""
        while True:
            for event in self.events:
                if isinstance(event, kind):
                    return event
            assert await self.hear(), f"no {kind.__name__} before the end of the connection"

    async def gone(self) -> None:
        with contextlib.suppress(ConnectionError):
            while await self.hear():
                pass

    def responses(self, number: int) -> list[ProcessingResponse]:
        """The whole messages that came on a stream."""
        messages = MessageReader(2**30).feed(self.data.get(number, b""))
        return [ProcessingResponse.FromString(message) for message in messages]

    def close(self) -> None:
        self._writer.close()


@asynccontextmanager
async def peer(g: Gateway, window: int | None = None) -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", g.setup.router.grpc_port)
    one = Peer(reader, writer, window)
    try:
        yield one
    finally:
        one.close()


async def test_nothing_is_sent_beyond_the_windows() -> None:
    async with picking(aggregated=1) as g, peer(g, window=40) as one:
        number = one.call(request_headers(), request_body(BODY))
        while len(one.data.get(number, b"")) < 40:
            await one.hear()
        await asyncio.sleep(0.05)
        assert len(one.data[number]) == 40
        while len(one.responses(number)) < 2:
            one.h2.increment_flow_control_window(7, number)
            one.flush()
            await one.hear()
        assert one.responses(number)[1].request_body.response.body_mutation.streamed_response.body == BODY


async def test_a_peer_that_takes_nothing_may_send_no_more() -> None:
    async with picking(aggregated=1) as g, peer(g, window=1000) as one:
        number = one.call(request_headers(ProcessingMode.FULL_DUPLEX_STREAMED), request_body(BODY))
        while len(one.responses(number)) < 2:
            await one.hear()
        answer = HttpHeaders(headers=header_map({":status": "200"}))
        one.send(number, framed(ProcessingRequest(response_headers=answer)))
        piece = framed(ProcessingRequest(response_body=HttpBody(body=b"x" * 15_000)))
        sent = 0
        with contextlib.suppress(TimeoutError):
            while True:
                while one.h2.local_flow_control_window(number) >= len(piece):
                    one.send(number, piece)
                    sent += len(piece)
                    assert sent < 4 * 2**20
                async with asyncio.timeout(0.5):
                    await one.hear()
        one.h2.increment_flow_control_window(2**22, number)
        one.h2.increment_flow_control_window(2**22)
        one.flush()
        while one.h2.local_flow_control_window(number) < len(piece):
            await one.hear()


async def test_a_stream_that_is_reset_gives_the_connections_window_back() -> None:
    async with picking(aggregated=1, max_inflight=100) as g, peer(g, window=1000) as one:
        await one.until(h2.events.WindowUpdated)
        whole = one.h2.outbound_flow_control_window
        piece = framed(ProcessingRequest(response_body=HttpBody(body=b"x" * 60_000)))
        for _ in range(12):
            number = one.call(request_headers(ProcessingMode.FULL_DUPLEX_STREAMED), request_body(BODY))
            while len(one.responses(number)) < 2:
                await one.hear()
            answer = HttpHeaders(headers=header_map({":status": "200"}))
            one.send(number, framed(ProcessingRequest(response_headers=answer)))
            with contextlib.suppress(TimeoutError):  # until the picker takes no more of it
                while True:
                    while one.h2.local_flow_control_window(number) >= len(piece):
                        one.send(number, piece)
                    async with asyncio.timeout(0.2):
                        await one.hear()
            one.h2.reset_stream(number)
            one.flush()
        one.h2.ping(b"12345678")
        one.flush()
        await one.until(h2.events.PingAckReceived)
        # What was read is given back by halves of the window.
        assert one.h2.outbound_flow_control_window > whole // 2 - 2**21


async def test_a_body_counts_in_memory_before_all_of_its_message_is_there() -> None:
    """A filter that buffers bodies sends each as one message, and slowly if its window is small."""
    async with picking(aggregated=1, max_bodies_bytes=1_000_000) as g, peer(g) as one:
        await one.until(h2.events.WindowUpdated)
        body = request_body(b"x" * 700_000)
        first = one.call(request_headers(), body[:-1])
        second = one.call(request_headers(), body[:200_000])
        while not one.responses(second):
            await one.hear()
        assert one.responses(second)[0].immediate_response.status.code == 503
        assert not one.responses(first)
        one.h2.reset_stream(first)
        third = one.call(request_headers(), body)
        while not one.responses(third):
            await one.hear()
        assert one.responses(third)[0].HasField("request_headers")


async def test_a_body_that_nobody_takes_back_counts_in_memory() -> None:
    async with picking(aggregated=1, max_bodies_bytes=1_000_000) as g, peer(g, window=1000) as one:
        await one.until(h2.events.WindowUpdated)
        body = request_body(b"x" * 700_000)
        first = one.call(request_headers(), body)
        while len(one.data.get(first, b"")) < 1000:
            await one.hear()
        second = one.call(request_headers(), body)
        while not one.responses(second):
            await one.hear()
        assert one.responses(second)[0].immediate_response.status.code == 503
        one.h2.reset_stream(first)
        third = one.call(request_headers(), body)
        while not one.responses(third):
            await one.hear()
        assert one.responses(third)[0].HasField("request_headers")
        one.h2.reset_stream(third)
        one.flush()
        await all_over(g)


async def test_many_calls_on_one_connection() -> None:
    async with picking(aggregated=1, max_inflight=1000) as g, peer(g) as one:
        numbers = [one.call(request_headers(), request_body(BODY)) for _ in range(400)]
        while not all(len(one.responses(number)) == 2 for number in numbers):
            await one.hear()
        assert g.setup.router.services.admission.admitted == 400
        for number in numbers[::2]:
            one.h2.reset_stream(number)
        one.flush()
        await until(lambda: g.setup.router.services.admission.admitted == 200, "half of them end")
        more = [one.call(request_headers(), request_body(BODY)) for _ in range(400)]
        while not all(len(one.responses(number)) == 2 for number in more):
            await one.hear()


async def test_more_streams_than_are_allowed_end_the_connection() -> None:
    async with picking(aggregated=1, max_streams=5) as g, peer(g) as one:
        await one.until(h2.events.RemoteSettingsChanged)
        assert one.h2.remote_settings.max_concurrent_streams == 5
        one.h2.remote_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 100
        one.h2.remote_settings.acknowledge()
        for _ in range(6):
            one.call(request_headers())
        assert (await one.until(h2.events.ConnectionTerminated)).error_code != h2.errors.ErrorCodes.NO_ERROR
        await all_over(g)


async def test_headers_beyond_the_limit_end_the_connection() -> None:
    async with picking(aggregated=1) as g, peer(g) as one:
        one.h2.send_headers(1, [*CALL, ("x-long", "x" * 100_000)])
        one.flush()
        assert (await one.until(h2.events.ConnectionTerminated)).error_code == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM


async def test_streams_that_have_ended_do_not_count() -> None:
    async with picking(aggregated=1, max_streams=8) as g, peer(g) as one:
        await one.until(h2.events.RemoteSettingsChanged)
        for _ in range(6):
            one.call(request_headers())
        for _ in range(30):
            number = one.call(request_headers(), request_body(BODY))
            while len(one.responses(number)) < 2:
                await one.hear()
            one.h2.end_stream(number)
            one.flush()
            while not any(isinstance(each, h2.events.StreamEnded) and each.stream_id == number for each in one.events):
                await one.hear()


async def test_streams_opened_only_to_be_reset_end_the_connection() -> None:
    async with picking(aggregated=1) as g, peer(g) as one:
        for _ in range(1500):
            one.h2.reset_stream(one.call())
        with contextlib.suppress(ConnectionError):
            one.flush()
            ended = await one.until(h2.events.ConnectionTerminated)
            assert ended.error_code == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM
        await one.gone()
        await all_over(g)


async def test_clients_that_all_leave_the_queue_do_not() -> None:
    async with picking(aggregated=1) as g, peer(g) as one:
        numbers = [one.call() for _ in range(1500)]
        while not (one.h2.outbound_flow_control_window > 2**16):
            await one.hear()
        await asyncio.sleep(1.1)
        for number in numbers:
            one.h2.reset_stream(number)
        one.flush()
        await asyncio.sleep(0.1)
        number = one.call(request_headers(), request_body(BODY))
        while len(one.responses(number)) < 2:
            assert await one.hear(), "the connection was closed"


async def test_streams_that_are_reset_after_their_answer_do_not() -> None:
    async with picking(aggregated=1, max_inflight=1000) as g, peer(g) as one:
        for _ in range(12):
            numbers = [one.call(request_headers(), request_body(BODY)) for _ in range(100)]
            while not all(len(one.responses(number)) == 2 for number in numbers):
                await one.hear()
            for number in numbers:
                one.h2.reset_stream(number)
            one.flush()
        await all_over(g)


async def test_a_peer_that_reads_no_answers_to_its_pings_is_cut_off() -> None:
    service = Choosing()
    connection, transport = Http2Connection(service, LIMITS, 10, service.memory), MemoryTransport()
    connection.connection_made(transport)
    connection.data_received(CALL_OF_A_GATEWAY)
    connection.pause_writing()
    pings = PingFrame(0, b"12345678").serialize() * 1000
    before = len(transport.written)
    for _ in range(100):
        connection.data_received(pings)
    assert len(transport.written) - before < 2**19
    assert transport.is_closing()
    connection.connection_lost(None)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 100, b"\x16\x03\x01\x02\x00\x01"])
async def test_what_is_no_http2_ends_the_connection(data: bytes) -> None:
    async with picking(aggregated=1) as g:
        reader, writer = await asyncio.open_connection("127.0.0.1", g.setup.router.grpc_port)
        writer.write(data)
        async with asyncio.timeout(20):
            await reader.read()
        writer.close()


async def test_a_connection_that_says_nothing_is_closed() -> None:
    async with picking(aggregated=1, head_timeout_s=0.1) as g:
        reader, writer = await asyncio.open_connection("127.0.0.1", g.setup.router.grpc_port)
        async with asyncio.timeout(20):
            await reader.read()
        writer.close()


async def test_a_call_of_another_type_is_415() -> None:
    async with picking(aggregated=1) as g, peer(g) as one:
        headers = [(name, value) for name, value in CALL if name != "content-type"]
        one.h2.send_headers(1, headers, end_stream=True)
        one.flush()
        answer = await one.until(h2.events.ResponseReceived)
        assert (b":status", b"415") in answer.headers


async def test_a_silent_peer_is_asked_and_given_up() -> None:
    async with picking(aggregated=1) as g, peer(g) as one:
        one.call(request_headers(), request_body(BODY))
        await one.until(h2.events.DataReceived)
        assert g.setup.router.picker is not None
        connections = g.setup.router.picker.connections
        (connection,) = connections
        connection.check(time.monotonic() + 31)
        await one.until(h2.events.PingReceived)
        await asyncio.sleep(0.05)  # it has answered, so it stays
        connection.check(time.monotonic() + 20)
        assert connection in connections
        connection.check(time.monotonic() + 31)
        connection.check(time.monotonic() + 45)
        await until(lambda: not connections, "the connection is given up")
        await all_over(g)


async def test_pings_are_answered() -> None:
    async with picking(aggregated=1) as g, peer(g) as one:
        one.h2.ping(b"12345678")
        one.flush()
        assert (await one.until(h2.events.PingAckReceived)).ping_data == b"12345678"


async def test_an_end_without_haste() -> None:
    """Calls that wait get their workers; those that run are left to the gateway; then the connection closes."""
    async with picking(aggregated=1, max_inflight=1) as g, peer(g) as one:
        first = one.call(request_headers(), request_body(BODY))
        while len(one.responses(first)) < 2:
            await one.hear()
        second = one.call(request_headers(), request_body(BODY))
        await until(lambda: g.setup.router.services.admission.queued, "the second waits")
        stopping = asyncio.create_task(g.setup.router.stop(5))
        await asyncio.sleep(0.1)
        one.h2.reset_stream(first)
        one.flush()
        while len(one.responses(second)) < 2:
            await one.hear()
        await one.gone()
        await stopping
        endings = [event for event in one.events if isinstance(event, h2.events.TrailersReceived)]
        assert [(event.stream_id, dict(event.headers)[b"grpc-status"]) for event in endings] == [(second, b"0")]


async def test_what_crosses_the_end_is_still_served() -> None:
    async with picking(aggregated=1) as g, peer(g) as one:
        first = one.call(request_headers(), request_body(BODY))
        while len(one.responses(first)) < 2:
            await one.hear()
        stopping = asyncio.create_task(g.setup.router.stop(5))
        while not one.is_to_leave:
            assert await one.hear(), "closed without a word"
        second = one.call(request_headers(), request_body(BODY))
        while len(one.responses(second)) < 2:
            assert await one.hear(), "closed too early"
        await one.gone()
        await stopping
        ended = await one.until(h2.events.ConnectionTerminated)
        assert (ended.error_code, ended.last_stream_id) == (h2.errors.ErrorCodes.NO_ERROR, second)


async def test_a_request_that_still_waits_at_the_end_is_refused() -> None:
    async with picking(aggregated=1, max_inflight=1) as g, peer(g) as one:
        for _ in range(2):
            number = one.call(request_headers(), request_body(BODY))
        services = g.setup.router.services
        await until(lambda: services.admission.queued, "the second waits")
        await g.setup.router.stop(0.1)
        await one.gone()
        assert one.responses(number)[0].immediate_response.status.code == 503
        assert services.metrics.requests["/v1/completions", 503] == 1
        assert services.metrics.disconnects == 0


async def test_tls(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "picker")
    async with picking(aggregated=1, tls_cert=str(cert), tls_key=str(key)) as g:
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        address = f"127.0.0.1:{g.setup.router.grpc_port}"
        async with grpc.aio.secure_channel(address, credentials) as channel:
            _, picked = await Gateway(g.setup, channel).ask()
            assert picked.endpoints[0]
        trust = ssl.create_default_context(cafile=cert)
        trust.set_alpn_protocols(["h2"])
        _, writer = await asyncio.open_connection("127.0.0.1", g.setup.router.grpc_port, ssl=trust)
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
        writer.close()


# The frames of messages.


@given(st.lists(st.binary(max_size=40), max_size=6), st.lists(st.integers(0, 200), max_size=8))
def test_messages_are_the_same_however_their_bytes_are_cut(messages: list[bytes], cuts: list[int]) -> None:
    data = b"".join(b"\0" + len(message).to_bytes(4, "big") + message for message in messages)
    reader, found = MessageReader(40), []
    ends = sorted({min(cut, len(data)) for cut in (*cuts, 0, len(data))})
    for start, end in itertools.pairwise(ends):
        found += reader.feed(data[start:end])
    assert found == messages
    assert reader.empty


def test_a_message_in_many_pieces_takes_time_in_proportion() -> None:
    """Each piece is looked at once: joining them all again and again would copy terabytes here."""
    size, piece = 2**23, bytes(16)
    reader = MessageReader(size)
    assert reader.feed(b"\0" + size.to_bytes(4, "big")) == []
    pieces = [reader.feed(piece) for _ in range(size // len(piece))]
    assert [len(found) for found in pieces if found] == [1]


def test_empty_pieces_of_a_message_take_no_memory() -> None:
    reader = MessageReader(10)
    reader.feed(b"\0")
    tracemalloc.start()
    for _ in range(100_000):
        assert reader.feed(b"") == []
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 50_000


@pytest.mark.parametrize(
    ("data", "status"),
    [(b"\1\0\0\0\1x", Status.UNIMPLEMENTED), (b"\0\0\0\0\x0b", Status.RESOURCE_EXHAUSTED)],
)
def test_messages_that_are_refused(data: bytes, status: Status) -> None:
    with pytest.raises(GrpcError) as caught:
        MessageReader(10).feed(data)
    assert caught.value.status is status
