"""The router as a process: how it ends, what it reads again, and how it hands its sockets over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any, TypeVar

import aiohttp
import pytest

from eldr.router.app import Router
from eldr.router.config.settings import RouterConfig
from tests.router.fake_worker import FakeWorker, Seen, begin_stream
from tests.router.harness import ASK, CHAT, Scripted, on_uvloop, running, until


def request_bytes(prompt: str, close: bool = False, **fields: Any) -> bytes:
    body = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": 4, **fields}).encode()
    connection = b"connection: close\r\n" if close else b""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n"
    return head % (connection, len(body)) + body


# Ending.


@on_uvloop
async def test_a_stopping_router_tells_streams_and_waiting_clients_why() -> None:
    async with running(max_inflight=2, queue_timeout_s=60) as s:
        worker = s.decode[0]
        worker.tokens, worker.token_gap_s = ["x"] * 1000, 0.02
        reader, writer = await asyncio.open_connection("127.0.0.1", s.router.port)
        writer.write(request_bytes("a", stream=True, max_tokens=1000))
        first = await reader.readuntil(b'"text":"x"')
        whole = asyncio.create_task(s.post({**ASK, "max_tokens": 1000}))
        await until(lambda: worker.running == 2, "both run")
        queued = asyncio.create_task(s.post())
        await until(lambda: s.router.services.admission.queued == 1, "one waits")
        await s.router.stop(0.3)
        raw = first + await reader.read()
        writer.close()
        assert json.loads(raw.rstrip().rsplit(b"data: ", 1)[1])["error"]["message"] == "the router is shutting down"
        assert b"[DONE]" not in raw
        assert not raw.endswith(b"0\r\n\r\n")
        for task in (whole, queued):
            answer = await task
            assert (answer.status, answer.headers["connection"]) == (503, "close")
            assert int(answer.headers["retry-after"]) > 0
        await until(lambda: all(seen.aborted for seen in worker.generated), "the worker hears of it")


@on_uvloop
async def test_a_client_with_an_open_connection_may_send_one_more() -> None:
    async with running() as s:
        reader, writer = await asyncio.open_connection("127.0.0.1", s.router.port)
        writer.write(request_bytes("a"))
        await reader.readuntil(b'"kv_transfer_params":null}')
        stopping = asyncio.create_task(s.router.stop(20))
        await until(lambda: s.router.closing, "it stops")
        writer.write(request_bytes("b"))
        answer = await reader.read()
        assert b"200 OK" in answer
        assert b"connection: close" in answer
        await stopping


@on_uvloop
async def test_readiness_ends_before_the_last_request() -> None:
    async with running() as s:
        s.decode[0].tokens, s.decode[0].token_gap_s = ["x"] * 8, 0.1
        reader, writer = await asyncio.open_connection("127.0.0.1", s.router.port)
        task = asyncio.create_task(s.chat({**CHAT, "max_tokens": 8, "stream": True}))
        await until(lambda: s.decode[0].running == 1, "it runs")
        stopping = asyncio.create_task(s.router.stop(20))
        await until(lambda: s.router.closing, "it stops")
        writer.write(b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b" 503 " in (await reader.readuntil(b"\r\n"))
        assert (await task).events[-1] == "data: [DONE]"
        await stopping


@on_uvloop
async def test_a_router_that_ends_serves_until_load_balancers_know() -> None:
    async with running() as s:
        stopping = asyncio.create_task(s.router.stop(20, 2))
        await until(lambda: s.router.closing, "it ends")
        async with aiohttp.ClientSession() as fresh:
            async with fresh.get(s.url + "/ready") as answer:
                assert (answer.status, answer.headers["connection"]) == (503, "close")
            async with fresh.get(s.url + "/health") as answer:
                assert answer.status == 200
            async with fresh.post(s.url + "/v1/completions", json={**ASK, "stream": True}) as answer:
                assert (answer.status, answer.headers["connection"]) == (200, "close")
                assert (await answer.read()).endswith(b"data: [DONE]\n\n")
        assert not stopping.done()
        port = s.router.port
        await stopping
        with pytest.raises(OSError, match="refused"):
            await asyncio.open_connection("127.0.0.1", port)


# Reading again.


@on_uvloop
async def test_reload_takes_over_keys_and_what_can_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    workers = [await FakeWorker(role).start() for role in ("prefill", "decode")]
    file, key = tmp_path / "eldr.toml", tmp_path / "key"
    key.write_text("old")
    lists = "".join(f"{w.role} = [{json.dumps(w.url)}]\n" for w in workers)
    file.write_text(lists + "max_inflight = 8\n")
    load = partial(RouterConfig.load, file, {"port": 0, "admin_key_file": key})
    router = Router(load(), lambda group: Scripted(), (file, load))
    await router.start()
    try:
        key.write_text("new")
        file.write_text(lists + 'max_inflight = 3\ngrace_s = 1\nlog_level = "info"\npolicy = "rr"\nport = 1\n')
        router.reload()
        await until(lambda: router.services.fleet.decode_slots == 3, "the limit is taken over")
        assert router.admin_key.is_in({b"authorization": b"Bearer new"})
        assert router.services.config.timeouts.grace_s == 1
        said = [record.getMessage() for record in caplog.records]
        assert any("policy" in text and "new process" in text for text in said)
        key.write_text("two words")
        router.reload()
        assert router.admin_key.is_in({b"authorization": b"Bearer new"})
        assert "stays in use" in caplog.text
        assert len(router.membership.workers()) == 2
    finally:
        for worker in workers:
            await worker.stop()
        await router.stop(0)


# Processes.


Result = TypeVar("Result")


class Workers:
    """Fake workers on an event loop of their own thread, so that the test may block."""

    def __init__(self, decode: type[Any] = FakeWorker) -> None:
        self._decode = decode
        self.all: list[FakeWorker] = []

    def __enter__(self) -> Workers:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        made = (FakeWorker("prefill"), self._decode("decode"), self._decode("decode"))
        self.all = [self._do(worker.start()) for worker in made]
        return self

    def _do(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def __exit__(self, *exc: Any) -> None:
        for worker in self.all:
            self._do(worker.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @property
    def flags(self) -> list[str]:
        return [part for worker in self.all for part in (f"--{worker.role}", worker.url)]


def serve(workers: Workers, *flags: Any, **options: Any) -> Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "eldr", "serve", "--port", "0", "--log-level", "info", *workers.flags, *flags],
        stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def port_of(process: Popen[str]) -> int:
    for line in process.stderr:
        if line.startswith("eldr: serving on "):
            return int(line.split(",")[0].rsplit(":", 1)[1])
    raise AssertionError("it did not start")


def successor_of(process: Popen[str]) -> int:
    """The process id of the next router, from the log of the one before."""
    for line in process.stderr:
        if "has taken over" in line:
            return int(line.split("process ")[1].split()[0])
    raise AssertionError("there is none")


class Clients:
    """Threads that ask without a pause, half of them on one connection each, until told to stop."""

    def __init__(self, port: int, count: int = 6) -> None:
        self._port = port
        self._stop = threading.Event()
        self.answered = [0] * count
        self.failed: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        reused = None
        while not self._stop.is_set():
            try:
                if number % 2:
                    reused = reused or socket.create_connection(("127.0.0.1", self._port), 30)
                    closing = self._ask(reused, request_bytes(f"{number}", stream=number % 3 == 0))
                    if closing:
                        reused.close()
                        reused = None
                else:
                    with socket.create_connection(("127.0.0.1", self._port), 30) as fresh:
                        self._ask(fresh, request_bytes(f"{number}", stream=number % 3 == 0, close=True))
                self.answered[number] += 1
            except (OSError, AssertionError) as error:
                self.failed.append(repr(error))
                reused = None
        if reused is not None:
            reused.close()

    def _ask(self, connection: socket.socket, request: bytes) -> bool:
        connection.settimeout(30)
        connection.sendall(request)
        raw = b""
        while not raw.endswith((b"0\r\n\r\n", b'"kv_transfer_params":null}')):
            data = connection.recv(65536)
            assert data, f"closed after {raw!r}"
            raw += data
        assert raw.startswith(b"HTTP/1.1 200 "), raw
        return b"\r\nconnection: close\r\n" in raw

    def join(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def wait_for(condition: Callable[..., Any], what: str, timeout_s: int = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        time.sleep(0.01)


def end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_a_router_hands_over_to_its_successor_without_losing_a_request() -> None:
    with Workers() as workers:
        process = serve(workers)
        pids = [process.pid]
        clients = None
        try:
            port = port_of(process)
            clients = Clients(port)
            for _ in range(2):
                before = list(clients.answered)
                wait_for(lambda before=before: all(n > b + 3 for n, b in zip(clients.answered, before, strict=True)),
                         "everybody is served")  # fmt: skip
                os.kill(pids[-1], signal.SIGUSR2)
                pids.append(successor_of(process))
            assert process.wait(60) == 0
            before = list(clients.answered)
            wait_for(lambda: all(n > b + 3 for n, b in zip(clients.answered, before, strict=True)), "all are served")
            clients.join()
            assert clients.failed == []
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10) as answer:
                assert answer.status == 200
        finally:
            if clients is not None:
                clients.join()
            for pid in pids:
                end(pid)
            process.stderr.close()
            process.wait()


def test_a_successor_that_cannot_serve_changes_nothing(tmp_path: Path) -> None:
    with Workers() as workers:
        file = tmp_path / "eldr.toml"
        file.write_text('policy = "jsq"\n')
        process = serve(workers, "--config", str(file))
        try:
            port = port_of(process)
            file.write_text('policy = "none such"\n')
            process.send_signal(signal.SIGUSR2)
            for line in process.stderr:
                if "this process continues" in line:
                    break
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10) as answer:
                assert answer.status == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            end(process.pid)
            process.stderr.close()
            process.wait()


def test_a_socket_of_systemds_keeps_requests_while_the_router_restarts() -> None:
    with Workers() as workers, socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        address = listening.getsockname()

        def start() -> Popen[str]:
            return serve(
                workers,
                env={**os.environ, "LISTEN_FDS": "1"},
                pass_fds=(3,),
                preexec_fn=lambda: os.dup2(listening.fileno(), 3),
            )

        process = start()
        try:
            assert port_of(process) == address[1]
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            process.stderr.close()
            waiting = [socket.create_connection(address, 30) for _ in range(8)]
            for client in waiting:
                client.sendall(request_bytes("x", close=True))
            process = start()
            for client in waiting:
                with client, client.makefile("rb") as answer:
                    assert answer.readline().startswith(b"HTTP/1.1 200 ")
        finally:
            end(process.pid)
            process.stderr.close()
            process.wait()


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_end_is_delayed_after_sigterm_alone_and_a_second_one_waits_for_nothing(
    tmp_path: Path, first: signal.Signals
) -> None:
    file = tmp_path / "eldr.toml"
    file.write_text("shutdown_delay_s = 600\n")
    with Workers() as workers:
        process = serve(workers, "--config", str(file))
        try:
            port = port_of(process)
            process.send_signal(first)
            if first is signal.SIGTERM:
                wait_for(lambda: ready_status(port) == 503, "it is not ready")
                process.send_signal(first)
            assert process.wait(60) == 0
        finally:
            end(process.pid)
            process.stderr.close()
            process.wait()


def ready_status(port: int) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


# A thousand clients that do not read.

READERS = 1000
BATCHES = 600


class Flood(FakeWorker):
    """A decode worker that sends as fast as it is read from, 2 MB a stream, and does not look whether it is heard."""

    streams = 0
    sent_bytes = 0

    async def _generate(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        event = self.events(seen, ["x" * 200, "y"], False)[0]
        batch = b"%x\r\n%b\r\n" % (len(event) * 12, event * 12)
        # Little room in the kernel, so that what is held is held by the router.
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
        await begin_stream(writer)
        self.streams += 1
        for _ in range(BATCHES):
            writer.write(batch)
            await writer.drain()
            self.sent_bytes += len(batch)


def rss_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_thousand_stalled_readers_hold_little_memory(tmp_path: Path) -> None:
    """What is buffered is bounded per client, and the workers are not read from."""
    with Workers(Flood) as workers:
        flood = [worker for worker in workers.all if isinstance(worker, Flood)]
        patient = tmp_path / "eldr.toml"  # the machine may be busy, and all workers share one thread
        patient.write_text("max_inflight = 2048\nconnect_timeout_s = 60\nhealth_timeout_s = 60\n")
        process = serve(workers, "--config", str(patient))
        stalled = []
        try:
            port = port_of(process)
            before_bytes = rss_bytes(process.pid)
            for number in range(READERS):
                client = socket.socket()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect(("127.0.0.1", port))
                client.sendall(request_bytes(f"{number}", stream=True, max_tokens=10**6))
                stalled.append(client)
                if len(stalled) % 50 == 0:
                    wait_for(lambda: sum(worker.streams for worker in flood) >= len(stalled), "all stream")
            sent_bytes, still = -1, 0
            while still < 3:  # until nothing moves any more
                now_bytes = sum(worker.sent_bytes for worker in flood)
                sent_bytes, still = now_bytes, still + 1 if now_bytes == sent_bytes else 0
                time.sleep(0.3)
            assert sent_bytes < READERS * BATCHES * 12 * 280 / 2
            grown_bytes = rss_bytes(process.pid) - before_bytes
            print(f"{grown_bytes / READERS / 1024:.0f} KiB a stalled reader, {grown_bytes / 2**20:.0f} MiB in all")
            assert grown_bytes < 250 * 2**20
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10) as answer:
                assert answer.status == 200
        finally:
            for client in stalled:
                client.close()
            end(process.pid)
            process.stderr.close()
            process.wait()
