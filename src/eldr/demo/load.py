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

REQUEST_TIMEOUT_S = 120.0
# The router's answer names the decode worker that serves it.
WORKER_HEADER = "x-eldr-decode-worker"
MAX_TOKENS_RANGE = (24, 56)
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

    cache_salt: keeps prefix caches apart: a run hits only blocks that requests with the same salt filled.
    """

    url: str
    model: str
    in_flight: int
    cache_salt: str | None = None

    def body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": request.prompt.text,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
        }
        return body if self.cache_salt is None else body | {"cache_salt": self.cache_salt}


def make_requests(prompts: Sequence[Prompt], *, seed: int) -> list[Request]:
    """A request for each prompt, lengths drawn evenly from MAX_TOKENS_RANGE."""
    rng = random.Random(seed)
    return [Request(number, prompt, rng.randint(*MAX_TOKENS_RANGE)) for number, prompt in enumerate(prompts)]


async def run_load(
    target: Target, requests: Sequence[Request], heard: Callable[[Outcome], None] = lambda outcome: None
) -> list[Outcome]:
    """Send all requests in order, `target.in_flight` at a time; `heard` is called with each as it ends."""
    outcomes: list[Outcome] = []
    waiting = iter(requests)

    async def client(session: aiohttp.ClientSession) -> None:
        for request in waiting:
            outcome = await _send(session, target, request)
            outcomes.append(outcome)
            heard(outcome)

    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
        asyncio.TaskGroup() as clients,
    ):
        for _ in range(target.in_flight):
            clients.create_task(client(session))
    return sorted(outcomes, key=lambda outcome: outcome.number)


async def _send(session: aiohttp.ClientSession, target: Target, request: Request) -> Outcome:
    outcome = Outcome(request.number, request.prompt.kind, sent_s=time.monotonic())
    try:
        async with session.post(f"{target.url}/v1/completions", json=target.body(request)) as response:
            outcome.worker = response.headers.get(WORKER_HEADER)
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
