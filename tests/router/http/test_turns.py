"""Long work of many: how much of it one turn of the event loop does, and in which order."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable
from typing import Any

from eldr.router.http.content_coding import PIECE_BYTES
from eldr.router.http.turns import Turns
from tests.router.fake_worker import FakeWorker, Seen
from tests.router.harness import ASK, on_uvloop, running
from tests.router.wire import post


@on_uvloop
async def test_one_piece_a_turn_and_everybody_in_turn() -> None:
    done: list[str] = []

    def pieces(name: str, count: int, end: Exception | None = None) -> Callable[[], bool]:
        left = iter(range(count - 1, -1, -1))

        def work() -> bool:
            done.append(name)
            more = next(left) > 0
            if not more and end is not None:
                raise end
            return more

        return work

    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: problems.append(context))
    turns = Turns()
    for name, count in (("a", 3), ("b", 1), ("c", 2)):
        turns.add(pieces(name, count, ValueError("c fails") if name == "c" else None))
    assert done == []
    for number in range(1, 7):
        await asyncio.sleep(0)
        assert len(done) == number
    assert done == ["a", "b", "c", "a", "c", "a"]
    assert [str(problem["exception"]) for problem in problems] == ["c fails"]
    await asyncio.sleep(0)
    turns.add(pieces("d", 1))
    await asyncio.sleep(0)
    assert done[6:] == ["d"]


@on_uvloop
async def test_many_large_bodies_hold_up_others_no_longer_than_one() -> None:
    async def held(worker: FakeWorker, seen: Seen, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    size, clients = 2**22, 10
    async with running() as s:
        s.prefill[0].behaviour = held
        body = gzip.compress(json.dumps({**ASK, "prompt": "x" * size}).encode())
        writers = [(await asyncio.open_connection("127.0.0.1", s.router.port))[1] for _ in range(clients)]
        for writer in writers:
            writer.write(post(body, b"content-encoding: gzip\r\n"))
        turns = 0
        while s.router.running < clients:
            turns += 1
            await asyncio.sleep(0)
        assert turns >= (clients - 1) * (size // PIECE_BYTES)
        for writer in writers:
            writer.transport.abort()
