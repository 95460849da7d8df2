"""Data parallelism: the ranks of one server are workers of their own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping

import pytest

from eldr.errors import EldrError
from eldr.policies.base import DecodeRequest
from eldr.router.app import Router
from eldr.router.config.settings import RouterConfig
from tests.router.engine_metrics import said
from tests.router.fake_worker import FakeWorker
from tests.router.harness import Scripted, on_uvloop


def always(url: str) -> Callable[[DecodeRequest, Mapping[str, int]], str]:
    return lambda request, in_flight: url


@on_uvloop
async def test_ranks_of_one_server_are_workers_of_their_own() -> None:
    prefill, decode = await FakeWorker("prefill").start(), await FakeWorker("decode").start()
    decode.metrics = said(engine=0) + said(engine=1)
    policy = Scripted()
    config = RouterConfig.of(prefill=(prefill.url,), decode=(decode.url + "#dp=2",), port=0)
    router = Router(config, lambda group: policy)
    await router.start()
    try:
        assert policy.heard == [("joined", f"{decode.url}#rank=0"), ("joined", f"{decode.url}#rank=1")]
        for number in (1, 0, 1):
            policy.rule = always(f"{decode.url}#rank={number}")
            reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"x-data-parallel-rank: 7\r\nconnection: close\r\ncontent-length: 31\r\n\r\n"
                b'{"prompt": "x","max_tokens": 4}'
            )
            assert b" 200 " in (await reader.read()).splitlines()[0]
            writer.close()
        assert [seen.headers["x-data-parallel-rank"] for seen in decode.generated] == ["1", "0", "1"]
        assert "x-data-parallel-rank" not in prefill.generated[0].headers
    finally:
        await prefill.stop()
        await decode.stop()
        await router.stop(0)


@pytest.mark.parametrize(
    ("engines", "suffix", "said_of_it"),
    [(4, "", "#dp=4"), (2, "#rank=2", "none of rank 2"), (1, "#dp=2", "none of rank 1")],
)
@on_uvloop
async def test_a_url_that_does_not_name_one_engine_is_refused_at_start(
    engines: int, suffix: str, said_of_it: str
) -> None:
    prefill, decode = await FakeWorker("prefill").start(), await FakeWorker("decode").start()
    decode.metrics = "".join(said(engine=engine) for engine in range(engines))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = RouterConfig.of(prefill=(prefill.url,), decode=(decode.url + suffix,), port=port)
    router = Router(config, lambda group: Scripted())
    try:
        with pytest.raises(EldrError, match=said_of_it):
            await router.start()
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)
    finally:
        await prefill.stop()
        await decode.stop()
