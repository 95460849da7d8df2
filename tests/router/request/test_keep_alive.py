"""Comments to clients whose streams are silent, and what an error looks like after them."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from tests.router.failing import hang
from tests.router.fake_worker import FakeWorker, Seen, begin_stream, chunk, end_stream, reply
from tests.router.harness import ASK, CHAT, Scripted, Setup, on_uvloop, raw_stream, running, until

PING = b": keep-alive\n\n"
STREAM = {**ASK, "stream": True}
EVERY_S = 0.05


async def late(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(5 * EVERY_S)
    await worker.answer(seen, writer)


async def posted(s: Setup, body: object = STREAM) -> tuple[int, bytes, bool]:
    """Status and body of an answer, and whether the body had its proper end."""
    raw, whole = b"", True
    async with s.session.post(f"{s.url}/v1/completions", json=body) as answer:
        try:
            async for piece in answer.content.iter_any():
                raw += piece
        except Exception:
            whole = False
    return answer.status, raw, whole


def text_of(raw: bytes) -> str:
    events = [part.removeprefix(b"data: ") for part in raw.split(b"\n\n") if part.startswith(b"data: {")]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def error_of(raw: bytes) -> dict[str, object]:
    """The error in the last event of a stream, which has no other event."""
    event, rest = raw.replace(PING, b"").split(b"\n\n")
    assert rest == b""
    return json.loads(event.removeprefix(b"data: "))["error"]


@pytest.mark.parametrize("role", ["prefill", "decode"])
@on_uvloop
async def test_a_client_hears_that_its_request_waits(role: str) -> None:
    async with running(stream_keepalive_s=EVERY_S) as s:
        getattr(s, role)[0].behaviour = late
        status, raw, whole = await posted(s)
        assert (status, whole) == (200, True)
        assert raw.startswith(2 * PING)
        assert text_of(raw) == "abcd"
        assert raw.endswith(b"data: [DONE]\n\n")


@on_uvloop
async def test_the_queue_is_a_wait_too() -> None:
    async with running(stream_keepalive_s=EVERY_S, max_inflight=1) as s:
        s.decode[0].behaviour = late
        first = asyncio.create_task(posted(s))
        await until(lambda: s.decode[0].running, "the first runs")
        _, raw, whole = await posted(s)
        assert whole
        assert raw.startswith(2 * PING)
        await first


@on_uvloop
async def test_comments_come_between_events_only() -> None:
    async def halting(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        first, *others = worker.events(seen, ["a", "b"], False)
        await begin_stream(writer)
        await chunk(writer, first[:20])
        await asyncio.sleep(4 * EVERY_S)
        await chunk(writer, first[20:] + others[0][:20])
        await asyncio.sleep(4 * EVERY_S)
        await chunk(writer, others[0][20:])
        await asyncio.sleep(4 * EVERY_S)
        await chunk(writer, others[1])
        await end_stream(writer)

    async with running(stream_keepalive_s=EVERY_S) as s:
        s.decode[0].behaviour = halting
        _, raw, whole = await posted(s)
        assert whole
        assert text_of(raw) == "ab"
        before, first, *pings, done, rest = raw.replace(PING, b"\0").split(b"\n\n")
        assert before.startswith(b"\0\0")
        assert b"\0" not in first
        assert pings == []
        assert done.startswith(b"\0\0")
        assert done.endswith(b"data: [DONE]")
        assert rest == b""


@on_uvloop
async def test_a_stream_that_flows_has_no_comments() -> None:
    async with running(stream_keepalive_s=0.5) as s:
        s.decode[0].tokens = ["a"] * 40
        s.decode[0].token_gap_s = 0.03  # more than a second in all
        _, raw, whole = await posted(s, {**STREAM, "max_tokens": 40})
        assert whole
        assert text_of(raw) == 40 * "a"
        assert PING not in raw


@on_uvloop
async def test_another_worker_is_still_tried_after_a_comment() -> None:
    async with running(
        decode=2, policy=Scripted(), stream_keepalive_s=EVERY_S, decode_first_byte_timeout_s=5 * EVERY_S
    ) as s:
        s.decode[0].behaviour = hang
        status, raw, whole = await posted(s)
        assert (status, whole) == (200, True)
        assert raw.startswith(PING)
        assert text_of(raw) == "abcd"
        assert await s.metric("eldr_retries_total", reason="timeout") == 1


@on_uvloop
async def test_an_answer_in_time_looks_as_ever() -> None:
    async with running(stream_keepalive_s=30) as s:
        with_setting = await posted(s)
        bad = await s.post({**STREAM, "model": "none"})
        whole = await s.post()
    assert PING not in with_setting[1]
    assert (bad.status, whole.status) == (404, 200)


@on_uvloop
async def test_it_is_off_unless_set() -> None:
    async with running() as s:
        s.decode[0].behaviour = late
        assert PING not in (await posted(s))[1]


@on_uvloop
async def test_answers_that_are_not_streamed_get_no_comments() -> None:
    async with running(stream_keepalive_s=EVERY_S) as s:
        s.decode[0].behaviour = late
        answer = await s.post()
        assert answer.json()["choices"][0]["text"] == "abcd"


@on_uvloop
async def test_a_workers_error_becomes_an_event_with_its_message() -> None:
    error = {"message": "max_tokens is too large", "type": "BadRequestError", "param": "max_tokens", "code": 400}

    async def refuse(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await asyncio.sleep(3 * EVERY_S)
        await reply(writer, 400, json.dumps({"error": error}).encode())

    async with running(stream_keepalive_s=EVERY_S) as s:
        s.prefill[0].behaviour = refuse
        status, raw, whole = await posted(s)
        assert (status, whole) == (200, False)
        assert error_of(raw) == error
        assert await s.metric("eldr_request_total", status="400") == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>", "the worker answered with status 422"),
        (b'{"error":"Unauthorized"}', "Unauthorized"),
        (b'{"error":{"message":7,"param":7}}', "the worker answered with status 422"),
        (b"[]", "the worker answered with status 422"),
    ],
)
@on_uvloop
async def test_whatever_a_worker_answers_the_event_is_an_error(body: bytes, message: str) -> None:
    async def refuse(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await asyncio.sleep(3 * EVERY_S)
        await reply(writer, 422, body)

    async with running(stream_keepalive_s=EVERY_S) as s:
        s.decode[0].behaviour = refuse
        _, raw, whole = await posted(s)
        assert not whole
        assert error_of(raw) == {"message": message, "type": "BadRequestError", "param": None, "code": 422}


@on_uvloop
async def test_the_routers_deadline_becomes_an_event() -> None:
    async with running(stream_keepalive_s=EVERY_S, request_timeout_s=6 * EVERY_S) as s:
        s.decode[0].behaviour = hang
        status, raw, whole = await posted(s)
        assert (status, whole) == (200, False)
        assert error_of(raw)["code"] == 504
        assert await s.metric("eldr_timeouts_total", leg="total") == 1
        await until(lambda: s.decode[0].generated[0].aborted, "the worker hears of it")


@on_uvloop
async def test_a_client_that_hears_something_does_not_give_up() -> None:
    """Its read timeout starts anew with each byte, so it no longer limits the time to the first event."""
    async with running(stream_keepalive_s=EVERY_S) as s:
        s.decode[0].behaviour = late
        client = openai.AsyncOpenAI(base_url=f"{s.url}/v1", api_key="unused", max_retries=0, timeout=3 * EVERY_S)
        stream = await client.completions.create(model="tiny", prompt="hello", max_tokens=4, stream=True)
        assert "".join([event.choices[0].text async for event in stream]) == "abcd"
        s.decode[0].behaviour = hang
        s.router.services.config.timeouts.request_timeout_s = 4 * EVERY_S
        with pytest.raises(openai.APIError, match="was not answered in the time"):
            async for _ in await client.chat.completions.create(**CHAT, stream=True):
                pass
        await client.close()


@on_uvloop
async def test_a_client_that_leaves_while_it_waits_ends_its_request() -> None:
    async with running(stream_keepalive_s=EVERY_S) as s:
        s.decode[0].behaviour = hang
        reader, writer = await asyncio.open_connection("127.0.0.1", s.router.port)
        body = json.dumps(STREAM).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        writer.write(b"content-length: %d\r\n\r\n%b" % (len(body), body))
        await reader.readuntil(PING + b"\r\n")
        writer.close()
        await until(lambda: s.decode[0].generated[0].aborted, "the worker hears of it")
        assert await s.metric("eldr_client_disconnects_total") == 1
        assert await s.metric("eldr_admitted") == 0


@on_uvloop
async def test_a_router_that_stops_tells_a_client_that_waits() -> None:
    async with running(stream_keepalive_s=EVERY_S) as s:
        s.decode[0].behaviour = hang
        raw = asyncio.create_task(raw_stream(s, b"connection: close\r\n"))
        await asyncio.sleep(3 * EVERY_S)
        await s.router.stop(0)
        assert b"shutting down" in await raw
        assert not raw.result().endswith(b"0\r\n\r\n")


@on_uvloop
async def test_an_old_client_gets_comments_without_chunks() -> None:
    async with running(stream_keepalive_s=EVERY_S) as s:
        s.decode[0].behaviour = late
        reader, writer = await asyncio.open_connection("127.0.0.1", s.router.port)
        body = json.dumps(STREAM).encode()
        writer.write(b"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\n")
        writer.write(b"content-length: %d\r\n\r\n%b" % (len(body), body))
        head, _, raw = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert b"transfer-encoding" not in head
        assert raw.startswith(PING + PING)
        assert text_of(raw) == "abcd"
