"""The files in examples/, each with its real proxy: TLS and HTTP/2 towards clients, the router behind it.

A proxy that is not here is skipped; ELDR_ENVOY, ELDR_NGINX and ELDR_HAPROXY name programs that are not on the PATH.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import httpx2
import openai
import pytest

from eldr.demo.ports import free_ports
from tests.router.certificates import certificate
from tests.router.fake_worker import FakeWorker, Seen, begin_stream, chunk, end_stream, reply
from tests.router.harness import ASK, Setup, on_uvloop, running, until

EXAMPLES = Path(__file__).parents[3] / "examples"
STREAM = {**ASK, "stream": True}


@dataclass(frozen=True)
class Proxy:
    """One of the examples.

    flags: of its program; CONFIG stands for the configuration's path. changes: of its text, for the test; FOLDER stands
    for the test's folder, ADDRESS for an address that is free. router: the part that names one router at PORT.
    """

    file: str
    flags: tuple[str, ...]
    changes: dict[str, str]
    router: str

    @property
    def name(self) -> str:
        return self.file.partition(".")[0]

    def program(self) -> str:
        found = os.environ.get(f"ELDR_{self.name.upper()}") or shutil.which(self.name)
        if found is None:
            pytest.skip(f"no {self.name}: install it, or name its program in ELDR_{self.name.upper()}")
        return found

    def configure(self, folder: Path, routers: list[int]) -> tuple[Path, int, Path]:
        """The example with this test's addresses and certificate; the port for clients; who signed the certificate."""
        cert, key = certificate(folder, "edge")
        (folder / "both.pem").write_bytes(cert.read_bytes() + key.read_bytes())
        port, spare_port = free_ports(2)
        text = (EXAMPLES / self.file).read_text()
        routers_text = "".join(self.router.replace("PORT", str(number)) for number in routers)
        changes = {**self.changes, self.router.replace("PORT", "8000"): routers_text}
        for old, new in changes.items():
            assert text.count(old) == 1, old
            new = new.replace("FOLDER", str(folder)).replace("SPARE", str(spare_port)).replace("FRONT", str(port))
            text = text.replace(old, new)
        path = folder / self.file
        path.write_text(text)
        return path, port, cert


ENVOY = Proxy(
    "envoy.yaml",
    ("-c", "CONFIG", "--disable-hot-restart", "--concurrency", "1", "--log-level", "error"),
    {
        "{address: 0.0.0.0, port_value: 8443}": "{address: 127.0.0.1, port_value: FRONT}",
        "{address: 127.0.0.1, port_value: 9901}": "{address: 127.0.0.1, port_value: SPARE}",
        "/etc/envoy/tls.pem": "FOLDER/edge.pem",
        "/etc/envoy/tls.key": "FOLDER/edge.key",
        # Probes come fast here, for the test's sake.
        " interval: 2s": " interval: 0.1s",
        "no_traffic_interval: 2s": "no_traffic_interval: 0.1s",
    },
    """\
              - endpoint:
                  address:
                    socket_address: {address: 127.0.0.1, port_value: PORT}
""",
)
NGINX = Proxy(
    "nginx.conf",
    ("-c", "CONFIG", "-g", "daemon off;", "-e", "stderr"),
    {
        "listen 0.0.0.0:8443": "listen 127.0.0.1:FRONT",
        "/etc/nginx/tls.pem": "FOLDER/edge.pem",
        "/etc/nginx/tls.key": "FOLDER/edge.key",
        "worker_processes auto;": "worker_processes 1; pid FOLDER/pid;",
        # Where it may write without being root.
        "http {\n": "http {\n"
        + "".join(f"{kind}_temp_path FOLDER;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")),
    },
    "        server 127.0.0.1:PORT;\n",
)
HAPROXY = Proxy(
    "haproxy.cfg",
    ("-db", "-f", "CONFIG"),
    {
        "bind 0.0.0.0:8443": "bind 127.0.0.1:FRONT",
        "/etc/haproxy/tls.pem": "FOLDER/both.pem",
        "inter 2s": "inter 100ms",
        "maxconn 32768": "maxconn 256",
    },
    "    server s-PORT 127.0.0.1:PORT\n",
)
every_proxy = pytest.mark.parametrize("proxy", [ENVOY, NGINX, HAPROXY], ids=lambda proxy: proxy.name)


