"""The memory of all bodies together: what is counted, what is refused, and that nothing stays counted."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from eldr.router.config.endpoint import Endpoint
from eldr.router.config.groups import ClientLimits
from eldr.router.http.body_memory import SMALL_ANSWER_BYTES, SMALL_REQUEST_BYTES, BodyMemory, Hold
from eldr.router.http.client import Answer
from eldr.router.http.pool import WorkerPool
from eldr.router.http.server import ClientConnection, State
from eldr.router.http.turns import Turns
from tests.router.fake_worker import FakeWorker, Seen, begin_stream, chunk, reply
from tests.router.harness import ASK, Setup, on_uvloop, running, until
from tests.router.memory import RUNNER, Holding, UnreadTransport
from tests.router.wire import POST, exchange, post, status_of

MIB = 2**20


class Peer:
    """One client, and what it should cost the router by a plain count."""

    def __init__(self, memory: BodyMemory, limits: ClientLimits) -> None:
        self.handler, self.transport = Holding(), UnreadTransport()
        self.connection = self.transport.protocol = ClientConnection(self.handler, limits, memory, Turns())
        self.connection.connection_made(self.transport)
        self.left = 0  # of the body being sent
        self.arrived = 0
        self.complete: list[int] = []  # requests that are not answered
        self.unread = 0

    @property
    def open(self) -> bool:
        return self.connection.state not in (State.CLOSED, State.LINGERING)

    @property
    def costs(self) -> int:
        return self.arrived + sum(self.complete) + self.unread

    def lost(self) -> None:
        self.connection.connection_lost(None)
        self.handler.held.clear()
        self.arrived = self.left = self.unread = 0
        self.complete.clear()


class Account(RuleBasedStateMachine):
    """Clients that send, wait, read or leave at any point, beside a ledger kept by hand."""

    LIMIT = 400_000
    PEERS = st.integers(0, 3)

    def __init__(self) -> None:
        super().__init__()
        self.limits = ClientLimits(max_body_bytes=250_000, max_bodies_bytes=self.LIMIT)
        self.memory = BodyMemory(self.limits)
        self.peers = [Peer(self.memory, self.limits) for _ in range(4)]

    def fits(self, size: int, more: int) -> bool:
        limit = self.LIMIT if size + more <= SMALL_REQUEST_BYTES else self.LIMIT * 3 // 4
        return sum(peer.costs for peer in self.peers) + more <= limit

    @rule(number=PEERS, size=st.sampled_from([1, 1000, 60_000, 70_000, 240_000]))
    def begins(self, number: int, size: int) -> None:
        peer = self.peers[number]
        if not peer.open or peer.left or len(peer.complete) > 1:
            return
        fits = self.fits(0, size)
        self.do(peer, POST + b"content-length: %d\r\n\r\n" % size)
        assert peer.transport.written.endswith(b'"code":503}}') == (not fits) or peer.complete
        peer.left = size if fits else 0

    @rule(number=PEERS, share=st.sampled_from([0.01, 0.3, 1.0]))
    def sends(self, number: int, share: float) -> None:
        peer = self.peers[number]
        if not peer.open or not peer.left:
            return
        size = max(1, int(peer.left * share))
        fits = self.fits(peer.arrived, size)
        self.do(peer, b"x" * size)
        if not fits:
            peer.left = peer.arrived = 0
            return
        peer.left -= size
        peer.arrived += size
        if not peer.left:
            peer.complete.append(peer.arrived)
            peer.arrived = 0

    @rule(number=PEERS, size=st.sampled_from([10, 100_000]))
    def is_answered(self, number: int, size: int) -> None:
        peer = self.peers[number]
        if not peer.handler.held or not peer.open:
            return

        async def answer() -> None:
            unsent = peer.transport.unsent
            peer.handler.held.pop(0).respond(200, b"x" * size)
            if not unsent and peer.transport.unsent > 64 * 1024:
                peer.unread = peer.transport.unsent
            await asyncio.sleep(0)

        peer.complete.pop(0)
        RUNNER.run(answer())

    @rule(number=PEERS)
    def reads(self, number: int) -> None:
        peer = self.peers[number]

        async def take() -> None:
            peer.unread = 0
            peer.transport.take()
            await asyncio.sleep(0)

        RUNNER.run(take())

    @rule(number=PEERS)
    def leaves(self, number: int) -> None:
        self.peers[number].lost()
        self.peers[number] = Peer(self.memory, self.limits)

    def do(self, peer: Peer, data: bytes) -> None:
        async def feed() -> None:
            peer.connection.data_received(data)

        RUNNER.run(feed())

    @invariant()
    def the_ledger_agrees(self) -> None:
        assert self.memory.held_bytes == sum(peer.costs for peer in self.peers)

    def teardown(self) -> None:
        for peer in self.peers:
            peer.lost()
        assert self.memory.held_bytes == 0


Account.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestAccount = Account.TestCase


# A router.


async def held_bytes(s: Setup) -> float:
    return await s.metric("eldr_bodies_bytes")


def upload(size: int, extra: bytes = b"") -> bytes:
    return POST + extra + b"content-length: %d\r\n\r\n" % size


@on_uvloop
async def test_what_does_not_fit_is_refused_before_it_is_read() -> None:
    async with running(max_bodies_bytes=4 * MIB, max_body_bytes=2 * MIB) as s:
        _, first = await asyncio.open_connection("127.0.0.1", s.router.port)
        first.write(upload(2 * MIB) + b" " * (2 * MIB - 1))
        _, second = await asyncio.open_connection("127.0.0.1", s.router.port)
        second.write(upload(MIB) + b" " * (MIB // 2))
        async with asyncio.timeout(10):
            while await held_bytes(s) != 2 * MIB - 1 + MIB // 2:
                await asyncio.sleep(0.01)
        for extra in (b"", b"expect: 100-continue\r\n"):
            raw = await exchange(s, upload(MIB, extra))
            assert status_of(raw) == 503
            assert b"retry-after: " in raw
            assert b"connection: close" in raw
        chunks = b"%x\r\n%b\r\n" % (SMALL_REQUEST_BYTES, b" " * SMALL_REQUEST_BYTES) * 16
        assert status_of(await exchange(s, POST + b"transfer-encoding: chunked\r\n\r\n" + chunks)) == 503
        assert (await s.post()).status == 200  # a small one
        assert await s.metric("eldr_bodies_refused_total", body="request") == 3
        first.transport.abort()
        second.transport.abort()
        await until(lambda: len(s.router.connections) == 1, "they are gone")
        assert await held_bytes(s) == 0


def test_a_body_that_never_fits_is_too_large() -> None:
    memory = BodyMemory(ClientLimits(max_body_bytes=100 * MIB, max_bodies_bytes=40 * MIB))
    assert memory.most_request_bytes == 30 * MIB


@pytest.mark.parametrize("stream", [False, True])
@on_uvloop
async def test_a_request_counts_until_its_stream_begins_or_its_answer_is_complete(stream: bool) -> None:
    async with running(max_inflight=1) as s:
        s.decode[0].token_gap_s = 0.2
        body = json.dumps({**ASK, "prompt": "x" * MIB, "stream": stream}).encode()
        one = asyncio.create_task(s.post(body))
        await until(lambda: s.decode[0].running == 1, "one runs")
        two = asyncio.create_task(s.post(body))
        await until(lambda: s.router.services.admission.queued == 1, "one waits")
        expected = len(body) * (1 if stream else 2)
        async with asyncio.timeout(10):
            while await held_bytes(s) != expected:
                await asyncio.sleep(0.01)
        assert (await one).status == (await two).status == 200
        assert await held_bytes(s) == 0


async def is_silent(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def half(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 10000000\r\n\r\n" + b" " * MIB)
    await asyncio.sleep(60)


async def begun(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await begin_stream(writer)
    await chunk(writer, worker.events(seen, ["a"], False)[0])
    await asyncio.sleep(60)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("behaviour", [is_silent, half, begun])
@pytest.mark.parametrize("stream", [False, True])
@on_uvloop
async def test_whenever_a_client_gives_up_nothing_stays_counted(role: str, behaviour: object, stream: bool) -> None:
    async with running() as s:
        (worker,) = s.prefill if role == "prefill" else s.decode
        worker.behaviour = behaviour  # type: ignore[assignment]
        _, writer = await asyncio.open_connection("127.0.0.1", s.router.port)
        writer.write(post(json.dumps({**ASK, "prompt": "x" * MIB, "stream": stream}).encode()))
        await until(lambda: worker.running == 1, "it runs")
        await asyncio.sleep(0.05)
        writer.transport.abort()
        await until(lambda: s.router.running == 0, "it has ended")
        async with asyncio.timeout(10):
            while await held_bytes(s):
                await asyncio.sleep(0.01)


@on_uvloop
async def test_an_answer_without_room_is_no_fault_of_its_worker() -> None:
    async def long(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        whole = {**worker.whole(seen, ["x" * (3 * MIB)], False), "kv_transfer_params": None}
        with contextlib.suppress(ConnectionError):
            await reply(writer, 200, json.dumps(whole).encode())

    async with running(max_bodies_bytes=2 * MIB) as s:
        s.decode[0].behaviour = long
        answer = await s.post()
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) > 0
        assert len(s.decode[0].generated) == 1
        assert await s.metric("eldr_bodies_refused_total", body="answer") == 1
        assert await s.metric("eldr_worker_failures_total") == 0
        s.decode[0].behaviour = None
        assert (await s.post()).status == 200
        assert await held_bytes(s) == 0


@on_uvloop
async def test_what_the_router_itself_asks_of_workers_always_finds_room() -> None:
    def long_lists(s: Setup) -> None:
        for worker in (*s.prefill, *s.decode):
            worker.adapters = [f"adapter-{number}" for number in range(4000)]
            worker.metrics = "# HELP padding\n" * 40_000

    limits = ClientLimits(max_bodies_bytes=4 * MIB)
    async with running(1, 1, prepare=long_lists, max_bodies_bytes=limits.max_bodies_bytes) as s:
        assert all(len(worker.model_list()) > SMALL_ANSWER_BYTES for worker in s.decode)
        memory = s.router.services.legs.pools[next(iter(s.router.services.fleet.workers("decode").values()))].memory
        hold = Hold(memory)
        hold.add(limits.max_bodies_bytes - SMALL_REQUEST_BYTES)
        assert (await s.get("/v1/models/adapter-3999")).status == 200
        assert (await s.get("/v1/models/other")).status == 404  # after another look
        s.decode[0].adapters.append("new")
        assert (await s.post({**ASK, "model": "new"})).status == 200
        joins = await FakeWorker("decode").start()
        joins.adapters, joins.metrics = s.decode[0].adapters, s.decode[0].metrics
        s.router.membership.join(Endpoint(joins.url, "decode"), "admin")
        await until(lambda: s.router.services.fleet.workers("decode")[joins.url].healthy, "it is up")
        await joins.stop()
        assert memory.refused_answers == 0
        del hold


@on_uvloop
async def test_an_answer_counts_until_its_client_has_taken_it() -> None:
    size = 8 * MIB

    async def long(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reply(writer, 200, json.dumps({**worker.whole(seen, ["x" * size], False)}).encode())

    async with running() as s:
        s.decode[0].behaviour = long
        reader, writer = await asyncio.open_connection("127.0.0.1", s.router.port, limit=2**16)
        writer.write(post(extra=b"connection: close\r\n"))
        await until(lambda: any(each.stalled for each in s.router.connections), "it waits to be read")
        assert size / 2 < await held_bytes(s) < size * 1.1
        assert len(await reader.read()) > size
        writer.close()
        assert await held_bytes(s) == 0


@on_uvloop
async def test_what_a_worker_does_not_take_counts_too() -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    server = await asyncio.start_server(deaf, "127.0.0.1", 0, limit=1024)
    memory = BodyMemory(ClientLimits())
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    pool = WorkerPool(url, connect_timeout_s=60, memory=memory)
    for _ in range(2):
        connection, answer = await pool.connection(), Answer()
        connection.start(answer, b"x" * 16 * MIB, 60)
        await until(lambda: memory.held_bytes, "it is counted")
        assert 4 * MIB < memory.held_bytes <= 16 * MIB
        connection.abort(answer)
        await until(lambda: memory.held_bytes == 0, "it is gone")
    server.close()


def test_small_answers_always_find_room() -> None:
    memory = BodyMemory(ClientLimits(max_bodies_bytes=1))
    assert memory.admits_answer(0, SMALL_ANSWER_BYTES)
    assert not memory.admits_answer(1, SMALL_ANSWER_BYTES)
