"""A real pair of SGLang's workers behind the router, if somebody names one: `make test-sglang PREFILL=URL DECODE=URL`.

With PLAIN=URL, a server of the same model without a disaggregation mode, the answers must be its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import aiohttp
import pytest

from eldr.router.app import Router
from eldr.router.config.settings import RouterConfig
from eldr.router.placement.making import policy_maker
from tests.router.fake_sglang import FakeSglang
from tests.router.harness import on_uvloop, running

PREFILL, DECODE, PLAIN = (os.environ.get(f"ELDR_SGLANG_{name}", "") for name in ("PREFILL", "DECODE", "PLAIN"))
LONG = " ".join(f"Rule {number}: write one number a line." for number in range(200))
PROMPTS = ("The capital of France is", "1 2 3 4 5 6", LONG)


@contextlib.asynccontextmanager
async def routed(prefill: str, decode: str) -> AsyncIterator[str]:
    """The URL of a router in front of the pair."""
    config = RouterConfig.of(engine="sglang", prefill=(prefill,), decode=(decode,), port=0)
    router = Router(config, policy_maker(config.placement))
    try:
        await router.start()
        yield f"http://127.0.0.1:{router.port}"
    finally:
        await router.stop(0)


class Client:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def text(self, body: dict[str, Any], path: str = "/v1/completions") -> list[str]:
        """What is said for each prompt, whether streamed or whole."""
        async with self._session.post(self._url + path, json=body) as answer:
            raw = await answer.text()
        assert answer.status == 200, raw
        if not body.get("stream"):
            return [
                each["text"] if "text" in each else each["message"]["content"] for each in json.loads(raw)["choices"]
            ]
        events = raw.removesuffix("\n\n").split("\n\n")
        assert events.pop() == "data: [DONE]", raw
        said: dict[int, str] = {}
        for event in events:
            for choice in json.loads(event.removeprefix("data: "))["choices"]:
                piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                said[choice["index"]] = said.get(choice["index"], "") + piece
        return [said[index] for index in sorted(said)]

    async def metric(self, name: str) -> float:
        async with self._session.get(self._url + "/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))


async def check(prefill: str, decode: str, plain: str) -> None:
    """Ask the pair for all that a pair can do, many requests at once. Nothing fails, and nothing is tried twice."""
    async with aiohttp.ClientSession() as session, routed(prefill, decode) as url:
        router, reference = Client(session, url), Client(session, plain or url)
        async with session.get(url + "/v1/models") as answer:
            model = (await answer.json())["data"][0]["id"]
        base = {"model": model, "max_tokens": 16, "temperature": 0}
        chat = {**base, "messages": [{"role": "user", "content": PROMPTS[0]}]}
        bodies = [{**base, "prompt": prompt} for prompt in (*PROMPTS, [*PROMPTS])]
        for body, path in [*((body, "/v1/completions") for body in bodies), (chat, "/v1/chat/completions")]:
            expected = await reference.text(body, path)
            for stream in (False, True):
                many = await asyncio.gather(*(router.text({**body, "stream": stream}, path) for _ in range(8)))
                assert many == [expected] * 8
        # A client that leaves takes its request with it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await router.text({**base, "prompt": LONG, "max_tokens": 64})
        assert await router.text({**base, "prompt": PROMPTS[0]}) == await reference.text({**base, "prompt": PROMPTS[0]})
        for name in ("eldr_retries_total", "eldr_worker_failures_total", "eldr_inflight"):
            assert await router.metric(name) == 0, name


@pytest.mark.skipif(not (PREFILL and DECODE), reason="no pair of SGLang: make test-sglang PREFILL=URL DECODE=URL")
@on_uvloop
async def test_a_real_pair() -> None:
    await check(PREFILL, DECODE, PLAIN)


@on_uvloop
async def test_the_check_itself() -> None:
    async with running(fake=partial(FakeSglang, bootstraps={}), engine="sglang") as s:
        await check(s.prefill[0].url, s.decode[0].url, "")
