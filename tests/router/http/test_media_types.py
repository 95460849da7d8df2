"""Media types: what is one, what it is called, and what an Accept header asks for."""

from __future__ import annotations

import pytest

from eldr.router.http.media_types import accepts, essence
from tests.router.harness import ASK, on_uvloop, running


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"application/json", b"application/json"),
        (b"Application/JSON", b"application/json"),
        (b" text/event-stream\t", b"text/event-stream"),
        (b"text/event-stream;charset=utf-8", b"text/event-stream"),
        (b'text/plain; charset="utf-8" ; x=y', b"text/plain"),
        (b'text/plain; x="a;b, \\"c\\""', b"text/plain"),
        (b"text/plain;", b"text/plain"),
        (b"text/plain; ; a=b", b"text/plain"),
        (b"", b""),
        (b"text", b""),
        (b"text/", b""),
        (b"text /plain", b""),
        (b"text/plain, text/html", b""),
        (b"text/plain charset=utf-8", b""),
        (b"text/plain; charset", b""),
        (b'text/plain; charset="utf-8', b""),
        (b"text/plain; a=b\r\nx: y", b""),
        (b"text/plain" + b"; " * 40_000, b""),
    ],
)
def test_essence(value: bytes, expected: bytes) -> None:
    assert essence(value) == expected


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (b"application/openmetrics-text", True),
        (b"APPLICATION/OpenMetrics-Text;version=1.0.0;q=0.5,text/plain;q=0.3", True),
        (b"text/plain , application/openmetrics-text; version=1.0.0", True),
        (b"text/plain", False),
        (b"application/openmetrics-text-x", False),
        (b"application/openmetrics-text; Q=0", False),
        (b"application/openmetrics-text;q=0.000 ,*/*", False),
        (b"application/openmetrics-text;q=0.01", True),
        (b"", False),
    ],
)
def test_accept(accept: bytes, expected: bool) -> None:
    assert accepts(accept, b"application/openmetrics-text") is expected


@pytest.mark.parametrize("media_type", ["APPLICATION/JSON", 'application/json; charset="utf-8"', "application/json;"])
@on_uvloop
async def test_a_client_may_write_json_as_it_likes(media_type: str) -> None:
    async with running() as s:
        assert (await s.post(ASK, headers={"content-type": media_type})).status == 200


@on_uvloop
async def test_metrics_are_written_in_the_format_that_is_asked_for() -> None:
    async with running() as s:
        for accept, expected in (
            ("APPLICATION/OPENMETRICS-TEXT", "application/openmetrics-text"),
            ("*/*", "text/plain"),
        ):
            answer = await s.get("/metrics", {"accept": accept})
            assert answer.headers["content-type"].startswith(expected)
