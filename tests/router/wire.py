"""Requests as bytes, and what comes back for them."""

from __future__ import annotations

import asyncio
import json
import re

from tests.router.harness import ASK, Setup

BODY = json.dumps(ASK).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def post(body: bytes = BODY, extra: bytes = b"") -> bytes:
    return POST + extra + b"content-length: %d\r\n\r\n%b" % (len(body), body)


GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


async def exchange(setup: Setup, data: bytes) -> bytes:
    """Everything that comes back for `data` until the router closes; it must close."""
    reader, writer = await asyncio.open_connection("127.0.0.1", setup.router.port)
    writer.write(data)
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()


def answers_in(raw: bytes) -> int:
    return len(re.findall(rb"HTTP/1\.1 \d{3} [A-Z]", raw))


def status_of(raw: bytes) -> int:
    assert raw.startswith(b"HTTP/1.1 ")
    return int(raw[9:12])
