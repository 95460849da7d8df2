"""Readings of the workers' lists that many requests wait for."""

from __future__ import annotations

import asyncio
import time

from eldr.router.fleet.lists import Looks
from tests.router.harness import on_uvloop


@on_uvloop
async def test_nobody_waits_for_the_looks_that_others_ask_for_later() -> None:
    reads = 0
    others: list[asyncio.Task[None]] = []

    async def read() -> None:
        nonlocal reads
        reads += 1
        await asyncio.sleep(0)
        others.append(asyncio.create_task(looks.since(time.monotonic())))
        await asyncio.sleep(0)

    looks = Looks(read)
    await looks.since(time.monotonic())
    assert reads == 1
    await others[0]
    assert reads == 2
    await looks.close()
    await asyncio.gather(*others, return_exceptions=True)


@on_uvloop
async def test_one_reading_answers_all_who_asked_before_it_began() -> None:
    began = asyncio.Event()
    released = asyncio.Event()
    reads = 0

    async def read() -> None:
        nonlocal reads
        reads += 1
        began.set()
        await released.wait()

    looks = Looks(read)
    early = [asyncio.create_task(looks.since(time.monotonic())) for _ in range(50)]
    await began.wait()
    late = asyncio.create_task(looks.since(time.monotonic()))
    early[0].cancel()  # one who gives up takes nothing from the others
    released.set()
    await asyncio.gather(*early[1:])
    assert (reads, late.done()) == (1, False)
    await late
    assert reads == 2
