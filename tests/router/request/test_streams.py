"""Streams: what their first event is, where they end, and what a client gets in between."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from tests.router.fake_worker import Behaviour, FakeWorker, Seen, begin_stream, chunk, end_stream
from tests.router.harness import ASK, Reply, Scripted, Setup, on_uvloop, running, until

STREAM = {**ASK, "stream": True}
ENGINE_DIED = b'data: {"error":{"message":"engine died","type":"InternalServerError","param":null,"code":500}}\n\n'
TOO_LONG = b'data: {"error":{"message":"no such grammar","type":"BadRequestError","param":null,"code":400}}\n\n'
# Pieces of a stream; None ends the connection before the end of the body.
Pieces = Callable[[FakeWorker, Seen], list[bytes | None]]


def sending(pieces: Pieces) -> Behaviour:
    async def behave(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await begin_stream(writer)
        for piece in pieces(worker, seen):
            if piece is None:
                writer.transport.abort()
                return
            await chunk(writer, piece)
            await asyncio.sleep(0.002)  # so that pieces arrive one by one
        await end_stream(writer)

    return behave


def token(worker: FakeWorker, seen: Seen, text: str = "a") -> bytes:
    return worker.events(seen, [text], False)[0]


async def posted(s: Setup, body: object = STREAM) -> tuple[Reply, bool]:
    """The answer as far as it came, and whether the body had its proper end."""
    answer = await s.session.post(f"{s.url}/v1/completions", json=body)
    raw, whole = b"", True
    try:
        async for piece in answer.content.iter_any():
            raw += piece
    except Exception:
        whole = False
    return Reply(answer.status, answer.headers, raw), whole


@pytest.mark.parametrize(
    "first", [b": ping\n\n", b"retry: 1000\n\n", b"id: 7\n\n", b"event: ping\n\n", b"data:\n\n", b": a"]
)
@on_uvloop
async def test_what_has_no_data_is_not_the_first_event(first: bytes) -> None:
    """An error behind it still sends the request to another worker."""
    async with running(decode=2, policy=Scripted()) as s:
        s.decode[0].behaviour = sending(lambda worker, seen: [first, b"\n\n" + ENGINE_DIED, b"data: [DONE]\n\n"])
        answer, whole = await posted(s)
        assert (answer.status, whole) == (200, True)
        assert "".join(event["choices"][0]["text"] for event in answer.events[:-1]) == "abcd"
        assert len(s.decode[0].generated) == len(s.decode[1].generated) == 1
        assert await s.metric("eldr_retries_total", leg="decode", reason="wrong_answer") == 1


@on_uvloop
async def test_an_error_in_the_first_piece_is_found_before_the_end() -> None:
    """A worker that was slow to be read sends its first token, its error and its end at once."""
    async with running(decode=2, policy=Scripted()) as s:
        s.decode[0].behaviour = sending(
            lambda worker, seen: [token(worker, seen) + ENGINE_DIED + b"data: [DONE]\n\n"],
        )
        answer, whole = await posted(s)
        assert (answer.status, whole) == (200, True)
        assert "".join(event["choices"][0]["text"] for event in answer.events[:-1]) == "abcd"
        assert await s.metric("eldr_retries_total", leg="decode", reason="wrong_answer") == 1


@on_uvloop
async def test_comments_do_not_end_the_wait_for_the_first_event() -> None:
    async def pings(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await begin_stream(writer)
        while True:
            await chunk(writer, b": ping\n\n")
            await asyncio.sleep(0.01)

    async with running(decode=2, policy=Scripted(), decode_first_byte_timeout_s=0.3) as s:
        s.decode[0].behaviour = pings
        answer, whole = await posted(s)
        assert (answer.status, whole) == (200, True)
        assert b"ping" not in answer.body
        assert await s.metric("eldr_timeouts_total", leg="first_byte") == 1


@on_uvloop
async def test_endless_comments_are_given_up() -> None:
    async with running(decode=2, policy=Scripted()) as s:
        s.decode[0].behaviour = sending(lambda worker, seen: [b": " + 65534 * b"x"] * 20)
        answer, whole = await posted(s)
        assert (answer.status, whole) == (200, True)
        assert await s.metric("eldr_retries_total", leg="decode", reason="wrong_answer") == 1


@on_uvloop
async def test_what_came_before_the_first_event_reaches_the_client_with_it() -> None:
    async with running() as s:
        s.decode[0].behaviour = sending(
            lambda worker, seen: [
                b": pi",
                b"ng\r\n\r\nretry: 10\n\n",
                token(worker, seen),
                b": pong\n\n",
                b"data: [DONE]\n\n",
            ]
        )
        answer, whole = await posted(s)
        assert whole
        assert answer.body.startswith(b": ping\r\n\r\nretry: 10\n\ndata: {")
        assert answer.body.endswith(b"}\n\n: pong\n\ndata: [DONE]\n\n")
        await until(lambda: not s.decode[0].running, "the end")
        assert await s.metric("eldr_stream_events_total") == 2


def large(worker: FakeWorker, seen: Seen, id_first: bool = True) -> list[bytes | None]:
    event = json.loads(token(worker, seen).removeprefix(b"data: "))
    event["choices"][0]["prompt_token_ids"] = [100_000] * 300_000
    if not id_first:
        event["id"] = event.pop("id")
    data = b"data: %b\n\n" % json.dumps(event).encode()
    return [
        *(data[at : at + 50_000] for at in range(0, len(data), 50_000)),
        token(worker, seen, "b"),
        b"data: [DONE]\n\n",
    ]


@pytest.mark.parametrize("id_first", [True, False])
@on_uvloop
async def test_a_first_event_of_megabytes_is_passed_on(id_first: bool) -> None:
    """As with return_token_ids and a long prompt. Nobody is blamed, wherever the worker puts the id."""
    async with running(decode=2) as s:
        await s.post(STREAM)  # from now on, answers must have their requests' ids
        for worker in s.decode:
            worker.behaviour = sending(lambda worker, seen: large(worker, seen, id_first))
        for _ in range(3):
            answer, whole = await posted(s)
            assert (answer.status, whole) == (200, True)
            assert answer.events[0]["choices"][0]["prompt_token_ids"][-1] == 100_000
            assert answer.events[1]["choices"][0]["text"] == "b"
        assert sum(len(worker.generated) for worker in s.decode) == 4
        assert await s.metric("eldr_worker_failures_total") == 0
        assert await s.metric("eldr_stream_events_total") == 5 + 3 * 3


@on_uvloop
async def test_a_long_first_event_of_another_request_is_refused() -> None:
    async with running(decode=2, policy=Scripted()) as s:
        await s.post(STREAM)
        s.decode[0].behaviour = sending(
            lambda worker, seen: [
                piece.replace(seen.headers["x-request-id"].encode(), b"another") if piece else piece
                for piece in large(worker, seen)
            ]
        )
        answer, whole = await posted(s)
        assert (answer.status, whole) == (200, True)
        assert b"another" not in answer.body
        assert await s.metric("eldr_retries_total", leg="decode", reason="wrong_answer") == 1


@on_uvloop
async def test_an_id_far_from_the_start_of_an_event_is_found() -> None:
    async with running(decode=2) as s:
        await s.post(STREAM)

        def late(worker: FakeWorker, seen: Seen) -> list[bytes | None]:
            event = json.loads(token(worker, seen).removeprefix(b"data: "))
            event = {"choices": event["choices"], "padding": "x" * 2000, "id": event["id"]}
            return [b"data: %b\n\n" % json.dumps(event).encode(), b"data: [DONE]\n\n"]

        for worker in s.decode:
            worker.behaviour = sending(late)
        assert (await posted(s))[0].events[0]["padding"]
        assert await s.metric("eldr_worker_failures_total") == 0


WHOLE: dict[str, list[bytes | None]] = {
    "without a space": [b"data:[DONE]\n\n"],
    "CRLF": [b"data: [DONE]\r\n\r\n"],
    "CR, cut": [b"data: [DO", b"NE]\r", b"\r"],
    "a comment behind": [b"data: [DONE]\n\n: bye\n\n"],
    "a comment in a piece behind": [b"data: [DONE]\n\n", b": bye\n\n\n"],
    "no blank line": [b"data: [DONE]\n"],
    "no line end": [b"data: [DONE]"],
    "an event behind": [b'data: [DONE]\n\ndata: {"statistics":1}\n\n'],
    "with an id": [b"id: 9\ndata: [DONE]\n\n"],
    "the connection breaks behind it": [b"data: [DONE]\n\n", None],
}
BROKEN: dict[str, list[bytes | None]] = {
    "nothing": [],
    "in a text, cut": [b'data: {"choices":[{"index":0,"text":"ends in [DONE]'],
    "in a text": [b'data: {"choices":[{"index":0,"text":"[DONE]"}]}\n\n'],
    "in a comment": [b": data: [DONE]\n\n"],
    "another field": [b"id: [DONE]\n\n"],
    "more than that": [b"data: [DONE]x\n\n"],
    "two lines": [b"data: [DONE]\ndata: [DONE]\n\n"],
    "in quotation marks": [b'data: "[DONE]"\n\n'],
    "the connection breaks": [None],
}


@pytest.mark.parametrize("end", WHOLE)
@on_uvloop
async def test_a_stream_ends_with_done(end: str) -> None:
    async with running() as s:
        s.decode[0].behaviour = sending(lambda worker, seen: [token(worker, seen), *WHOLE[end]])
        answer, whole = await posted(s)
        assert whole
        assert answer.body.endswith(b"".join(piece for piece in WHOLE[end] if piece))
        await until(lambda: not s.decode[0].running, "the end")
        assert await s.metric("eldr_broken_streams_total") == 0
        assert await s.metric("eldr_worker_failures_total") == 0


@pytest.mark.parametrize("end", BROKEN)
@on_uvloop
async def test_a_stream_ends_with_nothing_else(end: str) -> None:
    async with running() as s:
        s.decode[0].behaviour = sending(lambda worker, seen: [token(worker, seen), *BROKEN[end]])
        answer, whole = await posted(s)
        assert not whole
        *_, last, rest = answer.body.split(b"\n\n")
        assert rest == b""
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == 502
        assert await s.metric("eldr_broken_streams_total") == 1


@pytest.mark.parametrize(
    ("error", "failures"), [(ENGINE_DIED, 1), (TOO_LONG, 0), (b'data: {"error":null,"x":1}\n\n', 0)]
)
@on_uvloop
async def test_only_an_error_of_the_server_within_a_stream_counts_against_the_worker(
    error: bytes, failures: int
) -> None:
    async with running() as s:
        s.decode[0].behaviour = sending(lambda worker, seen: [token(worker, seen), error, b"data: [DONE]\n\n"])
        answer, whole = await posted(s)
        assert whole
        assert answer.body.endswith(error + b"data: [DONE]\n\n")
        assert await s.metric("eldr_worker_failures_total", reason="broken_stream") == failures


@on_uvloop
async def test_an_error_about_the_request_is_passed_on_as_the_first_event_and_blames_nobody() -> None:
    long = TOO_LONG.replace(b"no such grammar", b"x" * 100_000)
    async with running() as s:
        for error in (TOO_LONG, long):
            s.decode[0].behaviour = sending(lambda worker, seen, error=error: [error, b"data: [DONE]\n\n"])  # type: ignore[misc]
            answer, whole = await posted(s)
            assert (answer.status, whole, answer.body) == (200, True, error + b"data: [DONE]\n\n")
        assert await s.metric("eldr_worker_failures_total") == 0


@on_uvloop
async def test_comments_between_tokens_are_no_tokens() -> None:
    async with running() as s:
        pings: list[bytes | None] = [b": ping\n\n"] * 3
        s.decode[0].behaviour = sending(
            lambda worker, seen: [token(worker, seen), *pings, token(worker, seen), b"data: [DONE]\n\n"]
        )
        answer, _ = await posted(s)
        assert answer.body.count(b": ping\n\n") == 3
        assert await s.metric("eldr_stream_events_total") == 3
        assert await s.metric("eldr_inter_token_latency_seconds_count") == 1


@pytest.mark.parametrize(
    "media_type",
    [
        "Text/Event-Stream",
        "TEXT/EVENT-STREAM;charset=UTF-8",
        'text/event-stream ; charset="utf-8"; x=1',
        "text/event-stream  ",
    ],
)
@on_uvloop
async def test_media_types_ignore_case(media_type: str) -> None:
    async def shouted(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ntransfer-encoding: chunked\r\n\r\n" % media_type.encode())
        await chunk(writer, token(worker, seen) + b"data: [DONE]\n\n")
        await end_stream(writer)

    async with running() as s:
        s.decode[0].behaviour = shouted
        answer, whole = await posted(s)
        assert (answer.status, whole) == (200, True)
        assert answer.headers["content-type"] == media_type.strip()
