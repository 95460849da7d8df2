"""A mock worker, one process each, so that it can be killed and stopped.

    python benchmarks/soak/worker.py ROLE PORT USED_FILE

ROLE is prefill or decode. The tokens of an answer follow from the prompt, so that a client can check every one; a
hand-off's name goes into USED_FILE when a decode request spends it, so that a second use is found out. Hand-offs are
those of vLLM's NIXL connector; requests of sglang's kind, which go to both workers at once, are answered as sglang
answers them. SIGUSR1 makes the worker answer completions with status 500, SIGUSR2 makes it slow; a second one ends
that.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
import zlib
from dataclasses import dataclass
from typing import Any, cast

import httptools
import numpy as np
import uvloop

from eldr.counts import ExpertCounts, encode_counts

MODEL = "mock"
PREFILL_S = 0.05
TOKEN_GAP_S = 0.02
SLOWER = 10.0
LEASE_S = 30.0
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
# sglang-router asks for more than the names of the models.
INFO = {"data": [{"id": MODEL}], "model_path": MODEL, "served_model_name": MODEL, "is_generation": True, "dp_size": 1}
FAILURE = {"error": {"message": "the engine failed", "type": "InternalServerError", "code": 500}}


def token(prompt: str, number: int) -> str:
    """The token of this number in the answer to `prompt`."""
    return f" {zlib.crc32(prompt.encode()):08x}/{number}"


@dataclass
class Behaviour:
    """What the whole process does. handoffs: given out so far."""

    role: str = "decode"
    port: int = 0
    used: int = -1
    handoffs: int = 0
    fails: bool = False
    slow: bool = False

    def toggle(self, name: str) -> None:
        setattr(self, name, not getattr(self, name))

    async def work(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s * (SLOWER if self.slow else 1.0))


@dataclass(frozen=True)
class Question:
    """A completion or chat request as it came."""

    fields: dict[str, Any]
    chat: bool
    request_id: str

    @property
    def tokens(self) -> list[str]:
        limit = self.fields.get("max_completion_tokens") or self.fields.get("max_tokens") or 16
        prompt = str(self.fields["messages"][-1]["content"] if self.chat else self.fields["prompt"])
        return [token(prompt, number) for number in range(limit)]

    @property
    def wants_usage(self) -> bool:
        return bool((self.fields.get("stream_options") or {}).get("include_usage"))

    def answer(self, text: str, finish: str | None, port: int) -> dict[str, Any]:
        """The fields of a whole answer or of an event."""
        kind = "delta" if self.fields.get("stream") else "message"
        said = {kind: {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.request_id}",
            "object": f"{'chat.completion' if self.chat else 'text_completion'}{'.chunk' if kind == 'delta' else ''}",
            "created": int(time.time()),
            "model": MODEL,
            "system_fingerprint": str(port),
            "choices": [{"index": 0, **said, "finish_reason": finish}],
        }


class Worker(asyncio.Protocol):
    """One connection."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour

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
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._transport.abort()  # sglang-router tries whether the worker speaks gRPC

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
        elif self._behaviour.fails:
            self._reply(json.dumps(FAILURE).encode(), b"500 Internal Server Error")
        else:
            question = Question(json.loads(body), url.endswith(b"/chat/completions"), request_id)
            serve = self._prefill if self._behaviour.role == "prefill" else self._decode
            self._task = asyncio.get_running_loop().create_task(serve(question))

    def _look(self, url: bytes) -> None:
        if url == b"/metrics":
            labels = '{engine="0",model_name="mock"}'
            self._reply(f"vllm:num_requests_waiting{labels} 0.0\nvllm:kv_cache_usage_perc{labels} 0.1\n".encode())
        else:
            self._reply(json.dumps(INFO).encode())

    async def _prefill(self, question: Question) -> None:
        await self._behaviour.work(PREFILL_S)
        params = question.fields.get("kv_transfer_params") or {}
        if params.get("do_remote_decode"):
            self._whole(question, question.tokens[:1], self._handoff())
        else:
            await self._answer(question, question.tokens[:1], 0.0)

    def _handoff(self) -> dict[str, Any]:
        behaviour = self._behaviour
        behaviour.handoffs += 1
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [[behaviour.handoffs]],
            "remote_engine_id": str(behaviour.port),
            "remote_request_id": f"{behaviour.port}-{os.getpid()}-{behaviour.handoffs}",
            "remote_host": "127.0.0.1",
            "remote_port": 5600,
            "tp_size": 1,
            "eldr_counts": COUNTS,
            "eldr_lease": {"left_s": LEASE_S, "unix_s": time.time()},
        }

    async def _decode(self, question: Question) -> None:
        if params := question.fields.get("kv_transfer_params"):
            os.write(self._behaviour.used, params["remote_request_id"].encode() + b"\n")
        elif "bootstrap_room" in question.fields:
            await asyncio.sleep(PREFILL_S)  # the prefill runs at the same time
        await self._answer(question, question.tokens, TOKEN_GAP_S)

    async def _answer(self, question: Question, tokens: list[str], gap_s: float) -> None:
        if not question.fields.get("stream"):
            await self._behaviour.work(gap_s * len(tokens))
            self._whole(question, tokens, None)
            return
        self._transport.write(STREAM_HEAD)
        for number, text in enumerate(tokens, 1):
            self._event(question.answer(text, "length" if number == len(tokens) else None, self._behaviour.port))
            await self._behaviour.work(gap_s)
        if question.wants_usage:
            self._event({**question.answer("", None, self._behaviour.port), "choices": [], "usage": _usage(tokens)})
        self._transport.write(DONE)

    def _event(self, fields: dict[str, Any]) -> None:
        event = b"data: %b\n\n" % json.dumps(fields, separators=(",", ":")).encode()
        self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))

    def _whole(self, question: Question, tokens: list[str], params: dict[str, Any] | None) -> None:
        answer = question.answer("".join(tokens), "length", self._behaviour.port)
        self._reply(json.dumps({**answer, "usage": _usage(tokens), "kv_transfer_params": params}).encode())

    def _reply(self, body: bytes, status: bytes = b"200 OK") -> None:
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self._transport.write(head % (status, len(body)) + body)


def _usage(tokens: list[str]) -> dict[str, int]:
    return {"prompt_tokens": 4, "completion_tokens": len(tokens), "total_tokens": 4 + len(tokens)}


def _counts() -> dict[str, Any]:
    """Counts of 40 tokens in a model of 24 layers x 32 experts, top-4, drawn anew by every worker process."""
    rng = np.random.default_rng(os.getpid())
    counts = np.zeros((24, 32), np.uint32)
    for layer in counts:
        for _ in range(40):
            layer[rng.choice(32, 4, replace=False)] += 1
    return encode_counts(ExpertCounts(counts, 40, 4))


COUNTS: dict[str, Any] = {}


async def main(role: str, port: int, used_path: str) -> None:
    used = os.open(used_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    behaviour = Behaviour(role, port, used)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, behaviour.toggle, "fails")
    loop.add_signal_handler(signal.SIGUSR2, behaviour.toggle, "slow")
    await loop.create_server(lambda: Worker(behaviour), "127.0.0.1", port, backlog=1024)
    await asyncio.Event().wait()


if __name__ == "__main__":
    COUNTS.update(_counts())
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
