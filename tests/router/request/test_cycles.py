"""What requests leave behind: nothing that only the garbage collector could free."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.router.certificates import certificate
from tests.router.fake_worker import FakeWorker, Seen, begin_stream, chunk, reply
from tests.router.harness import ASK, Setup, aggregated, bearer, on_uvloop, ours, running, until
from tests.router.wire import BODY, POST, exchange, post


@asynccontextmanager
async def no_cycles(s: Setup, tls: ssl.SSLContext | None = None) -> AsyncIterator[None]:
    """What happens inside leaves nothing to the collector, once the connections are closed."""
    url = f"{'https' if tls else 'http'}://127.0.0.1:{s.router.port}/v1/completions"
    async with s.session.post(url, json=ASK, ssl=tls or True) as answer:
        assert answer.status == 200
        await answer.read()
    gc.collect()
    gc.garbage.clear()  # of the start
    yield
    await until(lambda: s.router.running == 0, "all requests have ended")
    await asyncio.sleep(0.05)  # closed connections are lost in a later turn of the event loop
    gc.collect()
    assert ours(gc.garbage) == []


@pytest.mark.parametrize("keepalive_s", [0, 0.001])
@pytest.mark.parametrize("body", [ASK, {**ASK, "stream": True}, {**ASK, "n": 2}, {**ASK, "prompt": ""}])
@pytest.mark.usefixtures("collector")
@on_uvloop
async def test_a_request_leaves_no_cycle(body: dict[str, object], keepalive_s: float) -> None:
    """Its bodies and counts would stay in memory until the collector comes, which is rare on purpose."""
    async with running(stream_keepalive_s=keepalive_s) as s, no_cycles(s):
        for _ in range(5):
            await s.post(body)


@pytest.mark.parametrize("body", [ASK, {**ASK, "stream": True, "prompt": "x" * 5000}])
@pytest.mark.usefixtures("collector")
@on_uvloop
async def test_a_request_to_an_aggregated_worker_leaves_no_cycle(body: dict[str, object]) -> None:
    async with aggregated(2) as s, no_cycles(s):
        s.aggregated[0].behaviour = closes
        for _ in range(5):
            assert (await s.post(body)).status == 200


@pytest.mark.parametrize(
    "sent",
    [
        POST + b"content-length: 100000\r\n\r\n" + b"x" * 50_000,
        POST + b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        POST + b"x: y",
        post() + POST + b"content-length: 100\r\n\r\n{",  # behind one that is answered
        post() + b"rubbish\r\n\r\n",
        post() * 3,
        POST + b"content-length: 5, 5\r\n\r\nhello",
        POST + b"transfer-encoding: chunked\r\n\r\nrubbish\r\n",
        POST + b"upgrade: h2c\r\nconnection: upgrade\r\ncontent-length: 1000\r\n\r\nhello",
    ],
)
@pytest.mark.usefixtures("collector")
@on_uvloop
async def test_a_client_that_leaves_takes_everything_with_it(sent: bytes) -> None:
    async with running() as s, no_cycles(s):
        for abort in (True, False):
            reader, writer = await asyncio.open_connection("127.0.0.1", s.router.port)
            writer.write(sent)
            await writer.drain()
            await until(lambda: len(s.router.connections) == 2, "it is connected")
            await asyncio.sleep(0.05)
            if abort:
                writer.transport.abort()
            else:
                writer.close()
            await until(lambda: len(s.router.connections) == 1, "it is gone")
            del reader, writer


@pytest.mark.usefixtures("collector")
@on_uvloop
async def test_tls_leaves_no_cycle(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "router")
    tls = ssl.create_default_context(cafile=cert)
    async with running(tls_cert=cert, tls_key=key) as s, no_cycles(s, tls):
        for encrypted in (True, True, False):  # the last one shakes no hands
            reader, writer = await asyncio.open_connection("127.0.0.1", s.router.port, ssl=tls if encrypted else None)
            writer.write(POST + b"content-length: 100000\r\n\r\n" + b"x" * 50_000)
            await asyncio.sleep(0.1)
            writer.transport.abort()
            del reader, writer
        await until(lambda: len(s.router.connections) == 1, "they are gone")


Behaviour = Callable[[FakeWorker, Seen, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def closes(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def closes_inside(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
    await writer.drain()
    writer.transport.abort()


async def breaks_stream(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await begin_stream(writer)
    await chunk(writer, worker.events(seen, ["a"], False)[0])
    writer.transport.abort()


async def rubbish(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"rubbish\r\n\r\n")


async def fails(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reply(writer, 500, b'{"error":{"message":"no"}}')


async def refuses(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reply(writer, 400, b'{"error":{"message":"no"}}')


async def not_json(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reply(writer, 200, b"no")


async def is_silent(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(
    "behaviour", [closes, closes_inside, breaks_stream, rubbish, fails, refuses, not_json, is_silent]
)
@pytest.mark.usefixtures("collector")
@on_uvloop
async def test_an_answer_that_fails_leaves_no_cycle(role: str, behaviour: Behaviour) -> None:
    settings: dict[str, Any] = {"eject_share": 0, "worker_wait_s": 0.1}
    if behaviour is is_silent:
        settings["retries"] = 0
        settings |= {f"{key}_timeout_s": 0.05 for key in ("prefill", "decode_first_byte", "decode_answer")}
    async with running(**settings) as s, no_cycles(s):
        for worker in s.prefill if role == "prefill" else s.decode:
            worker.behaviour = behaviour
        for _ in range(2):
            await s.post()
            with contextlib.suppress(aiohttp.ClientError):
                await s.post({**ASK, "stream": True})


@pytest.mark.parametrize("counts", [None, {"v": 2}, {"v": 99}, "x"])
@pytest.mark.usefixtures("collector")
@on_uvloop
async def test_counts_that_cannot_be_used_leave_no_cycle(counts: object) -> None:
    async with running() as s, no_cycles(s):
        s.prefill[0].counts = counts
        for _ in range(3):
            assert (await s.post()).status == 200


@pytest.mark.usefixtures("collector")
@on_uvloop
async def test_a_request_that_gets_no_turn_leaves_no_cycle() -> None:
    async with running(max_inflight=1, max_queued=1, queue_timeout_s=0.1) as s, no_cycles(s):
        s.decode[0].token_gap_s = 0.1
        statuses = [answer.status for answer in await asyncio.gather(*(s.post() for _ in range(5)))]
        assert 503 in statuses
        assert 429 in statuses


@pytest.mark.usefixtures("collector")
@on_uvloop
async def test_a_request_without_a_worker_leaves_no_cycle() -> None:
    async with running(worker_wait_s=0.1) as s, no_cycles(s):
        await s.decode[0].stop()
        assert {(await s.post()).status for _ in range(3)} <= {502, 503}
        await asyncio.sleep(0.1)
        assert (await s.post()).status == 503  # at once


@pytest.mark.usefixtures("collector")
@on_uvloop
async def test_a_request_beyond_its_quota_leaves_no_cycle(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret alice requests_per_day=1\n")
    async with running(api_key_file=tmp_path / "keys") as s:
        for _ in range(3):
            gc.collect()
            gc.garbage.clear()  # of the start
            last = (await s.post(headers=bearer("secret"))).status
        gc.collect()
        assert (last, ours(gc.garbage)) == (429, [])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models"])
@pytest.mark.usefixtures("collector")
@on_uvloop
async def test_a_client_that_leaves_during_its_answer_leaves_no_cycle(path: str) -> None:
    async with running(health_interval_s=60) as s, no_cycles(s):
        for worker in (*s.prefill, *s.decode):
            worker.delay_s = 0.3
        method = b"GET" if path == "/v1/models" else b"POST"
        head = b"%b %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" % (method, path.encode())
        body = b"" if method == b"GET" else BODY
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", s.router.port)
            writer.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
            await until(lambda: s.router.running == 1, "it runs")
            writer.transport.abort()
            await until(lambda: s.router.running == 0, "it has ended")
            del reader, writer


@pytest.mark.usefixtures("collector")
@on_uvloop
async def test_a_request_that_is_refused_leaves_no_cycle() -> None:
    async with running() as s, no_cycles(s):
        for body in (b"rubbish", b"[" * 2000, b'{"model":"none","prompt":"x"}', b'{"kv_transfer_params":{}}'):
            assert b" 40" in (await exchange(s, post(body, b"connection: close\r\n")))[:13]
