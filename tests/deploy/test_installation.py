"""Routers, NATS servers and a picker as the chart configures them, with a fake API server and fake workers."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import aiohttp
import grpc.aio
import pytest

from tests.deploy.cases import CASES, IMAGE, NO_BUS
from tests.deploy.charts import EXAMPLES, Manifest, container_of, labels_of, needs_helm, of_kind, parse, render, toml_of
from tests.nats_server import PROGRAM as NATS
from tests.router import fake_apiserver as apiserver
from tests.router.fake_worker import FakeWorker
from tests.router.harness import ASK, on_uvloop
from tests.router.picker.client import Caller, endpoint

SERVING = apiserver.PODS.format("serving")
ELDR = (sys.executable, "-c", "import sys; from eldr.cli.main import main; sys.exit(main())")

pytestmark = [needs_helm, pytest.mark.skipif(NATS is None, reason="no nats-server")]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@asynccontextmanager
async def process(*command: str | Path) -> AsyncIterator[Process]:
    running = await asyncio.create_subprocess_exec(*command, stdout=DEVNULL, stderr=PIPE)
    assert running.stderr is not None
    said = asyncio.create_task(running.stderr.read())
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            running.kill()
        await running.wait()
        print((await said).decode())


async def nats_servers(manifests: list[Manifest], folder: Path, stack: AsyncExitStack) -> list[int]:
    """Start the servers of the StatefulSet. Returns their ports for clients."""
    text = of_kind(manifests, "ConfigMap")["eldr-nats"]["data"]["nats.conf"]
    count = of_kind(manifests, "StatefulSet")["eldr-nats"]["spec"]["replicas"]
    ports, cluster = free_ports(count), free_ports(count)
    for i in range(count):  # all have one address here instead of a name each
        text = re.sub(rf"eldr-nats-{i}\.eldr-nats:6222", f"127.0.0.1:{cluster[i]}", text)
    for i in range(count):
        own = text.replace("0.0.0.0:4222", f"127.0.0.1:{ports[i]}").replace("0.0.0.0:6222", f"127.0.0.1:{cluster[i]}")
        path = folder / f"nats-{i}.conf"
        path.write_text(own.replace("0.0.0.0:8222", "127.0.0.1:-1"))
        await stack.enter_async_context(process(str(NATS), "-c", path))
    return ports


@dataclass
class Client:
    session: aiohttp.ClientSession
    url: str

    async def status(self, path: str) -> int:
        try:
            async with self.session.get(self.url + path) as answer:
                return answer.status
        except OSError:
            return 0

    async def metric(self, name: str, labels: str = "") -> float:
        """The sum of the samples of a metric whose labels contain a text. -1 without an answer."""
        try:
            async with self.session.get(self.url + "/metrics") as answer:
                lines = (await answer.text()).splitlines()
        except OSError:
            return -1
        found = [line for line in lines if line.startswith((name + " ", name + "{")) and labels in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)


async def eventually(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    for _ in range(300):
        if await condition():
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"never happened: {what}")


@on_uvloop
async def test_routers_of_the_chart_find_workers_and_each_other(tmp_path: Path) -> None:
    values = {**IMAGE, "config": {"shutdown_delay_s": 1, "grace_s": 5}}
    manifests = render(values)
    examples = of_kind(parse((EXAMPLES / "vllm-prefill-decode.yaml").read_text()), "Deployment")
    account = tmp_path / "account"
    account.mkdir()
    (account / "namespace").write_text("serving")
    async with AsyncExitStack() as stack:
        api = await apiserver.FakeApiserver().start()
        stack.push_async_callback(api.stop)
        workers: dict[str, FakeWorker] = {}
        for name, role in (("prefill-0", "prefill"), ("decode-0", "decode"), ("decode-1", "decode")):
            workers[name] = await FakeWorker(role).start()
            stack.push_async_callback(workers[name].stop)
            labels = labels_of(examples[f"vllm-{role}"])
            ports = {"http": int(workers[name].url.rpartition(":")[2]), "nixl": 5600}
            await api.put(SERVING, apiserver.pod(name, "127.0.0.1", labels, ports))
        await api.put(SERVING, apiserver.pod("another", "127.0.0.1", {"app": "another"}, {"http": 1}))
        nats = await nats_servers(manifests, tmp_path, stack)
        config = tmp_path / "eldr.toml"
        config.write_text(f'{toml_of(manifests)}\nkubernetes_api = "{api.url}"\nkubernetes_account = "{account}"\n')
        session = await stack.enter_async_context(aiohttp.ClientSession())
        routers, clients = [], []
        for port, bus in zip(free_ports(2), nats, strict=True):
            flags = ("--host", "127.0.0.1", "--port", str(port), "--peers", f"nats://127.0.0.1:{bus}")
            routers.append(await stack.enter_async_context(process(*ELDR, "serve", "--config", config, *flags)))
            clients.append(Client(session, f"http://127.0.0.1:{port}"))
        one, other = clients
        for client in clients:
            await eventually(partial(ready, client), "a router is ready")

        # What one starts, the other knows.
        for name in ("decode-0", "decode-1"):
            workers[name].tokens, workers[name].token_gap_s = ["x"] * 1000, 0.05
        async with session.post(
            one.url + "/v1/completions", json={**ASK, "max_tokens": 1000, "stream": True}
        ) as stream:
            assert stream.status == 200
            await stream.content.readuntil(b"\n\n")
            await eventually(partial(is_, other, "eldr_inflight_elsewhere", 1), "the other router hears of it")
        await eventually(partial(is_, other, "eldr_inflight_elsewhere", 0), "and of its end")

        # A pod that is about to be deleted gets no more requests.
        going = api.get(SERVING, "decode-1")
        going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        await api.put(SERVING, going)
        for client in clients:
            await eventually(partial(is_, client, "eldr_worker_up", 1, 'role="decode"'), "one is left")

        # A router that ends says so first.
        routers[0].send_signal(signal.SIGTERM)
        await eventually(partial(has, one, "/ready", 503), "it is not ready")
        assert await routers[0].wait() == 0
        assert await other.status("/ready") == 200


@on_uvloop
async def test_a_picker_of_the_chart_picks_from_its_pool(tmp_path: Path) -> None:
    account = tmp_path / "account"
    account.mkdir()
    (account / "namespace").write_text("serving")
    async with AsyncExitStack() as stack:
        api = await apiserver.FakeApiserver().start()
        stack.push_async_callback(api.stop)
        worker = await FakeWorker().start()
        stack.push_async_callback(worker.stop)
        pool_of_values = {
            **CASES["picker"]["picker"]["inferencePool"],
            "targetPorts": [int(worker.url.rpartition(":")[2])],
        }
        values = {**CASES["picker"], **NO_BUS, "picker": {"enabled": True, "inferencePool": pool_of_values}}
        manifests = render(values)
        (pool,) = of_kind(manifests, "InferencePool").values()
        labels = pool["spec"]["selector"]["matchLabels"]
        await api.put(SERVING, apiserver.pod("qwen3-0", "127.0.0.1", labels))
        await api.put(SERVING, apiserver.pod("another", "127.0.0.2", {"app": "another"}))
        config = tmp_path / "eldr.toml"
        text = toml_of(manifests, "eldr-epp")
        config.write_text(f'{text}\nkubernetes_api = "{api.url}"\nkubernetes_account = "{account}"\n')
        http, asked = free_ports(2)
        flags = ("--host", "127.0.0.1", "--port", str(http), "--grpc-listen", f"127.0.0.1:{asked}")
        command = container_of(of_kind(manifests, "Deployment")["eldr-epp"])["command"]
        await stack.enter_async_context(process(*ELDR, command[1], "--config", config, *flags))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        client = Client(session, f"http://127.0.0.1:{http}")

        # A picker without pods is alive and not ready. With the pool it picks its pod.
        await eventually(partial(has, client, "/health", 200), "the picker is alive")
        assert await client.status("/ready") == 503
        await api.put(apiserver.POOLS.format("serving"), pool)
        await eventually(partial(has, client, "/ready", 200), "the picker has its worker")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{asked}") as channel:
            exchange, picked = await Caller(channel).ask(ASK)
            assert picked.endpoints == [endpoint(worker)]
            exchange.cancel()


async def ready(client: Client) -> bool:
    return await client.status("/ready") == 200 and await client.metric("eldr_peers", 'state="synced"') == 1


async def is_(client: Client, name: str, value: float, labels: str = "") -> bool:
    return await client.metric(name, labels) == value


async def has(client: Client, path: str, status: int) -> bool:
    return await client.status(path) == status
