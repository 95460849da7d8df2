"""A real Envoy with examples/envoy-epp.yaml, in front of fake workers and asking a picker.

ELDR_ENVOY names its program, if it is not on the PATH.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from eldr.demo.gateway import envoy_config
from eldr.demo.ports import free_ports

EXAMPLE = Path(__file__).parents[3] / "examples" / "envoy-epp.yaml"


def program() -> str:
    """The program, or no test without one."""
    found = os.environ.get("ELDR_ENVOY") or shutil.which("envoy")
    if found is None:
        pytest.skip("no Envoy: install it, or name its program in ELDR_ENVOY")
    return found


class Envoy:
    """One Envoy. url: where clients find it. session: a client's."""

    def __init__(self, config: Path, port: int, session: aiohttp.ClientSession) -> None:
        self._config = config
        self._process: asyncio.subprocess.Process | None = None
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.session = session

    async def start(self) -> None:
        flags = ("-c", str(self._config), "--disable-hot-restart", "--concurrency", "1", "--log-level", "error")
        self._process = await asyncio.create_subprocess_exec(
            program(), *flags, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while True:
            assert self._process.returncode is None, "Envoy ended"
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def envoy(
    folder: Path, picker_port: int, worker_ports: Sequence[int], changes: dict[str, str] | None = None
) -> AsyncIterator[Envoy]:
    """Envoy with the example's configuration. changes: of its text."""
    program()
    (port,) = free_ports(1)
    text = envoy_config(EXAMPLE.read_text(), port, picker_port, worker_ports)
    for old, new in {"interval: 2s": "interval: 0.1s", **(changes or {})}.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "envoy.yaml"
    path.write_text(text)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        one = Envoy(path, port, session)
        await one.start()
        try:
            yield one
        finally:
            await one.kill()
