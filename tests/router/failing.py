"""Ways in which a fake worker fails a request, whatever it was asked."""

from __future__ import annotations

import asyncio

from tests.router.fake_worker import FakeWorker, Seen, begin_stream, chunk


async def die_at_once(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.transport.abort()


async def die_after_head(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await begin_stream(writer)
    writer.transport.abort()


async def die_after_first_event(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await begin_stream(writer)
    await chunk(writer, worker.events(seen, ["a"], False)[0])
    await asyncio.sleep(0.05)
    writer.transport.abort()


async def hang(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)
