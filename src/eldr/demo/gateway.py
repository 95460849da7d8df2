"""Runs an Envoy that asks `eldr epp` for workers, and what llm-d's coordinator does in front of it.

The coordinator calls the gateway once for each phase of a request, with the header EPP-Profile. It copies every member
of the prefill's `kv_transfer_params` into the body of the decode request (llm-d-router v0.10,
pkg/coordinator/connectors/kv/nixl.go).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from eldr.demo.ports import free_ports
from eldr.demo.processes import Workers, answers, end_process, running_eldr
from eldr.demo.workers import log_tail, start_logged
from eldr.errors import EldrError

READY_TIMEOUT_S = 60.0
PROFILE = "EPP-Profile"
COMPLETIONS = "/v1/completions"
# What an example of a configuration has in place of this machine's addresses.
LISTENS = "address: 0.0.0.0, port_value: 8080"
PICKER = "address: 127.0.0.1, port_value: 9002"
WORKER = "              - endpoint: { address: { socket_address: { address: %s, port_value: %d } } }\n"
WORKERS = WORKER % ("10.0.0.1", 8000) + WORKER % ("10.0.0.2", 8000)


class GatewayError(EldrError):
    """Envoy did not start, or its configuration cannot be adapted. The message ends with the tail of its log."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """What a gateway is made of. envoy: the program. config: the example examples/envoy-epp.yaml."""

    envoy: Path
    config: Path


def envoy_config(example: str, port: int, picker_port: int, worker_ports: Sequence[int]) -> str:
    """The example's configuration with ports of this machine. port: for clients. Raises GatewayError."""
    workers = "".join(WORKER % ("127.0.0.1", worker) for worker in worker_ports)
    changes = {
        LISTENS: f"address: 127.0.0.1, port_value: {port}",
        PICKER: f"address: 127.0.0.1, port_value: {picker_port}",
        WORKERS: workers,
    }
    for old, new in changes.items():
        if example.count(old) != 1:
            raise GatewayError(f"the example of a configuration has not once: {old}")
        example = example.replace(old, new)
    return example


@contextlib.asynccontextmanager
async def running_gateway(
    gateway: Gateway, workers: Workers, flags: Sequence[str], log_path: Path
) -> AsyncIterator[str]:
    """Run picker, Envoy and coordinator in front of `workers`. Yields the coordinator's URL.

    flags: of the picker, whose log is at `log_path`. Envoy's is beside it. Raises EldrError.
    """
    picker_port, envoy_port, coordinator_port = free_ports(3)
    flags = ["--grpc-listen", f"127.0.0.1:{picker_port}", *flags]
    ports = [worker.spec.port for worker in (workers.prefill, *workers.decode)]
    config = log_path.with_suffix(".envoy.yaml")
    config.write_text(envoy_config(gateway.config.read_text(), envoy_port, picker_port, ports))
    url = f"http://127.0.0.1:{envoy_port}"
    async with (
        running_eldr("epp", workers, flags, log_path),
        _running_envoy(gateway.envoy, config, f"{url}/v1/models", log_path.with_suffix(".envoy.log")),
        _coordinating(url, coordinator_port) as coordinator,
    ):
        yield coordinator


@contextlib.asynccontextmanager
async def _running_envoy(program: Path, config: Path, url: str, log_path: Path) -> AsyncIterator[None]:
    flags = ["-c", str(config), "--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"]
    process = start_logged([str(program), *flags], log_path)
    try:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while not await asyncio.to_thread(answers, url):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise GatewayError(f"Envoy did not start.{log_tail(log_path)}")
            await asyncio.sleep(0.1)
        yield
    finally:
        await asyncio.to_thread(end_process, process)


@contextlib.asynccontextmanager
async def _coordinating(gateway: str, port: int) -> AsyncIterator[str]:
    """Play llm-d's coordinator at a port of its own, in front of a gateway. Yields its URL."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        app = web.Application()
        coordinator = _Coordinator(session, gateway + COMPLETIONS)
        app.router.add_post(COMPLETIONS, coordinator.complete)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port).start()
            yield f"http://127.0.0.1:{port}"
        finally:
            await runner.cleanup()


class _Coordinator:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Prefill, then decode with the prefill's transfer parameters, and pass the answer on."""
        body: dict[str, Any] = await request.json()
        headers = {"X-Request-Id": request.headers.get("X-Request-Id", "")}
        params = {"do_remote_decode": True, "do_remote_prefill": False}
        prefill = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": params}
        prefill.pop("stream_options", None)
        async with self._session.post(self._url, json=prefill, headers={**headers, PROFILE: "prefill"}) as answer:
            text = await answer.read()
            if answer.status != 200:
                return web.Response(status=answer.status, body=text, content_type="application/json")
        decode = {**body, "kv_transfer_params": json.loads(text)["kv_transfer_params"]}
        async with self._session.post(self._url, json=decode, headers={**headers, PROFILE: "decode"}) as answer:
            relayed = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await relayed.prepare(request)
            with contextlib.suppress(ConnectionResetError):  # a client needs nothing behind [DONE]
                async for piece in answer.content.iter_any():
                    await relayed.write(piece)
                await relayed.write_eof()
            return relayed
