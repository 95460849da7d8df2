"""A connection that is used again at once: what is meant for the exchange that ended must not reach the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from eldr.router.config.groups import ClientLimits
from eldr.router.http.body_memory import BodyMemory
from eldr.router.http.client import Answer, ExchangeError, WorkerConnection
from eldr.router.http.pool import WorkerPool
from tests.router.harness import interpreted

REQUEST = b"GET / HTTP/1.1\r\nhost: worker\r\n\r\n"
PATIENCE_S = 30.0


async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    number = 0
    while await reader.readuntil(b"\r\n\r\n"):
        number += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number)


class Chained(Answer):
    """When it is complete, another exchange starts on the same connection before anybody else runs."""

    def __init__(self, pool: WorkerPool, late: Callable[[WorkerConnection, Answer], None]) -> None:
        super().__init__()
        self._pool = pool
        self._late = late
        self.next = Answer()

    def on_done(self) -> None:
        super().on_done()
        try:
            self._pool.connection().send(None)
        except StopIteration as found:  # an idle connection is there without waiting
            connection: WorkerConnection = found.value
        connection.start(self.next, REQUEST, PATIENCE_S)
        self._late(connection, self)


async def second_answer(late: Callable[[WorkerConnection, Answer], None]) -> bytes:
    """What the second exchange hears if `late` is done to the first one after the second has begun."""
    server = await asyncio.start_server(answer_all, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    pool = WorkerPool(f"http://127.0.0.1:{port}", connect_timeout_s=PATIENCE_S, memory=BodyMemory(ClientLimits()))
    first = Chained(pool, late)
    connection = await pool.connection()
    connection.start(first, REQUEST, PATIENCE_S)
    try:
        await connection.finish(first)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()
    async with asyncio.timeout(PATIENCE_S):
        await first.next.finished
    pool.close()
    server.close()
    return first.next.body


@interpreted
async def test_an_abort_of_the_exchange_that_ended() -> None:
    assert await second_answer(lambda connection, first: connection.abort(first)) == b"2"


@interpreted
async def test_a_pause_of_the_exchange_that_ended() -> None:
    assert await second_answer(lambda connection, first: connection.pause(first)) == b"2"


@interpreted
async def test_a_cancelled_wait_for_the_exchange_that_ended() -> None:
    task = asyncio.current_task()
    assert task is not None

    def cancel(connection: WorkerConnection, first: Answer) -> None:
        task.cancel()

    assert await second_answer(cancel) == b"2"


async def test_what_is_idle_dies_with_the_worker_that_broke_off() -> None:
    held = asyncio.Event()

    async def answer_one_hold_the_next(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /hold"):
            await held.wait()
            writer.transport.abort()
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1")
            await reader.read()
            writer.close()

    server = await asyncio.start_server(answer_one_hold_the_next, "127.0.0.1", 0)
    pool = WorkerPool(
        f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}",
        connect_timeout_s=PATIENCE_S,
        memory=BodyMemory(ClientLimits()),
    )
    broken, idle = await pool.connection(), await pool.connection()
    first, second = Answer(), Answer()
    broken.start(first, REQUEST.replace(b"GET /", b"GET /hold"), PATIENCE_S)
    idle.start(second, REQUEST, PATIENCE_S)
    await idle.finish(second)
    assert await pool.connection() is idle
    pool.release(idle)
    held.set()
    with pytest.raises(ExchangeError):
        await broken.finish(first)
    fresh = await pool.connection()
    assert fresh not in (broken, idle)
    fresh.close()
    pool.close()
    server.close()