@asynccontextmanager
async def edge(proxy: Proxy, folder: Path, *routers: Setup) -> AsyncIterator[httpx2.AsyncClient]:
    """The proxy in front of these routers, and a client of it that speaks HTTP/2."""
    program = proxy.program()
    config, port, cert = proxy.configure(folder, [s.router.port for s in routers])
    flags = [flag.replace("CONFIG", str(config)) for flag in proxy.flags]
    process = await asyncio.create_subprocess_exec(
        program, *flags, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    trust = ssl.create_default_context(cafile=cert)
    try:
        async with httpx2.AsyncClient(
            base_url=f"https://127.0.0.1:{port}", http2=True, http1=False, verify=trust, timeout=30
        ) as client:
            while True:
                assert process.returncode is None, f"{proxy.name} ended"
                try:
                    if (await client.get("/v1/models")).status_code == 200:
                        break
                except httpx2.TransportError:
                    await asyncio.sleep(0.05)
            yield client
    finally:
        process.terminate()
        await process.wait()


@every_proxy
@on_uvloop
async def test_a_stream_arrives_event_by_event_over_http_2(proxy: Proxy, tmp_path: Path) -> None:
    """The worker goes on only when its client has what came before: who buffers anything waits for ever."""
    heard = asyncio.Semaphore(1)

    async def waits_for_its_client(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await begin_stream(writer)
        for event in worker.events(seen, worker.tokens, chat=True):
            await heard.acquire()
            await chunk(writer, event)
        await end_stream(writer)

    async with running() as s, edge(proxy, tmp_path, s) as client:
        s.decode[0].behaviour = waits_for_its_client
        user = openai.AsyncOpenAI(base_url=f"{client.base_url}/v1", api_key="x", http_client=client, max_retries=0)
        text = ""
        messages: Any = [{"role": "user", "content": "hello"}]
        stream = await user.chat.completions.create(model="tiny", messages=messages, max_tokens=4, stream=True)
        assert stream.response.http_version == "HTTP/2"
        async for event in stream:
            text += event.choices[0].delta.content or ""
            heard.release()
        assert text == "abcd"


@every_proxy
@on_uvloop
async def test_headers_end_where_they_should(proxy: Proxy, tmp_path: Path) -> None:
    hostile = {"x-forwarded-for": "10.9.8.7", "x-envoy-retry-on": "5xx", "x-envoy-max-retries": "5"}
    if proxy is ENVOY:  # towards the others a client shortens its own request with it, and nobody else's
        hostile |= {"x-envoy-upstream-rq-timeout-ms": "1", "x-envoy-expected-rq-timeout-ms": "1"}
    async with running(retries=0) as s, edge(proxy, tmp_path, s) as client:
        answer = await client.post("/v1/completions", json=ASK, headers={"x-request-id": "mine-1", **hostile})
        assert (answer.status_code, answer.headers["x-request-id"]) == (200, "mine-1")
        assert not [name for name in answer.headers if name.startswith("x-envoy")]
        for worker in (*s.prefill, *s.decode):
            seen = worker.generated[-1].headers
            assert seen["x-request-id"].startswith("mine-1")
            assert not [name for name in seen if name.startswith(("x-forwarded", "x-envoy", "forwarded"))]
        made_up = (await client.post("/v1/completions", json=ASK)).headers["x-request-id"]
        assert len(made_up) == (36 if proxy is ENVOY else 32)  # Envoy's, else the router's
        for path in ("/metrics", "/health", "/ready", "/admin/workers", "/v1/%2e%2e/metrics", "/v1//../metrics"):
            assert (await client.get(path)).status_code in (400, 404), path

        async def fails(
            worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            await reply(writer, 500, b'{"error":{"message":"no","code":500}}')

        before = await s.metric("eldr_handoffs_total")
        s.decode[0].behaviour = fails
        assert (await client.post("/v1/completions", json=ASK, headers=hostile)).status_code == 500
        assert await s.metric("eldr_handoffs_total") == before + 1  # nobody tried again


async def leave_a_stream(port: int | None, trusted: Path) -> None:
    """Ask for a stream, and reset it at its first byte, as browsers do; httpx leaves its streams without a word."""
    context = ssl.create_default_context(cafile=trusted)
    context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    http.initiate_connection()
    target = [(":method", "POST"), (":path", "/v1/completions"), (":authority", "x"), (":scheme", "https")]
    http.send_headers(1, [*target, ("content-type", "application/json")])
    http.send_data(1, json.dumps(STREAM).encode(), end_stream=True)
    began = False
    while not began:
        writer.write(http.data_to_send())
        began = any(isinstance(event, h2.events.DataReceived) for event in http.receive_data(await reader.read(65536)))
    http.reset_stream(1, h2.errors.ErrorCodes.CANCEL)
    writer.write(http.data_to_send())
    await writer.drain()


@every_proxy
@on_uvloop
async def test_requests_share_connections_and_a_client_that_leaves_frees_its_worker(
    proxy: Proxy, tmp_path: Path
) -> None:
    async with running() as s, edge(proxy, tmp_path, s) as client:
        for _ in range(20):
            assert (await client.post("/v1/completions", json=ASK)).status_code == 200
        # One of requests, one of probes; another of each in passing.
        assert len(s.router.connections) <= 4
        s.decode[0].token_gap_s = 60
        await leave_a_stream(client.base_url.port, tmp_path / "edge.pem")
        await until(lambda: s.decode[0].generated[-1].aborted, "the worker hears of it")
        s.decode[0].token_gap_s = 0
        assert (await client.post("/v1/completions", json=ASK)).status_code == 200


@every_proxy
@on_uvloop
async def test_a_stream_that_breaks_does_not_end_well(proxy: Proxy, tmp_path: Path) -> None:
    async def breaks_off(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await begin_stream(writer)
        await chunk(writer, worker.events(seen, worker.tokens, chat=False)[0])
        writer.transport.abort()

    async with running() as s, edge(proxy, tmp_path, s) as client:
        s.decode[0].behaviour = breaks_off
        received, whole = b"", False
        async with client.stream("POST", "/v1/completions", json=STREAM) as answer:
            with contextlib.suppress(httpx2.RemoteProtocolError):
                async for data in answer.aiter_bytes():
                    received += data
                whole = True
        assert not whole or proxy is HAPROXY  # which passes a break on over HTTP/1.1 alone; the error event is there
        events = received.decode().split("\n\n")
        assert json.loads(events[1].removeprefix("data: "))["error"]["code"] == 502
        assert "[DONE]" not in received.decode()


@pytest.mark.parametrize("proxy", [ENVOY, HAPROXY], ids=lambda proxy: proxy.name)
@on_uvloop
async def test_a_router_that_is_not_ready_gets_nothing(proxy: Proxy, tmp_path: Path) -> None:
    async with (
        running(worker_wait_s=0.05) as one,
        running(worker_wait_s=0.05) as other,
        edge(proxy, tmp_path, one, other) as client,
    ):

        async def ask_until(condition: Callable[[], bool]) -> None:
            while not condition():
                await client.post("/v1/completions", json=ASK)

        await ask_until(lambda: bool(one.decode[0].generated and other.decode[0].generated))
        other.decode[0].healthy = False
        await until(lambda: not other.router.services.fleet.ready, "the router notices")
        in_a_row = 0
        while in_a_row < 40:  # once Envoy has noticed too
            in_a_row = in_a_row + 1 if (await client.post("/v1/completions", json=ASK)).status_code == 200 else 0
        one.decode[0].healthy = False
        await until(lambda: not one.router.services.fleet.ready, "the last router notices")
        answer = await client.post("/v1/completions", json=ASK)
        while answer.status_code == 200:
            answer = await client.post("/v1/completions", json=ASK)
        assert answer.json()["error"]["message"] == "no decode worker is available"
        assert "retry-after" in answer.headers
