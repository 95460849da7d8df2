"""Requests as bytes, and what comes back for them."""

from __future__ import annotations

import asyncio
import json
import re

from hypothesis import strategies as st

from tests.router.harness import ASK, Setup
from tests.router.memory import split

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


HEADERS = st.dictionaries(
    st.from_regex(rb"x-[a-z0-9]{1,8}", fullmatch=True),
    st.from_regex(rb"[!-~]([ -~]{0,20}[!-~])?", fullmatch=True),
    max_size=4,
)


@st.composite
def wire_requests(draw: st.DrawFn) -> bytes:
    """Bytes of one request after which the connection may go on."""
    method = draw(st.sampled_from([b"GET", b"HEAD", b"POST"]))
    target = b"/whole?a=b" if method == b"HEAD" else draw(st.sampled_from([b"/whole?a=b", b"/stream"]))
    lines = b"".join(b"%b: %b\r\n" % field for field in draw(HEADERS).items())
    head = b"%b %b HTTP/1.1\r\nHost: x\r\n%b" % (method, target, lines)
    if method != b"POST":
        return head + b"\r\n"
    body = draw(st.binary(max_size=300))
    if draw(st.booleans()):
        return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    pieces = split(body, draw(st.lists(st.integers(0, 300), max_size=3)))
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return head + b"transfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
