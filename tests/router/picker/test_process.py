"""`eldr epp` as a process: how it ends, what it reads again, and how it hands its sockets over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import grpc.aio
import pytest

from eldr.demo.ports import free_ports
from tests.router.fake_worker import FakeWorker
from tests.router.harness import until
from tests.router.picker.client import DESTINATION, Exchange, Picked, endpoint


class Caller:
    """A gateway of a process: it has what an exchange needs."""

    def __init__(self, port: int) -> None:
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])

    async def endpoints(self) -> list[str]:
        exchange, picked = Exchange(self), Picked()  # type: ignore[arg-type]
        await exchange.headers(method="GET", path="/v1/models", end=True)
        picked.take(await exchange.next())
        assert picked.headers[DESTINATION]
        return picked.endpoints


@asynccontextmanager
async def epp(config: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    said = config.with_suffix(".log")  # no pipe, which a successor would keep open
    with said.open("wb") as log:
        flags = ("-m", "eldr", "epp", "--config", str(config))
        process = await asyncio.create_subprocess_exec(sys.executable, *flags, stderr=log)
    try:
        await until(lambda: b"eldr: picking on" in said.read_bytes(), "it picks")
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def write(path: Path, ports: list[int], *workers: FakeWorker) -> None:
    urls = ", ".join(f'"{worker.url}"' for worker in workers)
    lines = [f"worker = [{urls}]", f'grpc_listen = "127.0.0.1:{ports[0]}"', f"port = {ports[1]}"]
    path.write_text("\n".join([*lines, "fallbacks = 3", "health_interval_s = 0.1", ""]))


@pytest.fixture
async def fakes() -> AsyncIterator[list[FakeWorker]]:
    started = [await FakeWorker("plain").start() for _ in range(2)]
    yield started
    for worker in started:
        await worker.stop()


async def test_a_change_of_the_file_and_sighup(tmp_path: Path, fakes: list[FakeWorker]) -> None:
    path, ports = tmp_path / "epp.toml", free_ports(2)
    write(path, ports, fakes[0])
    async with epp(path) as process:
        caller = Caller(ports[0])
        assert await caller.endpoints() == [endpoint(fakes[0])]
        write(path, ports, *fakes)
        process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(20):
            while len(await caller.endpoints()) < 2:
                await asyncio.sleep(0.05)
        await caller.channel.close()


async def test_a_successor_takes_the_sockets(tmp_path: Path, fakes: list[FakeWorker]) -> None:
    path, ports = tmp_path / "epp.toml", free_ports(2)
    write(path, ports, *fakes)
    async with epp(path) as process:
        before = Caller(ports[0])
        assert len(await before.endpoints()) == 2
        process.send_signal(signal.SIGUSR2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        async with asyncio.timeout(60):
            while not (successor := children.read_text().split()):
                await asyncio.sleep(0.01)
            try:
                assert await process.wait() == 0
                after = Caller(ports[0])
                assert len(await after.endpoints()) == 2
                metrics = f"http://127.0.0.1:{ports[1]}/metrics"
                async with aiohttp.ClientSession() as session, session.get(metrics) as answer:
                    assert "eldr_decisions" in await answer.text()
            finally:
                os.kill(int(successor[0]), signal.SIGKILL)
        await before.channel.close()
        await after.channel.close()
