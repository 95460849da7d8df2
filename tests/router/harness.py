"""A router in front of fake workers, and clients for it."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import aiohttp
import pytest
import uvloop

from eldr.policies.base import Decision, DecodeRequest, Policy
from eldr.policies.load import ShortestQueue
from eldr.router.app import Router
from eldr.router.config.settings import RouterConfig
from eldr.router.experts.base import ExpertSink
from eldr.router.placement.making import policy_maker
from eldr.router.request import answer
from tests.router.fake_worker import FakeWorker

# For tests that put something of their own into the router, which compiled code does not take.
interpreted = pytest.mark.skipif(not answer.__file__.endswith(".py"), reason="this router is compiled")

ASK: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 4}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def on_uvloop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test on the event loop that the router is made for."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(60):
                await test(*args, **kwargs)

        uvloop.run(bounded())

    return run


@dataclass
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json()["error"]

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events, [DONE] as a string."""
        parts = self.body.decode().split("\n\n")
        assert parts.pop() == ""
        return [part if part == "data: [DONE]" else json.loads(part.removeprefix("data: ")) for part in parts]


@dataclass
class Setup:
    router: Router
    prefill: list[FakeWorker]
    decode: list[FakeWorker]
    aggregated: list[FakeWorker]
    session: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.router.port}"

    async def get(self, path: str, headers: dict[str, str] | None = None) -> Reply:
        async with self.session.get(self.url + path, headers=headers) as answer:
            return Reply(answer.status, answer.headers, await answer.read())

    async def post(
        self, body: object = ASK, path: str = "/v1/completions", headers: dict[str, str] | None = None
    ) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **(headers or {})}
        async with self.session.post(self.url + path, data=data, headers=headers) as answer:
            return Reply(answer.status, answer.headers, await answer.read())

    async def chat(self, body: object = CHAT, **kwargs: Any) -> Reply:
        return await self.post(body, "/v1/chat/completions", **kwargs)

    async def metric(self, name: str, key: str = "", **labels: str) -> float:
        """The sum of the samples of `name` whose labels include `labels`. key: which the request presents."""
        lines = (await self.get("/metrics", headers=bearer(key) if key else None)).body.decode().splitlines()
        family = re.sub("_(total|bucket|count|sum)$", "", name)
        assert any(line.startswith(f"# TYPE {family}") for line in lines), f"no metric {name}"
        chosen = (line for line in lines if line.startswith((name + "{", name + " ")))
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in chosen if all(f'{k}="{v}"' in line for k, v in labels.items())
        )


@asynccontextmanager
async def running(
    prefill: int = 1,
    decode: int = 1,
    policy: Policy | str | None = None,
    prepare: Callable[[Setup], None] | None = None,
    worker_tls: ssl.SSLContext | None = None,
    worker_path: str = "",
    expert_sink: ExpertSink | None = None,
    aggregated: int = 0,
    fake: Callable[..., FakeWorker] = FakeWorker,
    kind: type[RouterConfig] = RouterConfig,
    **settings: Any,
) -> AsyncIterator[Setup]:
    """A started router with its fake workers; `prepare` may change the workers before the router probes them.

    policy: an object for all models, or the name of one that the settings make.
    fake: makes the workers. kind: the settings that there are.
    """

    async def start(role: str, count: int) -> list[FakeWorker]:
        return [await fake(role, ssl_context=worker_tls, base_path=worker_path).start() for _ in range(count)]

    prefills, decodes = await start("prefill", prefill), await start("decode", decode)
    wholes = await start("plain", aggregated)
    config = kind.of(
        prefill=tuple(worker.url for worker in prefills),
        decode=tuple(worker.url for worker in decodes),
        worker=tuple(worker.url for worker in wholes),
        port=0,
        **{"health_interval_s": 0.1, **({"policy": policy} if isinstance(policy, str) else {}), **settings},
    )
    given = None if isinstance(policy, str) else policy or ShortestQueue()
    make = policy_maker(config.placement) if given is None else lambda group: given
    router = Router(config, make, expert_sink=expert_sink)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        setup = Setup(router, prefills, decodes, wholes, session)
        if prepare is not None:
            prepare(setup)
        try:
            await router.start()
            yield setup
        finally:
            for worker in (*prefills, *decodes, *wholes):
                await worker.stop()
            await router.stop(0)


def ours(found: list[object]) -> list[str]:
    """The router's own objects among those found, its frames, and the parsers that know its connections."""
    named = [
        f"{each.f_code.co_filename}:{each.f_code.co_name}"
        if isinstance(each, FrameType)
        else f"{type(each).__module__}.{type(each).__qualname__}"
        for each in found
    ]
    return sorted(name for name in named if "eldr.router" in name or "/eldr/router/" in name or "httptools" in name)


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition that must come true."""
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        await asyncio.sleep(0.005)


Rule = Callable[[DecodeRequest, Mapping[str, int]], str]


class Scripted(Policy):
    """Chooses by a rule that tests may change, and keeps what it hears."""

    name = "scripted"

    def __init__(self, choose: Rule | None = None) -> None:
        self.rule: Rule = choose or (lambda request, in_flight: min(in_flight, key=in_flight.__getitem__))
        self.asked: list[tuple[DecodeRequest, dict[str, int]]] = []
        self.heard: list[tuple[str, str]] = []

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        # The router's own request forgets its counts when it runs.
        kept = DecodeRequest(
            request.request_id, request.prompt_tokens, request.counts, request.label, request.max_tokens
        )
        kept.cached_tokens, kept.computes_prompt = request.cached_tokens, request.computes_prompt
        self.asked.append((kept, dict(in_flight)))
        return Decision(self.rule(request, in_flight), "scripted")

    def started(self, request: DecodeRequest, worker: str) -> None:
        self.heard.append(("started", worker))

    def finished(self, request: DecodeRequest, worker: str) -> None:
        self.heard.append(("finished", worker))

    def joined(self, worker: str) -> None:
        self.heard.append(("joined", worker))

    def left(self, worker: str) -> None:
        self.heard.append(("left", worker))


def aggregated(workers: int = 1, **kwargs: Any) -> AbstractAsyncContextManager[Setup]:
    """A started router in front of aggregated workers alone."""
    return running(0, 0, aggregated=workers, **kwargs)


def preferring(worker: FakeWorker) -> Rule:
    """The rule that takes this decode worker whenever it is eligible."""
    return lambda request, in_flight: worker.url if worker.url in in_flight else min(in_flight)


async def raw_stream(s: Setup, headers: bytes = b"") -> bytes:
    """Every byte of the answer to a streamed completion, on a connection of its own. headers: lines ended by CRLF."""
    reader, writer = await asyncio.open_connection("127.0.0.1", s.router.port)
    body = json.dumps({**ASK, "stream": True}).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
    writer.write(b"%bcontent-length: %d\r\n\r\n%b" % (headers, len(body), body))
    raw = await reader.read()
    writer.close()
    return raw
