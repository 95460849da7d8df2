"""A fake vLLM worker: the parts of its API that the router uses, and ways to misbehave.

Answers follow what vLLM 0.32 sends, byte for byte where it matters: one chunk per server-sent event, errors as
{"error": {...}}, `kv_transfer_params` in answers that are not streamed and nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

import numpy as np

from eldr.counts import ExpertCounts, encode_counts

LAYERS, EXPERTS, TOP_K = 2, 8, 2
COMPLETIONS, CHAT, RESPONSES, MESSAGES = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"
GENERATES = (COMPLETIONS, CHAT, RESPONSES, MESSAGES)


@dataclass
class Seen:
    """One request as the worker got it."""

    method: str
    path: str
    headers: dict[str, str]
    raw: bytes
    at_s: float = field(default_factory=time.monotonic)
    aborted: bool = False

    @property
    def body(self) -> dict[str, Any]:
        return json.loads(self.raw)


Behaviour = Callable[["FakeWorker", Seen, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class FakeWorker:
    """A worker on a port of its own.

    model: the name of its base model. aliases: other names of it.
    adapters: names of its LoRA adapters, which may be loaded and unloaded at any time.
    list_answer: what /v1/models answers instead of its list while it is set: status, body.
    silent: takes requests and answers none, probes included.
    delay_s: how late every answer is, to probes as well.
    behaviour: called instead of the normal answer for completion and chat requests while it is set.
    metrics: what /metrics says; 404 while it is None.
    info: what /server_info says: status, body. 404 while it is None.
    base_path: what its URL has behind the port. Other paths are not found.
    others: path -> status, body and content type of further endpoints; each waits while `behaviour` is set, as above.
    max_model_len: what /v1/models says of the model's length.
    counts: wire form of the expert counts in hand-offs; None leaves them out.
    """

    def __init__(
        self,
        role: str = "plain",
        model: str = "tiny",
        ssl_context: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        base_path: str = "",
    ) -> None:
        self.role = role
        self.base_path = base_path
        self.ssl_context = ssl_context
        self.model = model
        self.max_model_len: int | None = None
        self.aliases: list[str] = []
        self.adapters: list[str] = []
        self.list_answer: tuple[int, bytes] | None = None
        self.seen: list[Seen] = []
        self.behaviour: Behaviour | None = None
        self.healthy = True
        self.silent = False
        self.delay_s = 0.0
        self.tokens = ["a", "b", "c", "d"]
        self.token_gap_s = 0.0
        self.counts: object = counts_wire(4)
        self.lease: object = {"left_s": 30.0}
        self.api_key: str | None = None
        self.metrics: str | None = None
        self.info: tuple[int, bytes] | None = None
        self.others: dict[str, tuple[int, bytes, str]] = {}
        self.connections = 0
        self.open_connections = 0
        self.running = 0
        self.most_running = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._host = host
        self._port = port
        self._handoffs = 0

    @property
    def url(self) -> str:
        return f"http{'s' if self.ssl_context else ''}://{self._host}:{self._port}{self.base_path}"

    @property
    def engine_id(self) -> str:
        """What its hand-offs name as remote_engine_id."""
        return f"engine-{self._port}"

    @property
    def generated(self) -> list[Seen]:
        """Requests for text, probes left out."""
        return [seen for seen in self.seen if seen.path in GENERATES]

    def asked(self, path: str) -> int:
        """How often it was asked for `path`."""
        return sum(seen.path == path for seen in self.seen)

    async def start(self) -> FakeWorker:
        self._server = await asyncio.start_server(
            self._connection, self._host, self._port, limit=2**24, ssl=self.ssl_context
        )
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open_connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.open_connections -= 1
            self._tasks.discard(task)
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        method, full_path, _ = lines[0].split(" ")
        path = full_path.removeprefix(self.base_path) if full_path.startswith(self.base_path) else "not below it"
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines[1:] if line)}
        if headers.get("transfer-encoding") == "chunked":
            raw = await _chunks(reader)
        else:
            raw = await reader.readexactly(int(headers.get("content-length", "0")))
        seen = Seen(method, path, headers, raw)
        self.seen.append(seen)
        if self.silent:
            await asyncio.sleep(3600)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if path == "/health":
            await reply(writer, 200 if self.healthy else 503, b"")
        elif self.api_key is not None and headers.get("authorization") != f"Bearer {self.api_key}":
            await reply(writer, 401, b'{"error":"Unauthorized"}')
        elif path == "/v1/models":
            await reply(writer, *(self.list_answer or (200, self.model_list())))
        elif path == "/metrics" and self.metrics is not None:
            await reply(writer, 200, self.metrics.encode(), "content-type: text/plain\r\n")
        elif path == "/server_info" and self.info is not None:
            await reply(writer, *self.info)
        elif path in GENERATES or (path in self.others and self.behaviour is not None):
            await self._generate(seen, reader, writer)
        elif path in self.others:
            status, body, kind = self.others[path]
            await reply(writer, status, body, f"content-type: {kind}\r\n" if kind else "")
        else:
            await reply(writer, 404, b'{"detail":"Not Found"}')
        return True

    def model_list(self) -> bytes:
        cards = [
            _card(name, root=f"org/{self.model}", max_model_len=self.max_model_len)
            for name in (self.model, *self.aliases)
        ]
        cards += [_card(name, root=f"/adapters/{name}", parent=self.model) for name in self.adapters]
        return json.dumps({"object": "list", "data": cards}).encode()

    async def _generate(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        gone = asyncio.ensure_future(_closed(reader))
        answer = asyncio.ensure_future(
            self.behaviour(self, seen, reader, writer) if self.behaviour else self.answer(seen, writer)
        )
        try:
            await asyncio.wait({gone, answer}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                seen.aborted = True
                raise ConnectionResetError
            await answer
        finally:
            self.running -= 1
            gone.cancel()
            answer.cancel()
            await asyncio.gather(gone, answer, return_exceptions=True)

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        body = seen.body
        model = body.get("model")
        if model and model not in (self.model, *self.aliases, *self.adapters):
            message = f"The model `{model}` does not exist."
            error = {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
            await reply(writer, 404, json.dumps({"error": error}).encode())
            return
        chat = seen.path == CHAT
        limit = body.get("max_tokens", 16)
        if seen.path == RESPONSES:
            limit = body.get("max_output_tokens", 16)
        elif chat:
            limit = body.get("max_completion_tokens", limit)
        tokens = self.tokens[:limit]
        if body.get("stream"):
            await self.stream(seen, writer, tokens, chat)
        else:
            if self.token_gap_s:
                await asyncio.sleep(self.token_gap_s * len(tokens))
            await reply(writer, 200, json.dumps(self.whole(seen, tokens, chat), separators=(",", ":")).encode())

    def whole(self, seen: Seen, tokens: list[str], chat: bool) -> dict[str, Any]:
        text = "".join(tokens)
        if seen.path == RESPONSES:
            return self._response(seen, text, len(tokens)) | {"kv_transfer_params": self._transfer_params(seen)}
        if seen.path == MESSAGES:
            params = self._transfer_params(seen)
            message = self._message(seen, [{"type": "text", "text": text}], len(tokens))
            return message | ({} if params is None else {"kv_transfer_params": params})
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return {
            "id": ("chatcmpl-" if chat else "cmpl-") + seen.headers.get("x-request-id", "none"),
            "object": "chat.completion" if chat else "text_completion",
            "model": self.model,
            "choices": [{"index": i, **said, "finish_reason": "length"} for i in range(seen.body.get("n") or 1)],
            "usage": {"prompt_tokens": 4, "completion_tokens": len(tokens), "total_tokens": 4 + len(tokens)},
            "kv_transfer_params": self._transfer_params(seen),
        }

    def _response(self, seen: Seen, text: str | None, tokens: int) -> dict[str, Any]:
        """A response as vLLM names it: by the body alone. text: None if it has not begun."""
        said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}
        return {
            "id": seen.body.get("request_id", "resp_of-the-worker"),
            "object": "response",
            "model": self.model,
            "output": [] if text is None else [said],
            "status": "in_progress" if text is None else "completed",
            "usage": None if text is None else {"input_tokens": 4, "output_tokens": tokens, "total_tokens": 4 + tokens},
            "kv_transfer_params": None,
        }

    def _message(self, seen: Seen, content: list[Any], tokens: int) -> dict[str, Any]:
        return {
            "id": "chatcmpl-" + seen.headers.get("x-request-id", "none"),
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self.model,
            "stop_reason": "max_tokens" if content else None,
            "usage": {"input_tokens": 4, "output_tokens": tokens},
        }

    def _typed_events(self, seen: Seen, tokens: list[str]) -> list[bytes]:
        """The events of the two APIs that name the types of their events."""
        text, count = "".join(tokens), len(tokens)
        events: list[dict[str, Any]]
        if seen.path == RESPONSES:
            opened, done = self._response(seen, None, 0), self._response(seen, text, count)
            events = [{"response": opened, "type": f"response.{what}"} for what in ("created", "in_progress")]
            events += [{"type": "response.output_item.added", "item": {"type": "message"}}]
            events += [{"type": "response.output_text.delta", "delta": token} for token in tokens]
            events += [{"type": "response.output_text.done", "text": text}]
            events += [{"response": done, "type": "response.completed"}]
        else:
            events = [{"type": "message_start", "message": self._message(seen, [], 0)}]
            events += [{"type": "content_block_start", "content_block": {"type": "text", "text": ""}, "index": 0}]
            for token in tokens:
                delta = {"type": "text_delta", "text": token}
                events.append({"type": "content_block_delta", "delta": delta, "index": 0})
            events += [{"type": "content_block_stop", "index": 0}]
            usage = {"input_tokens": 4, "output_tokens": count}
            events += [{"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": usage}]
            events += [{"type": "message_stop"}]
        return [b"event: %b\ndata: %b\n\n" % (e["type"].encode(), compact(e)) for e in events]

    def _transfer_params(self, seen: Seen) -> dict[str, Any] | None:
        asked = seen.body.get("kv_transfer_params")
        if self.role == "prefill" and asked and asked.get("do_remote_decode"):
            self._handoffs += 1
            params: dict[str, Any] = {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_block_ids": [[self._handoffs]],
                "remote_engine_id": self.engine_id,
                "remote_request_id": f"{self._engines_name(seen)}-{self._port:04x}{self._handoffs:04x}",
                "remote_host": "127.0.0.1",
                "remote_port": 5600,
                "tp_size": 1,
            }
            if self.counts is not None:
                params["eldr_counts"] = self.counts
            if isinstance(self.lease, dict):
                params["eldr_lease"] = {"unix_s": time.time(), **self.lease}
            elif self.lease is not None:
                params["eldr_lease"] = self.lease
            return params
        if asked and asked.get("eldr_record"):
            experts = {"v": 2, "tokens": 3, "layers": LAYERS, "top_k": TOP_K, "dtype": "u1", "data": "eA=="}
            whole = {} if asked.get("do_remote_prefill") else {"eldr_counts": self.counts}
            return {"eldr_decode_experts": experts, **whole}
        return None

    def _engines_name(self, seen: Seen) -> str:
        """What its engine calls the request, but for a random part."""
        if seen.path == RESPONSES:
            return f"{seen.body.get('request_id', 'resp_of-the-worker')}_0"
        return (
            f"chatcmpl-{seen.headers.get('x-request-id')}"
            if seen.path != COMPLETIONS
            else (f"cmpl-{seen.headers.get('x-request-id')}-0")
        )

    async def stream(self, seen: Seen, writer: asyncio.StreamWriter, tokens: list[str], chat: bool) -> None:
        await begin_stream(writer)
        for event in self.events(seen, tokens, chat):
            await chunk(writer, event)
            if self.token_gap_s:
                await asyncio.sleep(self.token_gap_s)
        await end_stream(writer)

    def events(self, seen: Seen, tokens: list[str], chat: bool) -> list[bytes]:
        if seen.path in (RESPONSES, MESSAGES):
            return self._typed_events(seen, tokens)
        base = {"id": "cmpl-" + seen.headers.get("x-request-id", "none"), "model": self.model}

        def choice(text: str | None, finish: str | None) -> dict[str, Any]:
            said = {"delta": {"role": "assistant"} if text is None else {"content": text}} if chat else {"text": text}
            return {**base, "choices": [{"index": 0, **said, "finish_reason": finish}]}

        events = [choice(None, None)] if chat else []
        events += [choice(text, "length" if i == len(tokens) - 1 else None) for i, text in enumerate(tokens)]
        if (seen.body.get("stream_options") or {}).get("include_usage"):
            events.append({**base, "choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": len(tokens)}})
        lines = [json.dumps(event, separators=(",", ":")).encode() for event in events]
        return [b"data: %b\n\n" % line for line in (*lines, b"[DONE]")]


def compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _card(name: str, root: str, **fields: object) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1, "owned_by": "vllm", "root": root, "parent": None, **fields}


def counts_wire(prompt_tokens: int, layers: int = LAYERS, experts: int = EXPERTS) -> dict[str, Any]:
    """Counts of a prompt whose tokens all chose the first two experts."""
    counts = np.zeros((layers, experts), np.uint32)
    counts[:, :TOP_K] = prompt_tokens
    return encode_counts(ExpertCounts(counts, prompt_tokens, TOP_K))


async def reply(
    writer: asyncio.StreamWriter, status: int, body: bytes, headers: str = "content-type: application/json\r\n"
) -> None:
    date = formatdate(usegmt=True)
    head = f"HTTP/1.1 {status} X\r\ndate: {date}\r\nserver: uvicorn\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
    writer.write(head.encode() + body)
    await writer.drain()


async def begin_stream(writer: asyncio.StreamWriter) -> None:
    writer.write(
        b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
        b"transfer-encoding: chunked\r\n\r\n"
    )
    await writer.drain()


async def chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))
    await writer.drain()


async def end_stream(writer: asyncio.StreamWriter) -> None:
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    """A body in chunks, as gateways send it."""
    body = b""
    while size := int(await reader.readline(), 16):
        body += await reader.readexactly(size)
        await reader.readline()
    await reader.readline()
    return body


async def _closed(reader: asyncio.StreamReader) -> None:
    """Returns when the peer closes; the next request cannot come before the answer."""
    while not reader.at_eof():
        if reader.exception() is not None:
            return
        if await _wait_eof(reader):
            return


async def _wait_eof(reader: asyncio.StreamReader) -> bool:
    await asyncio.sleep(0.005)
    return reader.at_eof()
