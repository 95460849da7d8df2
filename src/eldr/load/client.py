"""Streams completions from one server, with a fixed number of clients or at given times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from eldr.event_stream import EventReader
from eldr.load.outcome import Outcome
from eldr.load.request import Request

REQUEST_TIMEOUT_S = 120.0
ERROR_CHARS = 300
# With return_token_ids, the first event holds the ids of the whole prompt.
MAX_EVENT_BYTES = 64 * 1024 * 1024

Heard = Callable[[Outcome], None]


@dataclass(frozen=True, slots=True)
class Target:
    """The server to load.

    url: its address.
    model: the model name.
    run: names the run in request ids and keeps prefix caches apart, so requests hit only blocks of their own run.
    ignore_eos: generate max_tokens even if the model would stop (a vLLM option). Fewer tokens are then an error.
    api_key: the server's API key, if it has one.
    timeout_s: the time limit of each request.
    """

    url: str
    model: str
    run: str
    ignore_eos: bool = True
    api_key: str | None = None
    timeout_s: float = REQUEST_TIMEOUT_S

    def body(self, request: Request) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": request.prompt.text,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": self.ignore_eos,
            "stream": True,
            "return_token_ids": True,
            "cache_salt": self.run,
        }

    def headers(self, request: Request) -> dict[str, str]:
        headers = {"X-Request-Id": request_id(self.run, request.number)}
        return headers if self.api_key is None else headers | {"Authorization": f"Bearer {self.api_key}"}


def request_id(run: str, number: int) -> str:
    """The X-Request-Id of a request. It identifies the request in the router's log."""
    return f"{run}-{number}"


async def run_closed(target: Target, requests: Sequence[Request], in_flight: int, heard: Heard) -> None:
    """Send all requests in order, `in_flight` at a time. `heard` is called with each as it ends."""
    waiting = iter(requests)

    async def client(session: aiohttp.ClientSession) -> None:
        for request in waiting:
            heard(await send(session, target, request))

    async with _session(target) as session, asyncio.TaskGroup() as clients:
        for _ in range(in_flight):
            clients.create_task(client(session))


async def run_open(target: Target, requests: Sequence[Request], arrival_s: Sequence[float], heard: Heard) -> float:
    """Send each request at its time, in seconds from the start, whether or not earlier ones have ended.

    Returns the start time on the clock of the outcomes.
    """
    begin = time.monotonic()

    async def one(session: aiohttp.ClientSession, request: Request, at_s: float) -> None:
        await asyncio.sleep(begin + at_s - time.monotonic())
        heard(await send(session, target, request))

    async with _session(target) as session, asyncio.TaskGroup() as clients:
        for request, at_s in zip(requests, arrival_s, strict=True):
            clients.create_task(one(session, request, at_s))
    return begin


def _session(target: Target) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=target.timeout_s)
    return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))


async def send(session: aiohttp.ClientSession, target: Target, request: Request) -> Outcome:
    """Send one request and wait until it ends. Any failure is recorded in the outcome's error."""
    outcome = Outcome(request.number, request.prompt.kind, sent_s=time.monotonic())
    try:
        body, headers = target.body(request), target.headers(request)
        async with session.post(f"{target.url}/v1/completions", json=body, headers=headers) as response:
            if response.status != 200:
                text = (await response.text(errors="replace"))[:ERROR_CHARS]
                outcome.error = f"status {response.status}: {text}"
            else:
                outcome.error = await _read_stream(response, outcome)
    except (TimeoutError, aiohttp.ClientError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    tokens = len(outcome.token_times_s)
    if outcome.error is None and target.ignore_eos and tokens != request.max_tokens:
        outcome.error = f"{tokens} tokens instead of {request.max_tokens}"
    if outcome.error is None and not tokens:
        outcome.error = "no token arrived"
    return outcome


async def _read_stream(response: aiohttp.ClientResponse, outcome: Outcome) -> str | None:
    """Add the events of a stream to `outcome`. Returns what is wrong with the stream, or None.

    If a server does not return token ids, each event with text is counted as one token.
    """
    reader = EventReader(MAX_EVENT_BYTES)
    async for piece in response.content.iter_any():
        for event in reader.feed(piece):
            if event.data == b"[DONE]":
                return None
            wrong = _add_event(event.data, outcome) if event.data else None
            if wrong is not None:
                return wrong
    unfinished = reader.unfinished  # the last blank line may be missing
    return None if unfinished is not None and unfinished.data == b"[DONE]" else "the stream ended before [DONE]"


def _add_event(data: bytes, outcome: Outcome) -> str | None:
    try:
        event = orjson.loads(data)
        if event.get("error") is not None:
            return f"error in the stream: {str(event['error'])[:ERROR_CHARS]}"
        for choice in event["choices"]:
            text, ids = choice["text"], choice.get("token_ids")
            outcome.text += text
            outcome.token_ids += ids or []
            tokens = int(bool(text)) if ids is None else len(ids)
            outcome.token_times_s += [time.monotonic()] * tokens
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable event ({error!r}): {data[:ERROR_CHARS]!r}"
    return None
