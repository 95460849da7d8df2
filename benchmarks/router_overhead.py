"""CPU time of the router per streamed token and per P/D request, against mock workers: a self-check of the data plane.

    python benchmarks/router_overhead.py [--streams 256] [--tokens 256] [--requests 5000] [--policy jsq]

Mock workers, router and client are processes of their own; only the router's CPU time (user and system, from /proc)
counts, so that a busy machine or a slow mock changes the load but hardly the figures. The mock sends each token as an
event of its own, spread over time as decode steps are, and every prefill answer carries counts of 48 layers x 128
experts for a prompt of 500 tokens, so that hand-off and counts are those of a real model.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import httptools
import numpy as np
import uvloop

from eldr.counts import ExpertCounts, encode_counts
from eldr.router.app import Router, build_policy
from eldr.router.config import RouterConfig

PROMPT_TOKENS, LAYERS, EXPERTS, TOP_K = 500, 48, 128, 8
CONNECTIONS = 32
PROMPT = "What the prompt of a real request looks like, more or less. " * 30
EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1790000000,'
    b'"model":"mock","choices":[{"index":0,"text":" token","logprobs":null,"finish_reason":null,"stop_reason":null}],'
    b'"usage":null}\n\n'
)
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def handoff() -> bytes:
    rng = np.random.default_rng(0)
    counts = np.zeros((LAYERS, EXPERTS), np.uint32)
    for layer in counts:
        liking = rng.dirichlet(np.full(EXPERTS, 0.3))
        chosen = np.argpartition(rng.gumbel(size=(PROMPT_TOKENS, EXPERTS)) + np.log(liking), -TOP_K)[:, -TOP_K:]
        np.add.at(layer, chosen, 1)
    params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [list(range(PROMPT_TOKENS // 16))],
        "remote_engine_id": "0123456789abcdef",
        "remote_request_id": "cmpl-0123456789abcdef-0",
        "remote_host": "127.0.0.1",
        "remote_port": 5600,
        "tp_size": 1,
        "eldr_counts": encode_counts(ExpertCounts(counts, PROMPT_TOKENS, TOP_K)),
        "eldr_lease": {"left_s": 30.0, "unix_s": time.time() + 3600},
    }
    answer = {"choices": [{"text": "a"}], "usage": {"prompt_tokens": PROMPT_TOKENS}, "kv_transfer_params": params}
    return json.dumps(answer).encode()


def whole(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


MODELS = whole(b'{"data":[{"id":"mock"}]}')
ANSWER = whole(b'{"choices":[{"text":" token"}],"usage":{},"kv_transfer_params":null}')


class MockWorker(asyncio.Protocol):
    """Prefill and decode worker in one."""

    handoff = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""
        self._url = b""

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        body, self._body = self._body, b""
        if not self._url.endswith(b"completions"):
            self._transport.write(MODELS)
        elif b'"do_remote_decode":true' in body:
            self._transport.write(self.handoff)
        elif b'"stream":true' in body:
            fields = json.loads(body)
            self._transport.write(STREAM_HEAD)
            self._left, self._gap_s = fields["max_tokens"], fields["user_gap_s"]
            self._loop = asyncio.get_running_loop()
            self._due = self._loop.time()
            self._token()
        else:
            self._transport.write(ANSWER)

    def _token(self) -> None:
        self._transport.write(CHUNK)
        self._left -= 1
        if self._left == 0:
            self._transport.write(DONE)
            return
        self._due += self._gap_s
        self._loop.call_at(self._due, self._token)


def run_mock(ports: list[int], ready: Connection) -> None:
    async def main() -> None:
        MockWorker.handoff = whole(handoff())
        loop = asyncio.get_running_loop()
        for port in ports:
            await loop.create_server(MockWorker, "127.0.0.1", port, backlog=4096)
        ready.send(None)
        await asyncio.Event().wait()

    uvloop.run(main())


def run_router(config: RouterConfig, ready: Connection) -> None:
    async def main() -> None:
        await Router(config, build_policy(config)).start()
        ready.send(None)
        await asyncio.Event().wait()

    uvloop.run(main())


class Client(asyncio.Protocol):
    """Sends one request after the other and counts what comes back."""

    def __init__(self, request: bytes, end: bytes, count: int) -> None:
        self._request, self._end, self._left = request, end, count
        self.tail = b""
        self.bytes = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.bytes += len(data)
        self.tail = (self.tail + data)[-64:]
        if self.tail.endswith(self._end):
            self.tail = b""
            self._left -= 1
            if self._left:
                self._transport.write(self._request)
            else:
                self._transport.close()
                self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"the router closed: {self.tail!r}"))


def request(fields: dict[str, Any]) -> bytes:
    body = json.dumps({"model": "mock", "prompt": PROMPT, **fields}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


async def load(port: int, data: bytes, end: bytes, connections: int, each: int) -> int:
    """Run `connections` clients of `each` requests; the bytes received."""
    loop = asyncio.get_running_loop()
    clients = [Client(data, end, each) for _ in range(connections)]
    for client in clients:
        await loop.create_connection(functools.partial(_same, client), "127.0.0.1", port)
    await asyncio.gather(*(client.done for client in clients))
    return sum(client.bytes for client in clients)


def _same(client: Client) -> Client:
    return client


def cpu_s(pid: int) -> float:
    """User and system time of a process, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rate", type=float, default=30.0, help="tokens per second of one stream")
    parser.add_argument("--requests", type=int, default=5000, help="rounded to whole requests per connection")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--policy", default="jsq")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--port", type=int, default=23900, help="first of a range of free ports")
    args = parser.parse_args()
    ports = list(range(args.port + 1, args.port + 3 + args.workers))
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    config = RouterConfig(
        prefill=tuple(urls[:2]),
        decode=tuple(urls[2:]),
        port=args.port,
        policy=args.policy,
        calibration=args.calibration,
    )
    ours, theirs = multiprocessing.Pipe()
    mock = multiprocessing.Process(target=run_mock, args=(ports, theirs), daemon=True)
    router = multiprocessing.Process(target=run_router, args=(config, theirs), daemon=True)
    try:
        for process in (mock, router):
            process.start()
            ours.recv()
        assert router.pid is not None
        print(json.dumps(measure(args, router.pid), indent=1))
    finally:
        for process in (router, mock):
            process.terminate()
            process.join()


