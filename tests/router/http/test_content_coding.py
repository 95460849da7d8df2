"""Compressed request bodies."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.router.http.content_coding import ACCEPTED, MAX_MEMBERS, PIECE_BYTES, BodyDecoder
from eldr.router.http.errors import ApiError
from tests.router.harness import ASK, on_uvloop, running
from tests.router.wire import exchange, post, status_of

zstd: Any = pytest.importorskip("backports.zstd", reason="no eldr[zstd]")


def raw_deflate(data: bytes) -> bytes:
    made = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return made.compress(data) + made.flush()


Compress = Callable[[bytes], bytes]
CODINGS: list[tuple[bytes, Compress]] = [
    (b"gzip", gzip.compress),
    (b"x-gzip", gzip.compress),
    (b"deflate", zlib.compress),
    (b"deflate", raw_deflate),
    (b"zstd", zstd.compress),
]
SEVERAL = [(b"gzip", gzip.compress), (b"zstd", zstd.compress)]


def decoded(coding: bytes, body: bytes, most_bytes: int = 2**30) -> bytes:
    decoder, whole = BodyDecoder(coding, body), b""
    while not decoder.complete and len(whole) <= most_bytes:
        piece = decoder.next_piece()
        assert len(piece) <= PIECE_BYTES
        whole += piece
    return whole


texts = st.binary(max_size=2000) | st.builds(bytes.__mul__, st.binary(min_size=1, max_size=20), st.integers(0, 30_000))


@pytest.mark.parametrize(("coding", "compress"), CODINGS)
@settings(max_examples=60, deadline=None)
@given(data=texts)
def test_what_was_compressed_comes_back(coding: bytes, compress: Compress, data: bytes) -> None:
    assert decoded(coding, compress(data)) == data


@pytest.mark.parametrize(("coding", "compress"), SEVERAL)
@settings(max_examples=40, deadline=None)
@given(members=st.lists(texts, min_size=1, max_size=5))
def test_members_follow_one_another(coding: bytes, compress: Compress, members: list[bytes]) -> None:
    assert decoded(coding, b"".join(map(compress, members))) == b"".join(members)


@pytest.mark.parametrize(("coding", "compress"), SEVERAL)
def test_there_is_a_limit_on_members(coding: bytes, compress: Compress) -> None:
    assert decoded(coding, compress(b"") * MAX_MEMBERS) == b""
    with pytest.raises(ApiError, match="members"):
        decoded(coding, compress(b"") * (MAX_MEMBERS + 1))


@pytest.mark.parametrize(("coding", "compress"), CODINGS)
@settings(max_examples=60, deadline=None)
@given(data=texts, cut=st.integers(0, 10**6), rest=st.binary(min_size=1, max_size=20))
def test_a_body_that_is_cut_short_or_too_long_is_refused(
    coding: bytes, compress: Compress, data: bytes, cut: int, rest: bytes
) -> None:
    whole = compress(data)
    with pytest.raises(ApiError) as refused:
        decoded(coding, whole[: 1 + cut % (len(whole) - 1)])
    assert refused.value.status == 400
    with pytest.raises(ApiError) as refused:
        decoded(coding, whole + b"x" + rest)
    assert refused.value.status == 400


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"zstd"])
@settings(max_examples=200, deadline=None)
@given(body=st.binary(min_size=1, max_size=300))
def test_any_bytes_end(coding: bytes, body: bytes) -> None:
    with contextlib.suppress(ApiError):
        assert len(decoded(coding, body, 10**6)) <= 10**6 + PIECE_BYTES


def test_a_zstd_window_may_not_be_larger_than_the_coding_allows() -> None:
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 25})
    with pytest.raises(ApiError, match="zstd"):
        decoded(b"zstd", compressor.compress(b"x" * 2**26) + compressor.flush())


# A router.


BODY = json.dumps({**ASK, "prompt": "hello " * 50_000}).encode()


@pytest.mark.parametrize(("coding", "compress"), CODINGS)
@on_uvloop
async def test_workers_get_the_body_uncompressed(coding: bytes, compress: Compress) -> None:
    async with running() as s:
        for name in (coding, coding.upper(), b"identity, " + coding):
            assert (await s.post(compress(BODY), headers={"content-encoding": name.decode()})).status == 200
        for worker in (*s.prefill, *s.decode):
            for seen in worker.generated:
                assert seen.body["prompt"] == "hello " * 50_000
                assert "content-encoding" not in seen.headers
        assert await s.metric("eldr_bodies_bytes") == 0


@pytest.mark.parametrize("coding", ["br", "compress", "gzip, gzip", "deflate, gzip", "rot13"])
@on_uvloop
async def test_other_codings_are_refused_with_those_that_are_known(coding: str) -> None:
    async with running() as s:
        refused = await s.post(b"x", headers={"content-encoding": coding})
        assert (refused.status, refused.headers["accept-encoding"]) == (415, ACCEPTED.decode())
        # RFC 9110, section 12.5.3: no other 415 may have it.
        refused = await s.post(headers={"content-type": "text/plain"})
        assert refused.status == 415
        assert "accept-encoding" not in refused.headers
        assert (await s.post(headers={"content-encoding": "identity"})).status == 200


@on_uvloop
async def test_limits_hold_for_what_was_decoded() -> None:
    async with running(max_body_bytes=2**20, max_bodies_bytes=2**22) as s:
        bomb = gzip.compress(b" " * 2**26)
        assert len(bomb) < 2**17
        gzipped = {"content-encoding": "gzip"}
        assert (await s.post(bomb, headers=gzipped)).status == 413
        assert (await s.post(gzip.compress(BODY), headers=gzipped)).status == 200
        assert (await s.post(gzip.compress(BODY)[:-5], headers=gzipped)).status == 400
        # The end of the message was clear, so the connection goes on.
        last = post(extra=b"connection: close\r\n")
        raw = await exchange(s, post(b"rubbish", b"content-encoding: gzip\r\n") + last)
        assert status_of(raw) == 400
        assert b"HTTP/1.1 200 " in raw
        assert await s.metric("eldr_bodies_bytes") == 0
        assert await s.metric("eldr_request_total", endpoint="other", status="413") == 1


@on_uvloop
async def test_others_have_their_turns_while_a_large_body_is_decoded() -> None:
    async with running() as s:
        body = gzip.compress(json.dumps({**ASK, "prompt": "x" * 2**24}).encode())
        _, writer = await asyncio.open_connection("127.0.0.1", s.router.port)
        writer.write(post(body, b"content-encoding: gzip\r\n"))
        turns = 0
        while not s.router.running:
            turns += 1
            await asyncio.sleep(0)
        assert turns > 2**24 // PIECE_BYTES
        writer.transport.abort()


@on_uvloop
async def test_a_client_that_leaves_ends_the_decoding() -> None:
    async with running() as s:
        body = gzip.compress(b" " * 2**24)
        for _ in range(3):
            _, writer = await asyncio.open_connection("127.0.0.1", s.router.port)
            writer.write(post(body, b"content-encoding: gzip\r\n"))
            await asyncio.sleep(0.005)
            writer.transport.abort()
        async with asyncio.timeout(10):
            while await s.metric("eldr_bodies_bytes"):
                await asyncio.sleep(0.01)
