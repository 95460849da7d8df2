"""Workers whose answers are good HTTP and still no answer, and such as never come to an end.

Whatever one of them does, its client gets the whole text of a good worker, or an error that says so; other requests
are served meanwhile, and nothing stays behind in the counts.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from eldr.router.fleet.workers import Worker
from tests.router.failing import hang
from tests.router.fake_worker import Behaviour, FakeWorker, Seen, begin_stream, chunk, end_stream, reply
from tests.router.harness import ASK, CHAT, Reply, Scripted, Setup, on_uvloop, preferring, raw_stream, running, until

ERROR: dict[str, Any] = {"error": {"message": "engine died", "type": "InternalServerError", "param": None, "code": 500}}


def whole(worker: FakeWorker, seen: Seen, **changes: Any) -> bytes:
    return json.dumps({**worker.whole(seen, ["a"], False), **changes}).encode()


async def error_with_200(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await reply(writer, 200, json.dumps(ERROR).encode())


async def error_event_first(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await begin_stream(writer)
    await chunk(writer, b"data: %b\n\n" % json.dumps(ERROR).encode())
    await chunk(writer, b"data: [DONE]\n\n")
    await end_stream(writer)


async def half_json(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reply(writer, 200, whole(worker, seen)[:-20])


async def another_object(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await reply(writer, 200, b'{"status":"ok"}')


async def a_list(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reply(writer, 200, b"[]")


async def html(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reply(writer, 200, b"<html>it works</html>", "content-type: text/html\r\n")


async def redirect(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reply(writer, 307, b"", "location: http://169.254.169.254/\r\n")


async def no_content(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await reply(writer, 204, b"")


async def odd_status(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await reply(writer, 799, b"{}")


async def empty_stream(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await begin_stream(writer)
    await end_stream(writer)


async def huge_header(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nx-more: " + b"x" * 200_000 + b"\r\ncontent-length: 0\r\n\r\n")
    await writer.drain()


async def endless_header(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nx-more: ")
    while not writer.transport.is_closing():
        writer.write(b"x" * 10_000)
        await writer.drain()
        await asyncio.sleep(0)


async def many_headers(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n" + b"".join(b"x-%d: %b\r\n" % (n, b"y" * 100) for n in range(2000)))
    writer.write(b"content-length: 2\r\n\r\n{}")
    await writer.drain()


async def bad_chunk(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await begin_stream(writer)
    writer.write(b"zz\r\nhello\r\n")
    await writer.drain()


async def two_lengths(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 5\r\n\r\n{}abc")
    await writer.drain()


async def upgrade(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
    await writer.drain()


async def stream_for_all(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await worker.stream(seen, writer, ["x", "y"], False)


async def whole_for_all(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await reply(writer, 200, whole(worker, seen))


ALWAYS = [
    error_with_200, another_object, a_list, html, redirect, no_content, odd_status, empty_stream, huge_header,
    endless_header, many_headers, bad_chunk, two_lengths, upgrade,
]  # fmt: skip


def text_of(answer: Reply, stream: bool) -> str:
    if not stream:
        return answer.json()["choices"][0]["text"]
    assert answer.events[-1] == "data: [DONE]"
    return "".join(event["choices"][0]["text"] for event in answer.events[:-1])


async def assert_settled(s: Setup) -> None:
    """Nothing is left of the requests, and the next one is served."""
    for worker in (*s.prefill, *s.decode):
        worker.behaviour = None
    assert (await s.post()).status == 200
    assert await s.metric("eldr_inflight") == 0
    assert await s.metric("eldr_admitted") == 0
    assert await s.metric("eldr_queued") == 0
    pools = s.router.services.legs.pools
    await until(lambda: not any(pool.active for pool in pools.values()), "no exchange is left, probes aside")


@asynccontextmanager
async def running_with_a_favourite(**settings: Any) -> AsyncIterator[Setup]:
    """Two decode workers. Every request tries the first one first, and so meets its behaviour."""
    policy = Scripted()
    async with running(decode=2, policy=policy, **settings) as s:
        policy.rule = preferring(s.decode[0])
        yield s


async def home_of(s: Setup) -> FakeWorker:
    """The prefill worker to which the prompt of ASK belongs."""
    assert (await s.post()).status == 200
    return next(worker for worker in s.prefill if worker.generated)


def single_use(s: Setup) -> list[str]:
    """Every hand-off that a decode worker got a byte of, each once."""
    sent = [
        seen.body["kv_transfer_params"]["remote_request_id"]
        for worker in s.decode
        for seen in worker.generated
        if "kv_transfer_params" in seen.body
    ]
    assert len(sent) == len(set(sent))
    return sent


@pytest.mark.parametrize(
    ("fault", "stream"),
    [(fault, stream) for fault in ALWAYS for stream in (False, True)]
    + [(half_json, False), (error_event_first, True), (stream_for_all, False), (whole_for_all, True)],
)
@on_uvloop
async def test_a_decode_workers_lie_is_repaired_by_another_worker(fault: Behaviour, stream: bool) -> None:
    async with running_with_a_favourite() as s:
        s.decode[0].behaviour = fault
        other = asyncio.create_task(s.post({**ASK, "prompt": "another"}))
        answer = await s.post({**ASK, "stream": stream})
        assert answer.status == 200
        assert text_of(answer, stream) == "abcd"
        assert (await other).status == 200
        assert len(single_use(s)) == len(s.prefill[0].generated)
        assert await s.metric("eldr_worker_failures_total", worker=s.decode[0].url) > 0
        await assert_settled(s)


@pytest.mark.parametrize("fault", [*ALWAYS, half_json, stream_for_all])
@on_uvloop
async def test_a_prefill_workers_lie_is_repaired_by_another_worker(fault: Behaviour) -> None:
    async with running(prefill=2) as s:
        liar = await home_of(s)
        liar.behaviour = fault
        assert text_of(await s.post(), False) == "abcd"
        single_use(s)
        assert await s.metric("eldr_retries_total", leg="prefill") == 1
        assert await s.metric("eldr_worker_failures_total", worker=liar.url) == 1
        await assert_settled(s)


@pytest.mark.parametrize("fault", [error_with_200, half_json, html])
@on_uvloop
async def test_when_everybody_lies_the_client_hears_of_it(fault: Behaviour) -> None:
    async with running(decode=2) as s:
        for worker in s.decode:
            worker.behaviour = fault
        answer = await s.post()
        assert (answer.status, answer.error["code"]) == (502, 502)
        assert len(single_use(s)) == 3
        assert await s.metric("eldr_retries_denied_total", leg="decode", reason="tries") == 1
        await assert_settled(s)


@pytest.mark.parametrize("end", ["no done", "done in pieces", "error in the middle", "a piece of an event"])
@on_uvloop
async def test_only_done_ends_a_stream(end: str) -> None:
    async def partly(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await begin_stream(writer)
        first, second, *_, done = worker.events(seen, ["a", "b", "c"], False)
        await chunk(writer, first)
        if end == "no done":
            await chunk(writer, second)
        elif end == "done in pieces":
            for n in range(len(done)):
                await chunk(writer, done[n : n + 1])
        elif end == "a piece of an event":
            await chunk(writer, second[:-7])
        else:
            await chunk(writer, b"data: %b\n\n" % json.dumps(ERROR).encode())
            await chunk(writer, done)
        await end_stream(writer)

    async with running() as s:
        s.decode[0].behaviour = partly
        raw = await raw_stream(s, b"connection: close\r\n")
        complete = end in ("done in pieces", "error in the middle")
        assert raw.endswith(b"0\r\n\r\n") == complete
        assert (b'"error"' in raw) == (end != "done in pieces")
        assert await s.metric("eldr_broken_streams_total") == (end != "done in pieces")
        await assert_settled(s)


@on_uvloop
async def test_the_client_gets_no_part_of_an_event_before_all_of_it() -> None:
    """So that what breaks within the first event can still be repaired."""

    async def breaks_off(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await begin_stream(writer)
        for byte in worker.events(seen, ["a"], False)[0][:-1]:
            await chunk(writer, bytes([byte]))
        writer.transport.abort()

    async def drips(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await begin_stream(writer)
        for event in worker.events(seen, worker.tokens, False):
            for byte in event:
                await chunk(writer, bytes([byte]))
        await end_stream(writer)

    async with running_with_a_favourite() as s:
        s.decode[0].behaviour, s.decode[1].behaviour = breaks_off, drips
        assert text_of(await s.post({**ASK, "stream": True}), True) == "abcd"
        await assert_settled(s)


# Answers of somebody else.


def named(behaviour_of: Callable[..., Any]) -> Callable[..., Any]:
    """A behaviour that answers every request under the name `behaviour_of` makes of its own."""

    async def answer(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        seen.headers["x-request-id"] = behaviour_of(seen.headers["x-request-id"])
        await worker.answer(seen, writer)

    return answer


@pytest.mark.parametrize("stream", [False, True])
@on_uvloop
async def test_an_answer_to_somebody_else_is_not_passed_on(stream: bool) -> None:
    async with running_with_a_favourite() as s:
        assert (await s.post({**ASK, "stream": stream})).status == 200  # the fleet names its answers
        s.decode[0].behaviour = named(lambda name: "of-somebody-else")
        answer = await s.post({**ASK, "stream": stream})
        assert text_of(answer, stream) == "abcd"
        assert b"somebody" not in answer.body
        assert await s.metric("eldr_worker_failures_total", reason="wrong_answer", worker=s.decode[0].url) == 1
        await assert_settled(s)


@on_uvloop
async def test_servers_that_name_nothing_are_taken_as_they_are() -> None:
    async with running(decode=2) as s:
        for worker in (*s.prefill, *s.decode):
            worker.behaviour = named(lambda name: "always-the-same")
        for stream in (False, True):
            assert text_of(await s.post({**ASK, "stream": stream}), stream) == "abcd"


@on_uvloop
async def test_names_with_odd_characters_are_recognized() -> None:
    async with running() as s:
        for name in ('with "quotes"', "back\\slash", "a/b<c>", "x" * 128):
            for stream in (False, True):
                answer = await s.post({**ASK, "stream": stream}, headers={"x-request-id": name})
                assert text_of(answer, stream) == "abcd"


@on_uvloop
async def test_a_handoff_of_another_request_is_never_used() -> None:
    """Its blocks hold another prompt: the decode worker would answer that one."""
    stolen: dict[str, Any] = {}

    async def gives_another(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        fields = worker.whole(seen, ["a"], False)
        fields["kv_transfer_params"] = stolen
        await reply(writer, 200, json.dumps(fields).encode())

    async with running(prefill=2, decode=1) as s:
        liar = await home_of(s)
        stolen.update(s.decode[0].generated[0].body["kv_transfer_params"])
        liar.behaviour = gives_another
        assert text_of(await s.post(), False) == "abcd"
        assert len(single_use(s)) == 2
        assert await s.metric("eldr_worker_failures_total", reason="wrong_answer", worker=liar.url) == 1
        await assert_settled(s)


@on_uvloop
async def test_the_name_of_a_prefill_does_not_depend_on_what_the_client_wants_streamed() -> None:
    """No prefill is streamed, so what was learned from one request holds for all."""
    async with running(prefill=2, decode=1) as s:
        liar = await home_of(s)
        for worker in s.prefill:
            worker.role = "plain"  # no hand-off, whose own name would give the liar away
        assert text_of(await s.post(), False) == "abcd"
        liar.behaviour = named(lambda name: "cmpl-another")
        assert text_of(await s.post({**ASK, "stream": True}), True) == "abcd"
        assert await s.metric("eldr_worker_failures_total", reason="wrong_answer", worker=liar.url) == 1
        await assert_settled(s)


# Answers that do not come, or not to an end.


async def head_only(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await begin_stream(writer)
    await asyncio.sleep(3600)


async def drip_forever(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    if seen.body.get("stream"):
        await begin_stream(writer)
        drop = b"1\r\n:\r\n"
    else:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000000\r\n\r\n")
        drop = b" "
    while not writer.transport.is_closing():
        writer.write(drop)
        await writer.drain()
        await asyncio.sleep(0.02)
    await hang(worker, seen, reader, writer)  # until the fake notices


LIMITS: dict[str, Any] = {"prefill_timeout_s": 0.5, "decode_first_byte_timeout_s": 0.5, "decode_answer_timeout_s": 0.5}


@pytest.mark.parametrize(
    ("fault", "stream"), [(hang, False), (hang, True), (head_only, True), (drip_forever, False), (drip_forever, True)]
)
@on_uvloop
async def test_a_decode_worker_that_takes_too_long_is_given_up(fault: Behaviour, stream: bool) -> None:
    async with running_with_a_favourite(**LIMITS) as s:
        s.decode[0].behaviour = fault
        assert text_of(await s.post({**ASK, "stream": stream}), stream) == "abcd"
        await until(lambda: s.decode[0].generated[0].aborted, "the slow worker hears of it")
        assert await s.metric("eldr_timeouts_total", leg="first_byte" if stream else "answer") == 1
        assert await s.metric("eldr_retries_total", leg="decode", reason="timeout") == 1
        await assert_settled(s)


@pytest.mark.parametrize("fault", [hang, drip_forever])
@on_uvloop
async def test_a_prefill_worker_that_takes_too_long_is_given_up(fault: Behaviour) -> None:
    async with running(**LIMITS, retries=0) as s:
        s.prefill[0].behaviour = fault
        answer = await s.post()
        assert (answer.status, answer.error["type"]) == (504, "GatewayTimeoutError")
        assert await s.metric("eldr_timeouts_total", leg="prefill") == 1
        await assert_settled(s)


@on_uvloop
async def test_a_stream_that_falls_silent_is_broken_off() -> None:
    async def falls_silent(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await begin_stream(writer)
        await chunk(writer, worker.events(seen, ["a"], False)[0])
        await asyncio.sleep(3600)

    async with running(decode_idle_timeout_s=0.5) as s:
        s.decode[0].behaviour = falls_silent
        raw = await raw_stream(s)
        assert json.loads(raw.rstrip().rsplit(b"data: ", 1)[1])["error"]["code"] == 504
        assert b"[DONE]" not in raw
        assert not raw.endswith(b"0\r\n\r\n")
        assert await s.metric("eldr_timeouts_total", leg="idle") == 1
        await until(lambda: s.decode[0].generated[0].aborted, "the silent worker hears of it")
        await assert_settled(s)


@on_uvloop
async def test_chat_is_checked_as_completions_are() -> None:
    async with running_with_a_favourite() as s:
        for stream in (False, True):
            s.decode[0].behaviour = None
            assert (await s.chat({**CHAT, "stream": stream})).status == 200
            s.decode[0].behaviour = named(lambda name: "of-somebody-else")
            answer = await s.chat({**CHAT, "stream": stream})
            assert answer.status == 200
            assert b"somebody" not in answer.body
        assert await s.metric("eldr_worker_failures_total", reason="wrong_answer", worker=s.decode[0].url) == 2


async def stream_error(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await begin_stream(writer)
    await chunk(writer, worker.events(seen, ["a"], seen.path.startswith("/v1/chat"))[0])
    writer.transport.abort()


@pytest.mark.parametrize("seed", range(2))
@on_uvloop
async def test_all_of_it_at_once(seed: int) -> None:
    """Whole and right, or an honest error: there is nothing in between, whatever workers and clients do."""
    chance = random.Random(seed)
    faults = [*ALWAYS, hang, drip_forever, stream_error, half_json]

    async def sometimes(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if chance.random() < 0.4:
            await chance.choice(faults)(worker, seen, reader, writer)
        else:
            await asyncio.sleep(chance.random() * 0.05)
            await worker.answer(seen, writer)

    async def one(s: Setup, number: int) -> str:
        stream, chat = chance.random() < 0.5, chance.random() < 0.5
        body = {**(CHAT if chat else ASK), "stream": stream}
        if not chat:
            body["prompt"] = f"prompt {number}"
        request = asyncio.ensure_future((s.chat if chat else s.post)(body))
        if chance.random() < 0.15:
            await asyncio.sleep(chance.random() * 0.3)
            request.cancel()
        try:
            answer = await request
        except asyncio.CancelledError:
            return "left"
        except aiohttp.ClientPayloadError:
            assert stream
            return "broken"  # cut off, and the client knows
        if answer.status != 200:
            assert answer.status in (502, 503, 504)
            assert answer.error["message"]
            return "refused"
        if not stream:
            choice = answer.json()["choices"][0]
            assert (choice["message"]["content"] if chat else choice["text"]) == "abcd"
            return "right"
        *events, done = answer.events
        assert done == "data: [DONE]"
        choices = [event["choices"][0] for event in events]
        said = [c["delta"].get("content", "") if chat else c["text"] for c in choices]
        assert "".join(said) == "abcd"
        return "right"

    settings = {**LIMITS, "decode_idle_timeout_s": 0.5, "eject_base_s": 0.2, "eject_max_s": 0.5, "retries": 3}
    async with running(prefill=3, decode=4, **settings) as s:
        for worker in (*s.prefill, *s.decode):
            worker.behaviour = sometimes
        ends = Counter(await asyncio.gather(*(one(s, number) for number in range(100))))
        assert ends["right"] > 0
        single_use(s)
        for worker in (*s.prefill, *s.decode):
            worker.behaviour = None
        await until(lambda: s.router.running == 0, "every request ends")
        workers = s.router.services.fleet.workers

        def out() -> list[Worker]:
            every = [*workers("prefill").values(), *workers("decode").values()]
            return [worker for worker in every if worker.ejected or worker.on_trial]

        number = 0
        while out():  # each comes back by a request of its own, prefill workers by one that belongs to them
            assert (await s.post({**ASK, "prompt": f"prompt {(number := number + 1)}"})).status == 200
        await assert_settled(s)
        assert await s.metric("eldr_broken_streams_total") >= ends["broken"]
