"""Browsers: preflights, and answers that pages of other origins may read."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from playwright.async_api import async_playwright

from eldr.router.config.settings import ConfigError, RouterConfig
from tests.router.admin import KEY
from tests.router.api.test_page import FLAGS, browser_path
from tests.router.fake_worker import reply
from tests.router.harness import ASK, CHAT, Reply, Setup, bearer, on_uvloop, running
from tests.router.wire import exchange

APP = "https://app.example"
EVIL = "https://evil.example"


async def preflight(
    s: Setup, origin: str = APP, path: str = "/v1/chat/completions", asked: str = "authorization,content-type"
) -> Reply:
    headers = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": asked}
    async with s.session.options(s.url + path, headers=headers) as answer:
        return Reply(answer.status, answer.headers, await answer.read())


def allowed(headers: object) -> str | None:
    assert hasattr(headers, "getall")
    values: list[str] = headers.getall("access-control-allow-origin", [])
    assert len(values) <= 1  # a browser refuses two
    return values[0] if values else None


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("secret alice\n")
    return path


@on_uvloop
async def test_a_preflight_needs_no_key_and_everything_else_does(key_file: Path) -> None:
    async with running(api_key_file=key_file, allowed_origins=[APP]) as s:
        answer = await preflight(s)
        assert (answer.status, allowed(answer.headers)) == (200, APP)
        assert answer.headers["access-control-allow-methods"] == "GET, HEAD, POST"
        assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
        assert int(answer.headers["access-control-max-age"]) > 0
        assert "access-control-allow-credentials" not in answer.headers
        for method, headers in (
            ("OPTIONS", {"origin": APP}),
            ("OPTIONS", {"access-control-request-method": "POST"}),
            ("POST", {"origin": APP, "access-control-request-method": "POST"}),
            ("GET", {"origin": APP, "access-control-request-method": "POST"}),
        ):
            async with s.session.request(method, s.url + "/v1/completions", headers=headers) as other:
                assert other.status == 401
        assert s.prefill[0].generated == s.decode[0].generated == []


@on_uvloop
async def test_the_answers_to_an_allowed_page_can_be_read_whatever_they_are(key_file: Path) -> None:
    async with running(api_key_file=key_file, allowed_origins=[EVIL.replace("evil", "other"), APP]) as s:
        page = {**bearer("secret"), "origin": APP}
        answers = {
            200: await s.post(headers=page),
            401: await s.post(headers={"origin": APP}),
            404: await s.post(path="/nothing", headers=page),
            405: await s.get("/v1/completions", headers=page),
            400: await s.post(b"{", headers=page),
            307: await s.post(path="/v1/completions/", headers=page),
        }
        # aiohttp follows the redirect, as a browser does.
        assert answers.pop(307).status == 200
        for status, answer in answers.items():
            assert (answer.status, allowed(answer.headers)) == (status, APP), status
            assert answer.headers["vary"] == "origin"
        assert "x-request-id" in answers[200].headers["access-control-expose-headers"]
        stream = await s.post({**ASK, "stream": True}, headers=page)
        assert allowed(stream.headers) == APP
        assert stream.events[-1] == "data: [DONE]"
        for origin in (EVIL, "null", APP + ":444", APP.upper(), f"{APP}, {APP}", "http://app.example", ""):
            answer = await s.post(headers={**bearer("secret"), "origin": origin})
            assert (answer.status, allowed(answer.headers)) == (200, None)
            assert answer.headers["vary"] == "origin"
            assert (await preflight(s, origin)).status == 403
        assert allowed((await s.post(headers=bearer("secret"))).headers) is None


@on_uvloop
async def test_a_body_that_is_too_large_is_refused_readably() -> None:
    async with running(allowed_origins=[APP], max_body_bytes=100) as s:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\norigin: https://app.example\r\ncontent-length: 101\r\n\r\n"
        raw = await exchange(s, head)
        assert raw.startswith(b"HTTP/1.1 413 ")
        assert raw.count(b"access-control-allow-origin: https://app.example\r\n") == 1


@on_uvloop
async def test_no_worker_is_told_readably() -> None:
    async with running(allowed_origins=["*"], worker_wait_s=0) as s:
        for worker in (*s.prefill, *s.decode):
            await worker.stop()
        answer = await s.post(headers={"origin": APP})
        while answer.status != 503:
            answer = await s.post(headers={"origin": APP})
        assert allowed(answer.headers) == "*"
        assert "retry-after" in answer.headers["access-control-expose-headers"]


@on_uvloop
async def test_a_star_allows_every_origin() -> None:
    async with running(allowed_origins=["*"]) as s:
        for origin in (APP, EVIL, "null"):
            assert allowed((await s.post(headers={"origin": origin})).headers) == "*"
            answer = await preflight(s, origin, "/no/such/path")
            assert (answer.status, allowed(answer.headers)) == (200, "*")
        assert "access-control-allow-credentials" not in answer.headers


@on_uvloop
async def test_off_by_default() -> None:
    async with running() as s:
        answer = await s.post(headers={"origin": APP})
        assert answer.status == 200
        assert not [name for name in answer.headers if re.match("access-control|vary", name, re.IGNORECASE)]
        answer = await preflight(s)
        assert (answer.status, allowed(answer.headers)) == (405, None)


@pytest.mark.parametrize("asked", ["", "a b", "x" * 2000, "a,,b", "a;b", "a:b"])
@on_uvloop
async def test_odd_names_of_headers_are_not_repeated(asked: str) -> None:
    async with running(allowed_origins=["*"]) as s:
        answer = await preflight(s, asked=asked)
        assert answer.status == 200
        assert "access-control-allow-headers" not in answer.headers


@on_uvloop
async def test_a_reload_changes_the_origins() -> None:
    async with running(allowed_origins=[APP]) as s:
        s.router.clients.cors.allow([EVIL])
        assert allowed((await s.post(headers={"origin": APP})).headers) is None
        assert allowed((await s.post(headers={"origin": EVIL})).headers) == EVIL


@on_uvloop
async def test_the_admin_address_allows_no_other_origin(admin: dict[str, Any]) -> None:
    async with running(**admin, allowed_origins=["*"]) as s, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{s.router.admin_port}/admin/workers"
        async with session.get(url, headers={**bearer(KEY), "origin": APP}) as answer:
            assert (answer.status, allowed(answer.headers)) == (200, None)
        async with session.options(url, headers={"origin": APP, "access-control-request-method": "GET"}) as answer:
            assert (answer.status, allowed(answer.headers)) == (401, None)


# What a page gets for a request: the status and the text, or that it may read neither.
FETCH = """async ([url, key, body]) => {
    const headers = {"content-type": "application/json", ...(key ? {authorization: "Bearer " + key} : {})}
    try {
        const answer = await fetch(url + "/v1/chat/completions", {method: "POST", headers, body: JSON.stringify(body)})
        return [answer.status, await answer.text(), answer.headers.get("x-request-id") !== null]
    } catch (error) {
        return [0, error.name, false]
    }
}"""


@on_uvloop
async def test_a_real_browser_lets_pages_of_allowed_origins_read_all_answers(key_file: Path) -> None:
    async def page_of_another_origin(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reply(writer, 200, b"<title>app</title>", "content-type: text/html\r\n")
        writer.close()

    server = await asyncio.start_server(page_of_another_origin, "127.0.0.1", 0)
    app = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with async_playwright() as play:
        browser = await play.chromium.launch(executable_path=browser_path(), args=FLAGS)
        page = await browser.new_page()
        await page.goto(app)
        async with running(api_key_file=key_file, allowed_origins=[app]) as s:
            status, text, named = await page.evaluate(FETCH, [s.url, "secret", {**CHAT, "stream": True}])
            assert (status, named, "[DONE]" in text) == (200, True, True)
            status, text, _ = await page.evaluate(FETCH, [s.url, "", CHAT])
            assert (status, "an API key is required" in text) == (401, True)
            status, text, named = await page.evaluate(FETCH, [s.url, "secret", {**CHAT, "model": "other"}])
            assert (status, named, "does not exist" in text) == (404, True, True)
        async with running(api_key_file=key_file, allowed_origins=[APP]) as s:
            assert await page.evaluate(FETCH, [s.url, "secret", CHAT]) == [0, "TypeError", False]
            assert s.prefill[0].generated == []
        await browser.close()
    server.close()


def test_origins_are_kept_as_browsers_write_them() -> None:
    def origins(*given: str) -> tuple[str, ...]:
        return RouterConfig.of(
            prefill=["http://p:1"], decode=["http://d:1"], allowed_origins=given
        ).listen.allowed_origins

    assert origins("HTTPS://App.Example:443", "http://a:80", "http://a:443") == (APP, "http://a", "http://a:443")
    assert origins(APP, APP) == (APP,)
    assert origins("chrome-extension://abc", "http://[::1]:3000") == ("chrome-extension://abc", "http://[::1]:3000")
    for wrong in (
        "null",
        APP + "/",
        APP + "/x",
        "app.example",
        "https://*.example",
        "https://a\r\nb",
        json.dumps(["*"]),
    ):
        with pytest.raises(ConfigError, match=r"allowed_origins: .* is no origin, expected SCHEME://HOST"):
            origins(wrong)
