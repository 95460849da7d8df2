"""Pairs of SGLang's workers: both legs at once, in one room, and what becomes of the other leg when one fails."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import pytest

from tests.router.fake_sglang import FakeSglang, error, refuse
from tests.router.fake_worker import Behaviour, FakeWorker, Seen, begin_stream, chunk, compact, end_stream, reply
from tests.router.harness import ASK, CHAT, Scripted, Setup, on_uvloop, ours, preferring, raw_stream, running, until
from tests.router.request.test_cycles import no_cycles

STREAM = {**ASK, "stream": True}


def pairs(prefill: int = 1, decode: int = 1, **settings: Any) -> AbstractAsyncContextManager[Setup]:
    """A router in front of workers of SGLang."""
    fake = partial(FakeSglang, bootstraps={})
    return running(prefill, decode, fake=fake, engine="sglang", **settings)


def legs(s: Setup) -> list[Seen]:
    """Every leg that any worker got, in order of arrival."""
    return sorted((seen for worker in (*s.prefill, *s.decode) for seen in worker.generated), key=lambda seen: seen.at_s)


def rooms(workers: list[FakeWorker]) -> list[int]:
    return [seen.body["bootstrap_room"] for worker in workers for seen in worker.generated]


async def failures(s: Setup, worker: FakeWorker) -> float:
    return await s.metric("eldr_worker_failures_total", worker=worker.url)


def sglang(worker: FakeWorker) -> FakeSglang:
    assert isinstance(worker, FakeSglang)
    return worker


# What is sent.


@pytest.mark.parametrize("stream", [False, True])
@on_uvloop
async def test_both_legs_meet_in_one_room(stream: bool) -> None:
    policy = Scripted()
    async with pairs(policy=policy) as s:
        body = {**ASK, "stream": stream, **({"stream_options": {"include_usage": True}} if stream else {})}
        answer = await s.post(body, headers={"x-request-id": "mine"})
        assert answer.status == 200
        assert (answer.events[0] if stream else answer.json())["id"].startswith("mine-")
        (prefill,), (decode,) = s.prefill[0].generated, s.decode[0].generated
        for leg in (prefill.body, decode.body):
            assert leg["prompt"] == "hello"
            assert leg["max_tokens"] == 4
            assert leg["bootstrap_host"] == "127.0.0.1"
            assert leg["bootstrap_port"] == sglang(s.prefill[0]).bootstrap_port
        assert prefill.body["bootstrap_room"] == decode.body["bootstrap_room"]
        assert 0 < decode.body["bootstrap_room"] < 2**63
        assert not {"stream", "stream_options"} & prefill.body.keys()
        assert decode.body["stream"] is stream
        assert prefill.body["rid"] != decode.body["rid"]
        # The workers are chosen before anything is computed.
        assert policy.asked[0][0].counts is None
        assert await s.metric("eldr_handoffs_total") == 1
        assert await s.metric("eldr_passthrough_total") == 0
        assert await s.metric("eldr_inflight") == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
@on_uvloop
async def test_answers_are_those_of_the_decode_worker(path: str, stream: bool) -> None:
    body = {"model": "tiny", "input": "hello", "max_output_tokens": 4} if path == "/v1/responses" else ASK
    body = CHAT if "chat" in path else body
    async with pairs() as s:
        for _ in range(3):  # since the second one, the names of answers are checked
            answer = await s.post({**body, "stream": stream}, path)
            assert answer.status == 200
            assert len(answer.body) > 100
        assert len(legs(s)) == 6
        assert await s.metric("eldr_retries_total") == 0


@on_uvloop
async def test_no_room_is_used_twice_and_no_name_either() -> None:
    async with pairs(2, 2) as s:
        answers = await asyncio.gather(*(s.post(headers={"x-request-id": "same"}) for _ in range(40)))
        assert {answer.status for answer in answers} == {200}
        assert len(set(rooms(s.prefill))) == 40
        assert sorted(rooms(s.prefill)) == sorted(rooms(s.decode))
        assert len({seen.body["rid"] for seen in legs(s)}) == 80


@on_uvloop
async def test_several_prompts_share_a_request() -> None:
    async with pairs() as s:
        for stream in (False, True, False, True):
            answer = await s.post({**ASK, "prompt": ["a", "b", "c"], "stream": stream})
            assert answer.status == 200
            choices = [event["choices"][0] for event in answer.events[:-1]] if stream else answer.json()["choices"]
            assert {choice["index"] for choice in choices} == {0, 1, 2}
        assert len(sglang(s.prefill[0]).rooms) == 12
        assert await s.metric("eldr_retries_total") == 0


@pytest.mark.parametrize(
    "field",
    [
        "bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key", "routed_dp_rank",
        "data_parallel_rank", "disagg_prefill_dp_rank",
    ],
)  # fmt: skip
@on_uvloop
async def test_clients_choose_no_room(field: str) -> None:
    async with pairs() as s:
        answer = await s.post({**ASK, field: 1})
        assert answer.status == 400
        assert answer.error["param"] == field
        assert legs(s) == []
        assert (await s.post({**ASK, field: None, "rid": "of-the-client"})).status == 200
        assert all(seen.body.get(field, 0) is not None for seen in legs(s))
        assert all(seen.body["rid"] != "of-the-client" for seen in legs(s))


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", {**ASK, "n": 2}, 400),
        ("/v1/chat/completions", {**CHAT, "n": 3}, 400),
        ("/v1/completions", {**ASK, "echo": True, "logprobs": 1}, 400),
        ("/v1/messages", CHAT, 501),
    ],
)
@on_uvloop
async def test_what_no_pair_would_finish_is_refused(path: str, body: dict[str, Any], status: int) -> None:
    async with pairs() as s:
        assert (await s.post(body, path)).status == status
        assert legs(s) == []
        assert (await s.post({**ASK, "n": 1, "echo": True})).status == 200


# What fails.


async def says_500(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await refuse(writer, 500, "Prefill transfer failed")


async def says_400(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await refuse(writer, 400, "temperature must be non-negative")


async def says_429(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await refuse(writer, 429, "too much to do")


async def dies(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def dies_inside(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    writer.write(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"id"')
    await writer.drain()
    await asyncio.sleep(0.02)
    writer.transport.abort()


async def says_nothing(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await asyncio.sleep(3600)


async def says_error_event(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await begin_stream(writer)
    await chunk(writer, b"data: %b\n\n" % compact({"error": error(500, "Decode transfer failed")}))
    await chunk(writer, b"data: [DONE]\n\n")
    await end_stream(writer)


async def waits_elsewhere(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """A decode worker that knocks at the wrong room."""
    await sglang(worker).transfer(seen.body, writer, 7)


@pytest.mark.parametrize("fault", [says_500, dies, dies_inside])
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
@on_uvloop
async def test_a_leg_that_fails_ends_the_other_and_both_are_tried_elsewhere(
    fault: Behaviour, role: str, stream: bool
) -> None:
    policy = Scripted()
    async with pairs(2, 2, policy=policy) as s:
        policy.rule = preferring(s.decode[0])
        await s.post()
        failing = next(w for w in getattr(s, role) if w.generated)
        failing.behaviour = fault
        others = s.decode if role == "prefill" else s.prefill
        partner = next(w for w in others if w.generated)
        answer = await s.post({**ASK, "stream": stream})
        assert answer.status == 200
        assert b"error" not in answer.body
        await until(lambda: partner.generated[1].aborted, "the partner's leg is given up")
        assert sglang(partner).running == 0
        assert len(legs(s)) == 6
        assert len(set(rooms(s.prefill))) == len(set(rooms(s.decode))) == 3
        # Only the worker that failed is to blame.
        assert await failures(s, failing) == 1
        assert await s.metric("eldr_worker_failures_total") == 1
        assert await s.metric("eldr_retries_total", leg=role) == 1
        assert await s.metric("eldr_inflight") == 0


@on_uvloop
async def test_an_error_event_before_the_first_token_is_repaired() -> None:
    policy = Scripted()
    async with pairs(1, 2, policy=policy) as s:
        s.decode[0].behaviour = says_error_event
        answer = await s.post(STREAM)
        assert "".join(event["choices"][0]["text"] for event in answer.events[:-1]) == "abcd"
        await until(lambda: s.prefill[0].generated[0].aborted, "the prefill is given up")
        assert len(s.prefill[0].generated) == 2
        assert await failures(s, s.decode[0]) == 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
@on_uvloop
async def test_what_any_worker_would_refuse_goes_to_the_client(role: str) -> None:
    async with pairs(2, 2) as s:
        for worker in getattr(s, role):
            worker.behaviour = says_400
        answer = await s.post(STREAM)
        assert answer.status == 400
        assert answer.json() == error(400, "temperature must be non-negative")
        others = s.decode if role == "prefill" else s.prefill
        await until(lambda: all(seen.aborted for w in others for seen in w.generated), "the other leg is given up")
        assert len(legs(s)) == 2
        assert await s.metric("eldr_worker_failures_total") == 0
        assert await s.metric("eldr_retries_total") == 0


@on_uvloop
async def test_a_refusal_after_comments_has_its_own_words() -> None:
    async with pairs(stream_keepalive_s=0.01) as s:

        async def refuses_late(
            worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            await asyncio.sleep(0.1)
            await refuse(writer, 400, "temperature must be non-negative")

        s.decode[0].behaviour = refuses_late
        raw = await raw_stream(s)
        assert b": keep-alive\n\n" in raw
        assert b"temperature must be non-negative" in raw


@pytest.mark.parametrize("role", ["prefill", "decode"])
@on_uvloop
async def test_a_worker_with_too_much_to_do_is_left_alone(role: str) -> None:
    async with pairs(2, 2) as s:
        workers = getattr(s, role)
        for worker in workers:
            worker.behaviour = says_429
        assert (await s.post()).status == 429
        assert [len(worker.generated) for worker in workers] == [1, 1]
        assert await s.metric("eldr_worker_failures_total") == 0
        workers[1].behaviour = None
        assert (await s.post()).status == 200


@pytest.mark.parametrize("role", ["prefill", "decode"])
@on_uvloop
async def test_a_refused_connection_costs_nothing(role: str) -> None:
    async with pairs(2, 2, health_interval_s=60) as s:
        gone = getattr(s, role)[0]
        await gone.stop()
        for _ in range(8):
            assert (await s.post()).status == 200
        assert len(legs(s)) == 16
        assert await s.metric("eldr_inflight") == 0


@pytest.mark.parametrize("stream", [False, True])
@on_uvloop
async def test_a_failed_transfer_counts_for_both_and_takes_out_the_one_that_fails_them_all(stream: bool) -> None:
    """A decode worker that cannot receive, whose partners are the first to notice."""

    async def sends_to_the_first_in_vain(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await asyncio.sleep(0.02)
        if seen.body["bootstrap_room"] in rooms(s.decode[:1]):
            message = "Prefill transfer failed for request req.bootstrap_room=7 with exception KVTransferError"
            await refuse(writer, 500, message)
        else:
            await worker.answer(seen, writer)

    async def receives_nothing(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if stream:  # it notices first
            await begin_stream(writer)
            message = "Decode transfer failed for request decode_req.req.bootstrap_room=7"
            await chunk(writer, b"data: %b\n\n" % compact({"error": error(500, message)}))
        await asyncio.sleep(3600)

    async with pairs(2, 2) as s:
        s.decode[0].behaviour = receives_nothing
        for worker in s.prefill:
            worker.behaviour = sends_to_the_first_in_vain
        for _ in range(40):
            assert (await s.post({**ASK, "stream": stream})).status == 200
        assert len(s.decode[0].generated) == 5
        assert await s.metric("eldr_ejections_total", worker=s.decode[0].url) == 1
        assert await s.metric("eldr_ejections_total", role="prefill") == 0
        assert sum([await failures(s, worker) for worker in s.prefill]) == 5
        assert await s.metric("eldr_worker_failures_total", reason="transfer") == 5


@on_uvloop
async def test_a_partner_that_never_comes_blames_nobody() -> None:
    """Neither of the two has failed in a way that the router could see."""
    policy = Scripted()
    async with pairs(2, 2, policy=policy, prefill_timeout_s=0.2) as s:
        policy.rule = preferring(s.decode[0])
        s.decode[0].behaviour = waits_elsewhere
        assert (await s.post()).status == 200
        assert sorted(rooms(s.decode)) == sorted(rooms(s.prefill))
        await until(lambda: s.decode[0].generated[0].aborted, "its leg is given up")
        assert [len(worker.generated) for worker in s.prefill] == [1, 1]  # the first may be the one at fault
        assert await s.metric("eldr_worker_failures_total") == 0
        assert await s.metric("eldr_retries_total", leg="prefill", reason="timeout") == 1
        s.decode[1].behaviour = waits_elsewhere
        assert (await s.post()).status == 504


@on_uvloop
async def test_a_worker_without_the_right_bootstrap_port_is_a_failure() -> None:
    async with pairs(prepare=lambda s: setattr(s.prefill[0], "info", (404, b""))) as s:
        answer = await s.post()
        assert answer.status == 500
        assert "handshake failed" in answer.json()["message"]
        assert {seen.body["bootstrap_port"] for seen in legs(s)} == {8998}
        assert await failures(s, s.decode[0]) == await failures(s, s.prefill[0]) == 3


@on_uvloop
async def test_an_answer_of_another_request_is_not_passed_on() -> None:
    async with pairs(1, 2) as s:
        await s.post()
        whole = s.decode[0].whole

        async def confuses(
            worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            await sglang(worker).transfer(seen.body, writer)
            await reply(writer, 200, json.dumps(whole(seen, ["x"], False) | {"id": "another-0"}).encode())

        for worker in s.decode:
            worker.behaviour = confuses
        answer = await s.post()
        assert answer.status == 502
        assert b"x" not in answer.json()["error"]["message"].encode().split()


# What fails late.


async def breaks_stream(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    fake = sglang(worker)
    await fake.transfer(seen.body, writer)
    await begin_stream(writer)
    await chunk(writer, fake.events(seen, ["a"], False)[0])
    await asyncio.sleep(0.05)
    writer.transport.abort()


@on_uvloop
async def test_a_stream_that_breaks_is_not_tried_again() -> None:
    async with pairs(2, 2) as s:
        for worker in s.decode:
            worker.behaviour = breaks_stream
        raw = await raw_stream(s)
        assert b'"text":"a"' in raw
        assert b"the worker failed in the middle of the answer" in raw
        assert len(legs(s)) == 2
        assert await s.metric("eldr_broken_streams_total") == 1


@on_uvloop
async def test_a_prefill_that_fails_behind_its_transfer_ends_no_stream() -> None:
    async def fails_late(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await sglang(worker).transfer(seen.body, writer)
        await asyncio.sleep(0.05)
        writer.transport.abort()

    async with pairs() as s:
        s.prefill[0].behaviour = fails_late
        s.decode[0].token_gap_s = 0.05
        answer = await s.post(STREAM)
        assert answer.events[-1] == "data: [DONE]"
        assert len(legs(s)) == 2
        assert await failures(s, s.prefill[0]) == 1
        assert await failures(s, s.decode[0]) == 0


@pytest.mark.parametrize("stream", [False, True])
@on_uvloop
async def test_a_prefill_answer_may_come_after_the_last_token(stream: bool) -> None:
    async with pairs() as s:
        sglang(s.prefill[0]).late_s = 0.1
        assert (await s.post({**ASK, "stream": stream})).status == 200
        await until(lambda: s.router.running == 0, "the request is over")
        assert not s.prefill[0].generated[0].aborted
        assert await s.metric("eldr_handoffs_total") == 1


@on_uvloop
async def test_a_prefill_answer_that_never_comes_is_given_up() -> None:
    async with pairs() as s:
        sglang(s.prefill[0]).late_s = 3600
        begun_s = time.monotonic()
        assert (await s.post()).status == 200
        assert time.monotonic() - begun_s < 30
        await until(lambda: s.prefill[0].generated[0].aborted, "the prefill leg is given up")
        assert await s.metric("eldr_inflight") == 0


# Clients that leave.


@pytest.mark.parametrize("silent", ["prefill", "decode", "neither"])
@pytest.mark.parametrize("stream", [False, True])
@on_uvloop
async def test_a_client_that_leaves_ends_both_legs(silent: str, stream: bool) -> None:
    async with pairs() as s:
        for worker in getattr(s, silent, ()):
            worker.behaviour = says_nothing
        if silent == "neither":
            s.decode[0].token_gap_s = 3600
            sglang(s.prefill[0]).late_s = 3600
        task = asyncio.create_task(s.post({**ASK, "stream": stream}))
        await until(lambda: len(legs(s)) == 2, "both legs are sent")
        await asyncio.sleep(0.05)
        task.cancel()
        await until(lambda: all(seen.aborted for seen in legs(s)), "both are given up")
        await until(lambda: s.router.running == 0, "the request is over")
        assert await s.metric("eldr_worker_failures_total") == 0
        assert await s.metric("eldr_inflight") == 0


@on_uvloop
async def test_a_deadline_ends_both_legs() -> None:
    async with pairs() as s:
        s.decode[0].behaviour = says_nothing
        answer = await s.post(headers={"x-request-timeout-ms": "200"})
        assert answer.status == 504
        await until(lambda: all(seen.aborted for seen in legs(s)), "both are given up")


@asynccontextmanager
async def clean(s: Setup) -> AsyncIterator[None]:
    async with no_cycles(s):
        yield


@pytest.mark.parametrize("fault", [None, says_500, dies, says_400, says_error_event])
@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.usefixtures("collector")
@on_uvloop
async def test_a_pair_leaves_no_cycle(fault: Behaviour | None, role: str) -> None:
    assert ours([]) == []
    async with pairs(2, 2, eject_share=0) as s, clean(s):
        for worker in getattr(s, role):
            worker.behaviour = fault
        for body in (ASK, STREAM):
            await s.post(body)


# Who is a worker.


@on_uvloop
async def test_a_server_in_the_other_mode_gets_no_requests() -> None:
    async with pairs(1, 2, prepare=lambda s: setattr(s.decode[1], "info", s.prefill[0].info)) as s:
        for _ in range(4):
            assert (await s.post()).status == 200
        assert s.decode[1].generated == []
        assert await s.metric("eldr_worker_up", worker=s.decode[1].url) == 0
        problems = [worker.problem for worker in s.router.membership.workers() if worker.url == s.decode[1].url]
        assert problems == ["it was started with --disaggregation-mode prefill, and is given as a decode worker"]


@on_uvloop
async def test_an_adapter_is_called_by_its_base_and_its_name() -> None:
    """By its name alone, SGLang would answer with the base model."""

    def load_one(s: Setup) -> None:
        for worker in (*s.prefill, *s.decode):
            worker.adapters = ["sql"]

    async with pairs(prepare=load_one) as s:
        listed = [card["id"] for card in (await s.get("/v1/models")).json()["data"]]
        assert listed == ["tiny", "tiny:sql"]
        s.decode[0].aliases = s.prefill[0].aliases = listed
        assert (await s.post({**ASK, "model": "tiny:sql"})).status == 200
        assert (await s.post({**ASK, "model": "sql"})).status == 404


@on_uvloop
async def test_without_prefill_workers_nothing_runs() -> None:
    async with pairs(worker_wait_s=0) as s:
        await s.prefill[0].stop()
        await until(lambda: not s.router.services.fleet.any_available("prefill"), "it is seen as gone")
        answer = await s.post()
        assert answer.status == 503
        assert answer.error["message"] == "no prefill worker is available"
        assert s.decode[0].generated == []
