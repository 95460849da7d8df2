"""Workers behind a gateway, whose URLs have a path."""

from __future__ import annotations

from typing import Any

import pytest

from eldr.router.config.endpoint import Endpoint
from eldr.router.fleet.discovery.dns import DnsSource
from tests.router.admin import ask_admin, listed, until_state
from tests.router.fake_worker import FakeWorker
from tests.router.harness import ASK, on_uvloop, running

METRICS = 'vllm:num_requests_waiting{engine="0"} 3.0\nvllm:kv_cache_usage_perc{engine="0"} 0.5\n'


@pytest.mark.parametrize("path", ["/prefill0", "/a/b%2Fc"])
@on_uvloop
async def test_every_request_to_a_worker_is_below_its_path(path: str) -> None:
    """The fake workers find nothing elsewhere: probes, models, metrics, both legs."""
    async with running(worker_path=path, load_interval_s=0.05) as s:
        s.decode[0].metrics = METRICS
        assert (await s.get("/ready")).status == 200
        assert (await s.post()).status == 200
        assert (await s.post({**ASK, "stream": True})).events[-1] == "data: [DONE]"
        assert (await s.get("/v1/models")).json()["data"][0]["id"] == "tiny"
        assert len(s.prefill[0].generated) == len(s.decode[0].generated) == 2
        while await s.metric("eldr_worker_waiting", worker=s.decode[0].url) != 3:
            pass
        assert s.decode[0].generated[0].headers["host"] == s.decode[0].url.removeprefix("http://").removesuffix(path)


@on_uvloop
async def test_a_worker_with_a_path_joins_and_leaves_by_hand(admin: dict[str, Any]) -> None:
    async with running(**admin) as s:
        worker = await FakeWorker("decode", base_path="/gate/d1").start()
        try:
            joined = await ask_admin(s, "POST", "/admin/workers", {"url": worker.url + "/", "role": "decode"})
            assert (joined.status, joined.json()["url"]) == (202, worker.url)
            await until_state(s, "decode", worker.url, "up")
            assert (await ask_admin(s, "DELETE", "/admin/workers", {"url": worker.url})).status == 202
            await until_state(s, "decode", worker.url, "gone")
            refused = await ask_admin(s, "POST", "/admin/workers", {"url": worker.url + "/../d2", "role": "decode"})
            assert refused.status == 400
            assert ("decode", s.decode[0].url) in await listed(s)
        finally:
            await worker.stop()


async def test_a_name_with_a_path() -> None:
    async def resolve(host: str, port: int) -> list[str]:
        assert (host, port) == ("gateway.local", 8200)
        return ["10.0.0.1", "fd00::1"]

    async for workers in DnsSource("http://gateway.local:8200/d", "decode", 1, resolve).watch():
        assert workers == {Endpoint(f"http://{host}:8200/d", "decode") for host in ("10.0.0.1", "[fd00::1]")}
        break
