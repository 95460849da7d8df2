"""The soak's clients: a steady number of them, each answer read to its end and checked token by token."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import aiohttp
from worker import token

STREAMED, GIVEN_UP = 0.7, 0.1  # shares of requests: streamed, and of those left by their client half-way
FEWEST_TOKENS, MOST_TOKENS = 4, 80
KEYS = 8
CLIENT_TIMEOUT_S = 120.0


@dataclass
class Outcomes:
    """What became of every request sent.

    ended: outcome -> requests. Outcomes: complete; left (by the client, on purpose); error_event; status_NNN; refused
    (no connection to the router); and, never to be seen: truncated, wrong, hung. broken: (monotonic time, worker's
    port) of streams that ended with an error event. errors: message of a refusal -> requests.
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
        count = 0
        while not self.stop.is_set():
            count += 1
            outcome = await self._ask(session, f"{number}.{count}", number % KEYS)
            self.outcomes.ended[outcome] += 1
            if outcome in ("truncated", "wrong", "hung") and len(self.outcomes.examples) < 20:
                self.outcomes.examples.append(f"{outcome}: request {number}.{count}")
            if outcome.startswith(("status", "refused")):
                await asyncio.sleep(self._rng.uniform(0.1, 0.5))

    async def _ask(self, session: aiohttp.ClientSession, prompt: str, key: int) -> str:
        tokens = self._rng.randint(FEWEST_TOKENS, MOST_TOKENS)
        stream = self._rng.random() < STREAMED
        leave_after = tokens // 2 if stream and self._rng.random() < GIVEN_UP else None
        body = {"model": "soak", "prompt": prompt, "max_tokens": tokens, "stream": stream}
        headers = {"authorization": f"Bearer key-{key}"}
        self.outcomes.sent += 1
        try:
            async with session.post(self._url + "/v1/completions", json=body, headers=headers) as answer:
                if answer.status != 200:
                    message = (await answer.json())["error"]["message"]
                    self.outcomes.errors[f"{answer.status}: {message}"] += 1
                    return f"status_{answer.status}"
                if not stream:
                    text = (await answer.json())["choices"][0]["text"]
                    return self._judge(text, prompt, tokens)
                return await self._stream(answer, prompt, tokens, leave_after)
        except TimeoutError:
            return "hung"
        except aiohttp.ClientConnectorError:
            return "refused"
        except (aiohttp.ClientError, ConnectionError):
            return "truncated"

    async def _stream(self, answer: aiohttp.ClientResponse, prompt: str, tokens: int, leave_after: int | None) -> str:
        text, port, error, done = "", 0, False, False
        seen = 0
        try:
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue
                if line == b"data: [DONE]\n":
                    done = True
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    error = True
                    continue
                port = int(event["system_fingerprint"])
                text += event["choices"][0]["text"]
                seen += 1
                if seen == leave_after:
                    answer.close()
                    return "left"
        except aiohttp.ClientError:
            if not error:
                return "truncated"
        if error:
            self.outcomes.broken.append((time.monotonic(), port))
            # What came before the error must be right all the same.
            whole = "".join(token(prompt, number) for number in range(tokens))
            return "error_event" if whole.startswith(text) and not done else "wrong"
        return self._judge(text, prompt, tokens) if done else "truncated"

    def _judge(self, text: str, prompt: str, tokens: int) -> str:
        if text != "".join(token(prompt, number) for number in range(tokens)):
            return "wrong"
        self.outcomes.tokens += tokens
        return "complete"
