"""Streams run while the pods under them are created, become unready and ready again, and end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Protocol

import aiohttp

from eldr.router.app import Router
from eldr.router.config.settings import RouterConfig
from tests.router.fake_worker import FakeWorker
from tests.router.harness import ASK, Reply, Scripted, until

CLIENTS = 6


class Pods(Protocol):
    """What a cluster does with pods of namespace moe. Their labels are {"role": role}."""

    url: str

    async def create(self, name: str, role: str, ip: str, port: int, ready: bool = True) -> None: ...

    async def set_ready(self, name: str, ready: bool) -> None: ...

    async def delete(self, name: str) -> None:
        """Let it end, which takes it until `finish`."""

    async def finish(self, name: str) -> None: ...


async def no_stream_breaks(pods: Pods, account: Path) -> None:
    first = await FakeWorker("prefill", host="127.0.0.1").start()
    port = int(first.url.rsplit(":", 1)[1])
    a, b = [await FakeWorker("decode", host=f"127.0.0.{host}", port=port).start() for host in (2, 3)]
    for worker in (a, b):
        worker.tokens, worker.token_gap_s = list("abcdefghijkl"), 0.02
    await pods.create("prefill", "prefill", "127.0.0.1", port)
    await pods.create("a", "decode", "127.0.0.2", port)
    config = RouterConfig.of(
        prefill=("k8s+http://moe?selector=role=prefill&port=http",),
        decode=(f"k8s+http://moe?selector=role=decode&port={port}",),
        kubernetes_api=pods.url,
        kubernetes_account=account,
        port=0,
        health_interval_s=0.1,
    )
    router = Router(config, lambda group: Scripted())
    await router.start()
    streams: list[Reply] = []
    ending = False

    async def client(session: aiohttp.ClientSession) -> None:
        while not ending:
            body = {**ASK, "stream": True, "max_tokens": 12}
            async with session.post(f"http://127.0.0.1:{router.port}/v1/completions", json=body) as answer:
                streams.append(Reply(answer.status, answer.headers, await answer.read()))

    def fleet() -> set[str]:
        return {worker.url for worker in router.services.fleet.available("decode")}

    async def more_at(worker: FakeWorker) -> None:
        before = len(worker.generated)
        await until(lambda: len(worker.generated) > before, "it gets requests")

    async with aiohttp.ClientSession() as session:
        clients = [asyncio.create_task(client(session)) for _ in range(CLIENTS)]
        try:
            await more_at(a)
            await pods.create("b", "decode", "127.0.0.3", port, ready=False)
            await more_at(a)
            assert not b.generated, "it is not ready"
            for _ in range(3):
                await pods.set_ready("b", True)
                await more_at(b)
                await until(lambda: b.running, "streams run there")
                await pods.set_ready("b", False)
                await until(lambda: fleet() == {a.url}, "it gets no more requests")
                asked = len(b.generated)
                await more_at(a)
                await until(lambda: not b.running, "its streams end")
                assert len(b.generated) == asked
            await pods.set_ready("b", True)
            await more_at(b)
            await until(lambda: a.running, "streams run there")
            await pods.delete("a")
            await until(lambda: fleet() == {b.url}, "it drains")
            await until(lambda: all(w.url != a.url for w in router.membership.workers()), "it has left")
            await pods.finish("a")
            await a.stop()
            await more_at(b)
        finally:
            ending = True
            await asyncio.gather(*clients)
            await router.stop(0)
            for worker in (first, a, b):
                await worker.stop()
    assert len(streams) > 20
    assert {stream.status for stream in streams} == {200}
    for stream in streams:
        *events, end = stream.events
        assert end == "data: [DONE]"
        assert "".join(event["choices"][0]["text"] for event in events) == "abcdefghijkl"
