"""The demo's load: streaming completions with a fixed number of requests in flight.

Closed loop, because a fixed arrival rate would make the batches, and with them the active experts, depend on how
fast this machine is; with a fixed number in flight both policies decode the same number of sequences at a time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from eldr.demo.measure import Outcome
from eldr.demo.prompts import Prompt
from eldr.demo.router_log import request_id

REQUEST_TIMEOUT_S = 120.0
MAX_TOKENS_RANGE = (96, 160)
ERROR_CHARS = 300


@dataclass(frozen=True, slots=True)
class Request:
    """One request of the workload."""

    number: int
    prompt: Prompt
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Target:
    """A server to load.

    run: names the run in request ids and keeps prefix caches apart: requests hit only blocks of their own run.
    """

    url: str
    model: str
    in_flight: int
    run: str

    def body(self, request: Request) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": request.prompt.text,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "cache_salt": self.run,
        }


def make_requests(prompts: Sequence[Prompt], *, seed: int) -> list[Request]:
    """A request for each prompt, lengths drawn evenly from MAX_TOKENS_RANGE."""
    rng = random.Random(seed)
    return [Request(number, prompt, rng.randint(*MAX_TOKENS_RANGE)) for number, prompt in enumerate(prompts)]


async def run_load(target: Target, requests: Sequence[Request], heard: Callable[[Outcome], None]) -> None:
    """Send all requests in order, `target.in_flight` at a time; `heard` is called with each as it ends."""
    waiting = iter(requests)

    async def client(session: aiohttp.ClientSession) -> None:
        for request in waiting:
            heard(await _send(session, target, request))

    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
        asyncio.TaskGroup() as clients,
    ):
        for _ in range(target.in_flight):
            clients.create_task(client(session))


async def _send(session: aiohttp.ClientSession, target: Target, request: Request) -> Outcome:
    outcome = Outcome(request.number, request.prompt.kind, sent_s=time.monotonic())
    try:
        headers = {"X-Request-Id": request_id(target.run, request.number)}
        body = target.body(request)
        async with session.post(f"{target.url}/v1/completions", json=body, headers=headers) as response:
            if response.status != 200:
                text = (await response.text(errors="replace"))[:ERROR_CHARS]
                outcome.error = f"status {response.status}: {text}"
            else:
                outcome.error = await _read_stream(response, outcome)
    except (TimeoutError, aiohttp.ClientError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    if outcome.error is None and len(outcome.token_ids) != request.max_tokens:
        outcome.error = f"{len(outcome.token_ids)} tokens instead of {request.max_tokens}"
    return outcome


async def _read_stream(response: aiohttp.ClientResponse, outcome: Outcome) -> str | None:
    """Add the events of a stream to `outcome`; returns what was wrong with the stream, None if nothing."""
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return None
        try:
            event = orjson.loads(data)
            if "error" in event:
                return f"error in the stream: {str(event['error'])[:ERROR_CHARS]}"
            for choice in event["choices"]:
                tokens = choice["token_ids"] or []
                outcome.text += choice["text"]
                outcome.token_ids += tokens
                outcome.token_times_s += [time.monotonic()] * len(tokens)
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            return f"an event that cannot be read ({error!r}): {data[:ERROR_CHARS]!r}"
    return "the stream ended before [DONE]"
