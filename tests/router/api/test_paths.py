"""Paths that the router answers itself, and paths that are not quite right."""

from __future__ import annotations

import asyncio

import pytest

from tests.router.harness import ASK, Reply, Setup, on_uvloop, running
from tests.router.wire import BODY, exchange


async def first_answer(s: Setup, method: str, path: str, body: bytes = b"") -> Reply:
    """The answer without following a redirect."""
    async with s.session.request(
        method, s.url + path, data=body, headers={"content-type": "application/json"}, allow_redirects=False
    ) as answer:
        return Reply(answer.status, answer.headers, await answer.read())


@pytest.mark.parametrize(
    ("method", "path", "location"),
    [
        ("POST", "/v1/chat/completions/", "/v1/chat/completions"),
        ("POST", "/v1/completions/?a=b&c=%25", "/v1/completions?a=b&c=%25"),
        ("GET", "/v1/models/", "/v1/models"),
        ("GET", "/v1/models//", "/v1/models"),
        ("GET", "/health/?", "/health?"),
    ],
)
@on_uvloop
async def test_a_slash_behind_a_path_is_redirected_as_vllm_does(method: str, path: str, location: str) -> None:
    async with running() as s:
        answer = await first_answer(s, method, path, BODY)
        assert (answer.status, answer.body) == (307, b"")
        assert answer.headers["location"].rstrip("?") == location.rstrip("?")
        assert s.decode[0].generated == []
        assert await s.metric("eldr_request_total", endpoint="other", status="307") == 1


@pytest.mark.parametrize("path", ["/", "//", "/v1/", "/nothing/", "//evil.example/", "/ui/", "/v1/models/x/"])
@on_uvloop
async def test_other_paths_are_not_redirected(path: str) -> None:
    async with running() as s:
        raw = await exchange(s, b"GET %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % path.encode())
        assert raw.startswith(b"HTTP/1.1 404 ")


@on_uvloop
async def test_clients_follow_the_redirect_with_their_body() -> None:
    async with running() as s:
        answer = await s.post(path="/v1/completions/")
        assert (answer.status, answer.json()["choices"][0]["text"]) == (200, "abcd")


@on_uvloop
async def test_a_ping_is_answered_by_the_router() -> None:
    async with running() as s:
        assert (await s.get("/ping")).status == 200
        assert s.prefill[0].asked("/ping") == s.decode[0].asked("/ping") == 0


@on_uvloop
async def test_the_load_is_that_of_the_whole_router() -> None:
    async with running(decode=2) as s:
        assert (await s.get("/load")).json() == {"server_load": 0}
        for worker in s.decode:
            worker.token_gap_s = 30.0
        asked = [asyncio.create_task(s.post({**ASK, "stream": True})) for _ in range(3)]
        while (await s.get("/load")).json() != {"server_load": 3}:
            await asyncio.sleep(0.01)
        for task in asked:
            task.cancel()
        while (await s.get("/load")).json() != {"server_load": 0}:
            await asyncio.sleep(0.01)
