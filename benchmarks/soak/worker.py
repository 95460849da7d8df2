"""A mock worker of the soak, one process each, so that it can be killed and stopped.

    python benchmarks/soak/worker.py PORT USED_FILE

Prefill and decode in one. The tokens of an answer follow from the prompt, so that a client can check every one; a
hand-off's name goes into USED_FILE when a decode request spends it, so that a second use is found out.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any, cast

import httptools
import numpy as np
import uvloop

from eldr.counts import ExpertCounts, encode_counts

TOKEN_GAP_S = 0.02
LEASE_S = 30.0
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


def token(prompt: str, number: int) -> str:
    """The token of this number in the answer to `prompt`."""
    return f" {prompt}/{number}"


class Worker(asyncio.Protocol):
    """One connection."""

    port = 0
    used = -1
    handoffs = 0
    running = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpRequestParser(self)
        self._task: asyncio.Task[None] | None = None
        self._reset()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()

    def _reset(self) -> None:
        self._url, self._body, self._id = b"", b"", b""

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-request-id":
            self._id = value

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        url, body, request_id = self._url, self._body, self._id.decode()
        self._reset()
        if not url.endswith(b"completions"):
            self._look(url)
        else:
            fields = json.loads(body)
            params = fields.get("kv_transfer_params") or {}
            if params.get("do_remote_decode"):
                self._prefill(request_id)
            else:
                if params:
                    os.write(self.used, params["remote_request_id"].encode() + b"\n")
                self._task = asyncio.get_running_loop().create_task(self._decode(fields, request_id))

    def _look(self, url: bytes) -> None:
        if url == b"/metrics":
            labels = '{engine="0",model_name="soak"}'
            self._reply(f"vllm:num_requests_waiting{labels} 0.0\nvllm:kv_cache_usage_perc{labels} 0.1\n".encode())
        else:
            self._reply(b'{"data":[{"id":"soak"}]}')

    def _prefill(self, request_id: str) -> None:
        Worker.handoffs += 1
        params = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [[self.handoffs]],
            "remote_engine_id": str(self.port),
            "remote_request_id": f"{self.port}-{os.getpid()}-{self.handoffs}",
            "remote_host": "127.0.0.1",
            "remote_port": 5600,
            "tp_size": 1,
            "eldr_counts": COUNTS,
            "eldr_lease": {"left_s": LEASE_S, "unix_s": time.time()},
        }
        answer = self._answer(request_id, [], "")
        self._reply(json.dumps({**answer, "kv_transfer_params": params}).encode())

    def _answer(self, request_id: str, tokens: list[str], prompt: str) -> dict[str, Any]:
        return {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "model": "soak",
            "system_fingerprint": str(self.port),
            "choices": [{"index": 0, "text": "".join(tokens), "finish_reason": "length"}],
            "usage": {"prompt_tokens": 4, "completion_tokens": len(tokens), "total_tokens": 4 + len(tokens)},
        }

    async def _decode(self, fields: dict[str, Any], request_id: str) -> None:
        tokens = [token(fields["prompt"], number) for number in range(fields["max_tokens"])]
        if not fields.get("stream"):
            await asyncio.sleep(TOKEN_GAP_S * len(tokens))
            answer = self._answer(request_id, tokens, fields["prompt"])
            self._reply(json.dumps({**answer, "kv_transfer_params": None}).encode())
            return
        self._transport.write(STREAM_HEAD)
        for text in tokens:
            event = b"data: %b\n\n" % json.dumps(self._answer(request_id, [text], fields["prompt"])).encode()
            self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))
            await asyncio.sleep(TOKEN_GAP_S)
        self._transport.write(DONE)

    def _reply(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self._transport.write(head % len(body) + body)


def _counts() -> dict[str, Any]:
    """Counts of 40 tokens in a model of 24 layers x 32 experts, top-4, drawn anew by every worker process."""
    rng = np.random.default_rng(os.getpid())
    counts = np.zeros((24, 32), np.uint32)
    for layer in counts:
        for _ in range(40):
            layer[rng.choice(32, 4, replace=False)] += 1
    return encode_counts(ExpertCounts(counts, 40, 4))


COUNTS: dict[str, Any] = {}


async def main(port: int, used_path: str) -> None:
    Worker.port = port
    Worker.used = os.open(used_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    await asyncio.get_running_loop().create_server(Worker, "127.0.0.1", port, backlog=1024)
    await asyncio.Event().wait()


if __name__ == "__main__":
    COUNTS.update(_counts())
    uvloop.run(main(int(sys.argv[1]), sys.argv[2]))
