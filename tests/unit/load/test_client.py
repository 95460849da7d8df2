"""The load client against a server that says what each test needs."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from eldr.demo.outputs import top_two_gaps
from eldr.load.client import Target, run_closed
from eldr.load.outcome import Outcome
from eldr.load.request import Request
from eldr.workloads.prompt import Prompt


def event(text: str, tokens: list[int]) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'text': text, 'token_ids': tokens}]})}\n\n"


GOOD = [event("a", [97]), event("", [206]), event("λ!", [187, 33]), "data: [DONE]\n\n"]


@pytest.fixture
async def serve() -> AsyncIterator[Any]:
    """Starts a server whose /v1/completions is the given handler; returns its URL."""
    runners = []

    async def start(handler: Callable[..., Any]) -> Any:
        app = web.Application()
        app.router.add_post("/v1/completions", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        runners.append(runner)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    yield start
    for runner in runners:
        await runner.cleanup()


def streaming(lines: list[str]) -> Callable[..., Any]:
    async def handler(request: web.Request) -> Any:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for line in lines:
            await response.write(line.encode())
        return response

    return handler


async def load(url: str, count: int = 1, in_flight: int = 1, max_tokens: int = 4) -> Any:
    requests = [Request(number, Prompt("greek", f"prompt {number}"), max_tokens) for number in range(count)]
    outcomes: list[Outcome] = []
    await run_closed(Target(url, "the-model", "the-run"), requests, in_flight, outcomes.append)
    return outcomes


async def test_a_stream_is_put_together(serve: Callable[..., Any]) -> None:
    (outcome,) = await load(await serve(streaming(GOOD)))
    assert outcome.error is None
    assert outcome.text == "aλ!"
    assert outcome.token_ids == [97, 206, 187, 33]
    assert len(outcome.token_times_s) == 4
    assert outcome.token_times_s[2] == outcome.token_times_s[3]
    assert outcome.sent_s <= outcome.token_times_s[0] <= outcome.token_times_s[-1]


async def test_other_lines_and_long_events_are_read(serve: Callable[..., Any]) -> None:
    """As with return_token_ids and a long prompt, through a proxy that sends comments."""
    long = {"choices": [{"text": "a", "token_ids": [97], "prompt_token_ids": [100_000] * 100_000}]}
    lines = [": ping\r\n\r\n", f"id: 1\ndata: {json.dumps(long)}\r\n\r\n", "data:\n\n", *GOOD[1:-1], "data:[DONE]\n"]
    (outcome,) = await load(await serve(streaming(lines)))
    assert outcome.error is None
    assert outcome.token_ids == [97, 206, 187, 33]


async def test_what_is_asked(serve: Callable[..., Any]) -> None:
    seen = []

    async def handler(request: web.Request) -> Any:
        seen.append((request.headers["X-Request-Id"], await request.json()))
        return await streaming(GOOD)(request)

    await load(await serve(handler), count=2)
    assert [name for name, _ in seen] == ["the-run-0", "the-run-1"]
    assert seen[1][1] == {
        "model": "the-model",
        "prompt": "prompt 1",
        "max_tokens": 4,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "cache_salt": "the-run",
    }


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (GOOD[:-1], "before [DONE]"),
        ([GOOD[0], "data: [DONE]\n\n"], "1 tokens instead of 4"),
        ([GOOD[0], 'data: {"error": {"message": "out of cache"}}\n\n'], "out of cache"),
        (["data: {\n\n"], "unreadable event"),
        (['data: {"choices": [{"no": "text"}]}\n\n'], "unreadable event"),
        (['data: {"choices": [{"text": "one token"}]}\n\n', GOOD[-1]], "1 tokens instead of 4"),
        (["data: 7\n\n"], "unreadable event"),
    ],
)
async def test_a_bad_stream_is_an_error(serve: Callable[..., Any], lines: list[str], problem: str) -> None:
    (outcome,) = await load(await serve(streaming(lines)))
    assert problem in outcome.error


async def test_a_refusal_and_an_absent_server_are_errors(serve: Callable[..., Any]) -> None:
    async def refuse(request: web.Request) -> Any:
        return web.json_response({"error": {"message": "no worker"}}, status=503)

    (outcome,) = await load(await serve(refuse))
    assert "503" in outcome.error
    assert "no worker" in outcome.error
    (outcome,) = await load("http://127.0.0.1:1")
    assert "ClientConnectorError" in outcome.error


async def test_never_more_in_flight_than_asked_and_all_are_sent(serve: Callable[..., Any]) -> None:
    running, peak = 0, 0

    async def handler(request: web.Request) -> Any:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.01)
        response = await streaming(GOOD)(request)
        running -= 1
        return response

    outcomes = await load(await serve(handler), count=20, in_flight=3)
    assert sorted(outcome.number for outcome in outcomes) == list(range(20))
    assert all(outcome.error is None for outcome in outcomes)
    assert peak == 3


async def test_top_two_gaps_are_differences_of_the_two_likeliest(serve: Callable[..., Any]) -> None:
    async def handler(request: web.Request) -> Any:
        body = await request.json()
        assert body["temperature"] == 0
        assert body["ignore_eos"]
        assert body["logprobs"] == 2
        top = [{"token_id:9": -3.5, "token_id:7": -0.5}, {"token_id:1": -0.25, "token_id:2": -0.25, "token_id:3": -9.0}]
        return web.json_response({"choices": [{"token_ids": [7, 1], "logprobs": {"top_logprobs": top}}]})

    url = await serve(handler)
    assert await top_two_gaps(url, "m", Request(0, Prompt("code", "x"), 2)) == ([7, 1], [3.0, 0.0])