def measure(args: argparse.Namespace, pid: int) -> dict[str, float]:
    single = request({"max_tokens": 1})
    stream = request({"max_tokens": args.tokens, "stream": True, "user_gap_s": 1 / args.rate})
    uvloop.run(load(args.port, single, b"null}", 8, 50))  # warm

    before, started = cpu_s(pid), time.perf_counter()
    each = max(1, args.requests // CONNECTIONS)
    uvloop.run(load(args.port, single, b"null}", CONNECTIONS, each))
    wall_s = time.perf_counter() - started
    per_request_s = (cpu_s(pid) - before) / (each * CONNECTIONS)

    before, started = cpu_s(pid), time.perf_counter()
    received = uvloop.run(load(args.port, stream, b"0\r\n\r\n", args.streams, 1))
    stream_wall_s = time.perf_counter() - started
    tokens = args.streams * args.tokens
    assert received > tokens * len(EVENT)
    streaming_s = cpu_s(pid) - before - args.streams * per_request_s
    return {
        "cpu_ms_per_request": round(per_request_s * 1e3, 4),
        "requests_per_s": round(each * CONNECTIONS / wall_s, 1),
        "cpu_s_per_million_tokens": round(streaming_s / tokens * 1e6, 2),
        "tokens_per_s": round(tokens / stream_wall_s, 1),
        "peak_memory_mib": round(peak_mib(pid), 1),
    }


if __name__ == "__main__":
    main()
