"""Requests that run whole, each on one aggregated worker: nothing asks for a prefill, and what fails is repaired."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.router.admin import KEY, ask_admin, listed, until_state
from tests.router.failing import die_after_first_event, die_after_head, die_at_once, hang
from tests.router.fake_worker import Behaviour, FakeWorker, Seen, reply
from tests.router.harness import (
    ASK,
    CHAT,
    Scripted,
    Setup,
    aggregated,
    bearer,
    on_uvloop,
    preferring,
    raw_stream,
    running,
    until,
)


async def fail(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reply(writer, 500, b'{"error":{"message":"CUDA error","type":"InternalServerError","code":500}}')


async def busy(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    error = b'{"error":{"message":"full","type":"RateLimitError","param":null,"code":429}}'
    await reply(writer, 429, error, "content-type: application/json\r\nretry-after: 7\r\n")


def text_of(body: bytes) -> str:
    """The text of a streamed completion that ended as it should."""
    events = body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2])


@on_uvloop
async def test_the_worker_gets_the_clients_own_bytes() -> None:
    policy = Scripted()
    async with aggregated(2, policy=policy) as s:
        for body in (b'{"prompt" : "hello", "max_tokens":3}', b'{"prompt":"hello","n":2,"echo":true,"max_tokens":3}'):
            assert (await s.post(body)).status == 200
            await asyncio.sleep(0)
        sent = [seen.raw for worker in s.aggregated for seen in worker.generated]
        assert sorted(map(len, sent)) == [36, 51]
        assert {b'{"prompt" : "hello", "max_tokens":3}', b'{"prompt":"hello","n":2,"echo":true,"max_tokens":3}'} == set(
            sent
        )
        assert len(policy.asked) == 2
        assert await s.metric("eldr_passthrough_total") == 0
        assert await s.metric("eldr_handoffs_total") == 0
        assert (await s.get("/ready")).status == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**ASK, "max_tokens": 0}),
        ("/v1/completions", {**ASK, "min_tokens": 9}),
        ("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}}),
    ],
)
@on_uvloop
async def test_what_a_worker_may_refuse_is_its_own_to_refuse(path: str, body: dict[str, Any]) -> None:
    async def refuse(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await reply(writer, 400, b'{"error":{"message":"in its own words","code":400}}')

    async with aggregated(2) as s:
        for worker in s.aggregated:
            worker.behaviour = refuse
        answer = await s.post(body, path)
        assert (answer.status, answer.error["message"]) == (400, "in its own words")
        assert sum(len(worker.generated) for worker in s.aggregated) == 1


@pytest.mark.parametrize("fault", [die_at_once, die_after_head, fail])
@pytest.mark.parametrize("stream", [False, True])
@on_uvloop
async def test_a_request_that_fails_before_its_first_token_goes_to_another_worker(
    fault: Behaviour, stream: bool
) -> None:
    policy = Scripted()
    async with aggregated(2, policy=policy) as s:
        s.aggregated[0].behaviour = fault
        answer = await s.post({**ASK, "stream": stream})
        assert answer.status == 200
        assert (text_of(answer.body) if stream else answer.json()["choices"][0]["text"]) == "abcd"
        first, second = (worker.url for worker in s.aggregated)
        assert policy.heard[2:] == [("started", first), ("finished", first), ("started", second), ("finished", second)]
        assert await s.metric("eldr_retries_total", leg="decode") == 1
        assert await s.metric("eldr_worker_failures_total", role="aggregated", worker=first) == 1
        assert await s.metric("eldr_inflight", role="aggregated") == 0


@on_uvloop
async def test_a_stream_that_breaks_after_its_first_token_says_so() -> None:
    async with aggregated(2, policy=Scripted()) as s:
        s.aggregated[0].behaviour = die_after_first_event
        raw = await raw_stream(s)
        assert b'"text":"a"' in raw
        assert b'"error":' in raw.partition(b'"text":"a"')[2]
        assert not raw.endswith(b"0\r\n\r\n")
        assert len(s.aggregated[1].generated) == 0
        assert await s.metric("eldr_broken_streams_total") == 1


@pytest.mark.parametrize("stream", [False, True])
@on_uvloop
async def test_a_worker_that_is_full_is_passed_over_and_not_blamed(stream: bool) -> None:
    async with aggregated(2, policy=Scripted(), eject_failures=1) as s:
        s.aggregated[0].behaviour = busy
        assert (await s.post({**ASK, "stream": stream})).status == 200
        s.aggregated[1].behaviour = busy
        answer = await s.post({**ASK, "stream": stream})
        assert (answer.status, answer.headers["retry-after"]) == (429, "7")
        assert await s.metric("eldr_worker_failures_total") == 0


@on_uvloop
async def test_when_all_fail_the_client_hears_of_no_other_role() -> None:
    async with aggregated(3) as s:
        for worker in s.aggregated:
            worker.behaviour = die_at_once
        answer = await s.post()
        assert (answer.status, answer.error["message"]) == (502, "no aggregated worker completed the request")
        assert sum(len(worker.generated) for worker in s.aggregated) == 3
        assert s.router.services.admission.admitted == 0


LIMITS: dict[str, Any] = {
    "decode_first_byte_timeout_s": 0.15,
    "decode_answer_timeout_s": 0.15,
    "prefill_timeout_s": 0.1,
}


@pytest.mark.parametrize(("body", "failures"), [(ASK, 1), ({**ASK, "echo": True}, 0), ({**ASK, "n": 2}, 0)])
@pytest.mark.parametrize("stream", [False, True])
@on_uvloop
async def test_a_worker_that_hangs_is_blamed_for_ordinary_requests(
    body: dict[str, Any], failures: int, stream: bool
) -> None:
    async with aggregated(2, policy=Scripted(), eject_failures=1, eject_base_s=60, **LIMITS) as s:
        s.aggregated[0].behaviour = hang
        assert (await s.post({**body, "stream": stream})).status == 200
        url = s.aggregated[0].url
        assert await s.metric("eldr_worker_failures_total", worker=url, reason="timeout") == failures
        assert await s.metric("eldr_ejections_total", role="aggregated", worker=url) == failures
        assert await s.metric("eldr_worker_ejected", role="aggregated", worker=url) == failures


@on_uvloop
async def test_a_slow_prompt_has_the_time_of_both_legs() -> None:
    async def slow(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.6)
        await worker.answer(seen, writer)

    async with aggregated(2, decode_first_byte_timeout_s=0.3, prefill_timeout_s=30) as s:
        for worker in s.aggregated:
            worker.behaviour = slow
        assert text_of((await s.post({**ASK, "stream": True})).body) == "abcd"
        assert sum(len(worker.generated) for worker in s.aggregated) == 1


@on_uvloop
async def test_requests_wait_for_a_slot_and_never_exceed_the_limit() -> None:
    async with aggregated(2, max_inflight=1) as s:
        for worker in s.aggregated:
            worker.token_gap_s = 0.01
        answers = await asyncio.gather(*(s.post({**ASK, "stream": n % 2 == 0}) for n in range(12)))
        assert {answer.status for answer in answers} == {200}
        assert [worker.most_running for worker in s.aggregated] == [1, 1]


@on_uvloop
async def test_a_fleet_that_is_away_is_waited_for_and_then_named() -> None:
    async with aggregated(1, worker_wait_s=0.5) as s:
        await s.aggregated[0].stop()
        await until(lambda: not s.router.services.fleet.ready, "it is found out")
        ready = await s.get("/ready")
        assert (ready.status, ready.error["message"]) == (503, "no aggregated worker is available")
        answer = await s.post()
        assert (answer.status, answer.error["message"]) == (503, "no aggregated worker is available")
        assert (await s.get("/v1/models")).error["message"] == "no aggregated worker is available"
        await s.aggregated[0].start()
        await until(lambda: s.router.services.fleet.ready, "it is back")
        assert (await s.post()).status == 200


@on_uvloop
async def test_a_fleet_that_never_was_there_is_named_as_well() -> None:
    async with aggregated(1, worker_wait_s=0.1, prepare=lambda s: setattr(s.aggregated[0], "healthy", False)) as s:
        assert (await s.get("/ready")).error["message"] == "no aggregated worker is available"
        assert (await s.post()).error["message"] == "no aggregated worker is available"


@on_uvloop
async def test_a_worker_drains_while_its_stream_goes_on(admin: dict[str, Any]) -> None:
    policy = Scripted()
    async with aggregated(2, policy=policy, **admin) as s:
        goes, stays = s.aggregated
        policy.rule = preferring(goes)
        goes.tokens, goes.token_gap_s = ["x"] * 20, 0.02
        stream = asyncio.create_task(s.post({**ASK, "max_tokens": 20, "stream": True}))
        await until(lambda: goes.running == 1, "it runs")
        drained = await ask_admin(s, "POST", "/admin/drain", {"url": goes.url})
        assert (drained.status, drained.json()["role"]) == (202, "aggregated")
        assert (await s.post()).status == 200
        assert len(stays.generated) == 1
        assert text_of((await stream).body) == "x" * 20
        await until_state(s, "aggregated", goes.url, "gone")
        assert ("left", goes.url) in policy.heard


@on_uvloop
async def test_a_worker_joins_and_is_replaced(admin: dict[str, Any]) -> None:
    new = await FakeWorker().start()
    async with aggregated(1, **admin) as s:
        try:
            joined = await ask_admin(s, "POST", "/admin/workers", {"url": new.url, "role": "aggregated"})
            assert (joined.status, joined.json()["max_inflight"]) == (202, 256)
            await until_state(s, "aggregated", new.url, "up")
            again = await ask_admin(s, "POST", "/admin/workers", {"url": new.url, "role": "decode"})
            assert (again.status, "is already in the fleet" in again.error["message"]) == (409, True)
            await ask_admin(s, "DELETE", "/admin/workers", {"url": s.aggregated[0].url})
            await until_state(s, "aggregated", s.aggregated[0].url, "gone")
            assert (await s.post()).status == 200
            assert len(new.generated) == 1
            assert list(await listed(s)) == [("aggregated", new.url)]
        finally:
            await new.stop()


@on_uvloop
async def test_models_and_adapters_have_their_own_workers() -> None:
    def prepare(s: Setup) -> None:
        s.aggregated[1].model = "big"
        s.aggregated[2].adapters = ["sql"]

    async with aggregated(3, prepare=prepare) as s:
        for model, worker in (("big", 1), ("sql", 2)):
            for _ in range(3):
                assert (await s.post({**ASK, "model": model})).status == 200
            assert [len(each.generated) for each in s.aggregated] == [3 * (n == worker) for n in range(3)]
            for each in s.aggregated:
                each.seen.clear()
        assert (await s.post({**ASK, "model": "none"})).status == 404
        assert await s.metric("eldr_model_workers", model="tiny", role="aggregated") == 2
        assert await s.metric("eldr_model_workers", model="tiny", role="prefill") == 0
        assert await s.metric("eldr_passthrough_total") == 0


@on_uvloop
async def test_endpoints_that_generate_nothing_are_answered_as_well() -> None:
    def prepare(s: Setup) -> None:
        for worker in s.aggregated:
            worker.others = {
                "/v1/embeddings": (200, b'{"object":"list","data":[]}', "application/json"),
                "/tokenize": (200, b'{"tokens":[1]}', "application/json"),
            }

    async with aggregated(2, prepare=prepare) as s:
        for path, body in (("/v1/embeddings", {"input": "a"}), ("/tokenize", {"prompt": "a"})):
            answer = await s.post({"model": "tiny", **body}, path)
            assert (answer.status, answer.body) == (200, s.aggregated[0].others[path][1])


@on_uvloop
async def test_what_a_worker_with_our_connector_records_is_passed_on(admin: dict[str, Any]) -> None:
    headers = {"x-eldr-record": "1", **bearer(KEY)}
    async with aggregated(1, **admin) as s:
        record = (await s.post(headers=headers)).json()["eldr_record"]
        assert record["counts"] == s.aggregated[0].counts
        assert record["decode_experts"]["tokens"] == 3
        refused = await s.post({**ASK, "n": 2}, headers=headers)
        assert (refused.status, "cannot be recorded" in refused.error["message"]) == (400, True)


@on_uvloop
async def test_one_model_of_a_router_is_aggregated_and_another_is_not() -> None:
    async with running(1, 1, aggregated=1, prepare=lambda s: setattr(s.aggregated[0], "model", "big")) as s:
        assert (await s.post({**ASK, "model": "big", "n": 2})).status == 200
        assert [len(worker.generated) for worker in (*s.prefill, *s.decode, *s.aggregated)] == [0, 0, 1]
        assert (await s.post({**ASK, "model": "tiny"})).status == 200
        assert [len(worker.generated) for worker in (*s.prefill, *s.decode, *s.aggregated)] == [1, 1, 1]
        assert await s.metric("eldr_passthrough_total") == 0
