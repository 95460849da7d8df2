"""The soak's clients: a steady number of them, each answer read to its end and checked token by token."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import aiohttp
from asking import NEVER, Request, ask

STREAMED, GIVEN_UP = 0.7, 0.1  # shares of requests: streamed, and of those left by their client half-way
FEWEST_TOKENS, MOST_TOKENS = 4, 80
KEYS = 8
CLIENT_TIMEOUT_S = 120.0


@dataclass
class Outcomes:
    """What became of every request sent.

    ended: as in Reply -> requests. broken: (monotonic time, worker's port) of streams that ended with an error event.
    errors: message of a refusal -> requests.
    """

    sent: int = 0
    tokens: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[float, int]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)


class Load:
    """`clients` clients that send one request after the other until `stop` is set."""

    def __init__(self, url: str, clients: int, seed: int) -> None:
        self.outcomes = Outcomes()
        self.stop = asyncio.Event()
        self._url = url
        self._clients = clients
        self._rng = random.Random(seed)

    async def run(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=CLIENT_TIMEOUT_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            await asyncio.gather(*(self._client(session, number) for number in range(self._clients)))

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        outcomes = self.outcomes
        headers = {"authorization": f"Bearer key-{number % KEYS}"}
        count = 0
        while not self.stop.is_set():
            count += 1
            request = self._request(f"{number}.{count}")
            outcomes.sent += 1
            reply = await ask(session, self._url, request, headers)
            outcomes.ended[reply.ended] += 1
            if reply.ended == "complete":
                outcomes.tokens += request.tokens
            elif reply.ended == "error_event":
                outcomes.broken.append((time.monotonic(), reply.port))
            elif reply.ended in NEVER and len(outcomes.examples) < 20:
                outcomes.examples.append(f"{reply.ended}: request {request.prompt}")
            elif reply.ended.startswith(("status", "refused")):
                outcomes.errors[f"{reply.ended}: {reply.message}"] += 1
                await asyncio.sleep(self._rng.uniform(0.1, 0.5))

    def _request(self, prompt: str) -> Request:
        tokens = self._rng.randint(FEWEST_TOKENS, MOST_TOKENS)
        stream = self._rng.random() < STREAMED
        leave_after = tokens // 2 if stream and self._rng.random() < GIVEN_UP else None
        return Request(prompt, tokens, stream, chat=False, leave_after=leave_after)
