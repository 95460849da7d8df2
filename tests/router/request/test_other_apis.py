"""/v1/responses and /v1/messages: handed off like completions, answered in their own form."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.router.admin import ask_admin
from tests.router.fake_worker import FakeWorker, Seen, begin_stream, chunk, end_stream, reply
from tests.router.harness import Reply, Setup, bearer, on_uvloop, running, until
from tests.router.wire import exchange

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
ASKS: dict[str, dict[str, Any]] = {
    RESPONSES: {"model": "tiny", "input": "hello", "max_output_tokens": 4, "temperature": 0.5},
    MESSAGES: {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4},
}
LIMIT = {RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}


def events(answer: Reply) -> list[dict[str, Any]]:
    """The events of a stream, each with a line for its type that says what its data says."""
    parts = answer.body.decode().split("\n\n")
    assert parts.pop() == ""
    found = []
    for part in parts:
        kind, data = part.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {found[-1]['type']}"
    return found


def text_of(answer: dict[str, Any]) -> str:
    return answer["output"][0]["content"][0]["text"] if "output" in answer else answer["content"][0]["text"]


def streamed_text(found: list[dict[str, Any]]) -> str:
    deltas = (
        event["delta"] for event in found if event["type"] in ("response.output_text.delta", "content_block_delta")
    )
    return "".join(delta if isinstance(delta, str) else delta["text"] for delta in deltas)


@pytest.mark.parametrize("path", ASKS)
@on_uvloop
async def test_a_whole_answer_comes_by_way_of_a_hand_off(path: str) -> None:
    async with running() as s:
        answer = await s.post(ASKS[path], path, {"x-request-id": "mine"})
        assert (answer.status, text_of(answer.json())) == (200, "abcd")
        assert answer.headers["x-request-id"] == "mine"
        assert answer.json().get("kv_transfer_params") is None
        (prefill,), (decode,) = s.prefill[0].generated, s.decode[0].generated
        assert (prefill.path, decode.path) == (path, path)
        assert prefill.body[LIMIT[path]] == 1
        assert prefill.body["stream"] is False
        assert prefill.body["kv_transfer_params"]["do_remote_decode"] is True
        assert decode.body["kv_transfer_params"]["do_remote_prefill"] is True
        own = {"kv_transfer_params", "request_id"}
        assert {key: value for key, value in decode.body.items() if key not in own} == ASKS[path]
        assert await s.metric("eldr_handoffs_total") == 1
        assert await s.metric("eldr_passthrough_total") == 0
        assert await s.metric("eldr_request_total", endpoint=path, status="200") == 1


@pytest.mark.parametrize("path", ASKS)
@on_uvloop
async def test_a_stream_is_passed_on_to_its_own_end(path: str) -> None:
    async with running() as s:
        for number in range(3):
            answer = await s.post({**ASKS[path], "stream": True}, path)
            found = events(answer)
            assert streamed_text(found) == "abcd"
            assert found[-1]["type"] == {RESPONSES: "response.completed", MESSAGES: "message_stop"}[path]
            assert await s.metric("eldr_handoffs_total") == number + 1
        assert await s.metric("eldr_broken_streams_total") == await s.metric("eldr_worker_failures_total") == 0
        assert await s.metric("eldr_time_per_output_token_seconds_count") == 3


@on_uvloop
async def test_a_response_is_named_after_its_leg() -> None:
    """vLLM takes its name from the body alone. The hand-off and the answer are checked by it."""
    async with running() as s:
        first = await s.post(ASKS[RESPONSES], RESPONSES, {"x-request-id": "mine"})
        assert first.json()["id"] == "resp_mine"
        assert s.prefill[0].generated[0].body["request_id"] == "resp_mine-prefill-1"
        own = await s.post({**ASKS[RESPONSES], "request_id": "own"}, RESPONSES)
        assert own.json()["id"] == own.headers["x-request-id"] == "own"
        stream = await s.post({**ASKS[RESPONSES], "stream": True}, RESPONSES, {"x-request-id": "other"})
        assert events(stream)[0]["response"]["id"] == "resp_other"
        assert await s.metric("eldr_worker_failures_total") == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ASKS)
@on_uvloop
async def test_the_answer_to_another_request_is_not_passed_on(path: str, stream: bool) -> None:
    async with running(decode=2, eject_share=0) as s:
        for _ in range(4):
            assert (await s.post({**ASKS[path], "stream": stream}, path)).status == 200

        async def another(
            worker: FakeWorker, seen: Seen, _: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            body = json.dumps({**seen.body, "request_id": "resp_another"}).encode()
            await worker.answer(Seen(seen.method, seen.path, {"x-request-id": "another"}, body), writer)

        s.decode[0].behaviour = another
        for _ in range(6):
            answer = await s.post({**ASKS[path], "stream": stream}, path)
            assert (answer.status, b"another" in answer.body) == (200, False)
        assert await s.metric("eldr_worker_failures_total", reason="wrong_answer") > 0


@on_uvloop
async def test_a_hand_off_of_another_response_is_noticed() -> None:
    async with running(retries=0, eject_share=0) as s:
        assert (await s.post(ASKS[RESPONSES], RESPONSES)).status == 200

        async def another(
            worker: FakeWorker, seen: Seen, _: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            whole = worker.whole(seen, ["a"], chat=False)
            whole["kv_transfer_params"]["remote_request_id"] = "resp_another-prefill-1_0-00000000"
            await reply(writer, 200, json.dumps(whole).encode())

        s.prefill[0].behaviour = another
        assert (await s.post(ASKS[RESPONSES], RESPONSES)).status == 502
        assert len(s.decode[0].generated) == 1


@pytest.mark.parametrize("path", ASKS)
@pytest.mark.parametrize("sent", [0, 1, 2])
@on_uvloop
async def test_a_worker_that_fails_before_the_first_token_is_replaced(path: str, sent: int) -> None:
    """vLLM opens a stream of /v1/responses before its engine does anything."""
    if path == MESSAGES and sent:
        pytest.skip("its first event comes with the first token")

    async def failing(worker: FakeWorker, seen: Seen, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await begin_stream(writer)
        for event in worker.events(seen, ["a"], chat=False)[:sent]:
            await chunk(writer, event)
        writer.transport.abort()

    async with running(decode=2, eject_share=0) as s:
        s.decode[0].behaviour = failing
        for _ in range(6):
            found = events(await s.post({**ASKS[path], "stream": True}, path))
            assert streamed_text(found) == "abcd"
            assert len([event for event in found if event["type"] in ("response.created", "message_start")]) == 1
        assert len(s.decode[0].generated) > 0


@pytest.mark.parametrize("whole", [False, True])
@on_uvloop
async def test_nobody_is_blamed_for_a_response_that_vllm_refuses_too_late(whole: bool) -> None:
    """As for a bad `logit_bias`, which is found behind the opening. A prefill worker would have refused it before."""

    async def refusing(worker: FakeWorker, seen: Seen, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await begin_stream(writer)
        for event in worker.events(seen, ["a"], chat=False)[:2]:
            await chunk(writer, event)
        writer.transport.abort()

    async with running(decode=2, eject_share=0) as s:
        for worker in s.decode:
            worker.behaviour = refusing
        body = {**ASKS[RESPONSES], "stream": True, "truncation": "auto" if whole else "disabled"}
        assert (await s.post(body, RESPONSES)).status == 502
        legs = len(s.decode[0].generated) + len(s.decode[1].generated)
        assert legs == 3
        assert await s.metric("eldr_worker_failures_total", role="decode") == (0 if whole else legs)


@pytest.mark.parametrize("path", ASKS)
@on_uvloop
async def test_an_error_behind_the_opening_of_a_stream_is_repaired(path: str) -> None:
    async def failing(worker: FakeWorker, seen: Seen, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await begin_stream(writer)
        for event in worker.events(seen, ["a"], chat=False)[: 2 if path == RESPONSES else 0]:
            await chunk(writer, event)
        await chunk(writer, b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"x"}}\n\n')
        await end_stream(writer)

    async with running(decode=2, eject_share=0) as s:
        s.decode[0].behaviour = failing
        for _ in range(6):
            assert streamed_text(events(await s.post({**ASKS[path], "stream": True}, path))) == "abcd"
        assert len(s.decode[0].generated) > 0


@pytest.mark.parametrize("path", ASKS)
@on_uvloop
async def test_a_stream_that_breaks_ends_with_an_error_of_its_api(path: str) -> None:
    async def failing(worker: FakeWorker, seen: Seen, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await begin_stream(writer)
        for event in worker.events(seen, ["a"], chat=False)[:4]:
            await chunk(writer, event)
        writer.transport.abort()

    async with running() as s:
        s.decode[0].behaviour = failing
        body = json.dumps({**ASKS[path], "stream": True}).encode()
        head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" % path.encode()
        raw = await exchange(s, head + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        last = raw.rpartition(b"event: error\n")[2]
        assert b'"type":"error"' in last
        assert b"the worker failed in the middle of the answer" in last
        assert not raw.endswith(b"0\r\n\r\n")
        assert await s.metric("eldr_broken_streams_total") == 1


@pytest.mark.parametrize("path", ASKS)
@on_uvloop
async def test_what_cannot_be_handed_off_runs_whole(path: str) -> None:
    image = {"type": "input_image", "image_url": "data:,"} if path == RESPONSES else {"type": "image", "source": {}}
    said = [{"role": "user", "content": [image]}]
    async with running() as s:
        for stream in (False, True):
            body = {**ASKS[path], {RESPONSES: "input", MESSAGES: "messages"}[path]: said, "stream": stream}
            answer = await s.post(body, path)
            assert (streamed_text(events(answer)) if stream else text_of(answer.json())) == "abcd"
        assert s.prefill[0].generated == []
        assert await s.metric("eldr_passthrough_total", reason="multimodal") == 2


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"previous_response_id": "resp_x"}, 404, "previous_response_id"),
        ({"background": True}, 400, "background"),
        ({"background": None}, 400, "background"),
        ({"truncation": None, "stream": True}, 400, "truncation"),
        ({"input": None}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": 5}, 400, "input"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"max_output_tokens": "x"}, 400, "max_output_tokens"),
        ({"stream": "x"}, 400, "stream"),
        ({"kv_transfer_params": {}}, 400, "kv_transfer_params"),
        ({"model": "other"}, 404, "model"),
    ],
)
@on_uvloop
async def test_responses_that_no_worker_could_give_are_refused_before_a_prefill(
    body: dict[str, Any], status: int, param: str
) -> None:
    async with running() as s:
        answer = await s.post({**ASKS[RESPONSES], **body}, RESPONSES)
        assert (answer.status, answer.error["param"]) == (status, param)
        assert s.prefill[0].generated == s.decode[0].generated == []
        for fine in (
            {"previous_response_id": None, "background": False},
            {"background": "false", "truncation": "auto"},
            {"input": ""},
            {"min_tokens": 9},
        ):
            assert (await s.post({**ASKS[RESPONSES], **fine}, RESPONSES)).status == 200


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": "hello"},
        {"max_tokens": 0},
        {"max_tokens": None},
        {"thinking": {"type": "enabled", "budget_tokens": 4}},
        {"stream": "x"},
        {"eldr_record": 1},
    ],
)
@on_uvloop
async def test_messages_that_no_worker_could_give_are_refused_before_a_prefill(body: dict[str, Any]) -> None:
    async with running() as s:
        answer = await s.post({**ASKS[MESSAGES], **body}, MESSAGES)
        assert (answer.status, answer.json()["type"]) == (400, "error")
        assert answer.error["type"] == "invalid_request_error"
        assert s.prefill[0].generated == s.decode[0].generated == []
        fine = {"thinking": {"type": "enabled", "budget_tokens": 3}}
        assert (await s.post({**ASKS[MESSAGES], **fine}, MESSAGES)).status == 200


@pytest.mark.parametrize("path", ["/v1/responses/resp_1", "/v1/responses/resp_1/cancel"])
@on_uvloop
async def test_stored_responses_are_said_to_be_none(path: str) -> None:
    async with running() as s:
        for answer in (await s.get(path), await s.post(path=path)):
            assert (answer.status, "not stored" in answer.error["message"]) == (404, True)
        assert s.decode[0].asked(path) == 0


@on_uvloop
async def test_errors_of_messages_have_anthropics_form(admin: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("secret alice requests_per_day=2\n")
    key = {"x-api-key": "secret", "anthropic-version": "2023-06-01"}

    def error(answer: Reply) -> tuple[int, str, str]:
        assert answer.json().keys() == {"type", "error"}
        assert answer.error.keys() == {"type", "message"}
        return answer.status, answer.json()["type"], answer.error["type"]

    settings: dict[str, Any] = {"api_key_file": tmp_path / "keys", "worker_wait_s": 0, "max_body_bytes": 1000}
    async with running(**settings, **admin) as s:
        ask = ASKS[MESSAGES]
        assert error(await s.post(ask, MESSAGES)) == (401, "error", "authentication_error")
        assert error(await s.post(b" " * 2000, MESSAGES, key)) == (413, "error", "request_too_large")
        assert error(await s.get(MESSAGES, key)) == (405, "error", "api_error")
        assert error(await s.post(ask, "/v1/messages/batches", key)) == (404, "error", "not_found_error")
        assert error(await s.post({**ask, "model": "other"}, MESSAGES, key)) == (404, "error", "not_found_error")
        await ask_admin(s, "DELETE", "/admin/workers", {"url": s.decode[0].url, "role": "decode"})
        assert error(await s.post(ask, MESSAGES, key)) == (503, "error", "api_error")
        assert error(await s.post(ask, MESSAGES, key)) == (429, "error", "rate_limit_error")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ASKS)
@on_uvloop
async def test_their_usage_counts_for_the_quota(tmp_path: Path, path: str, stream: bool) -> None:
    (tmp_path / "keys").write_text("secret alice tokens_per_day=1000\n")
    (tmp_path / "admin").write_text("the-admin-key\n")
    async with running(api_key_file=tmp_path / "keys", admin_key_file=tmp_path / "admin") as s:
        await s.post({**ASKS[path], "stream": stream}, path, bearer("secret"))
        assert await s.metric("eldr_client_tokens_total", "the-admin-key", client="alice") == 4 + 4


async def asked_prefill(s: Setup, body: dict[str, Any], path: str) -> str:
    before = [len(worker.generated) for worker in s.prefill]
    assert (await s.post(body, path)).status == 200
    (url,) = (worker.url for worker, count in zip(s.prefill, before, strict=True) if len(worker.generated) > count)
    return url


@pytest.mark.parametrize("path", ASKS)
@on_uvloop
async def test_requests_that_begin_alike_share_a_prefill_worker(path: str) -> None:
    system = {RESPONSES: "instructions", MESSAGES: "system"}[path]
    async with running(prefill=4) as s:
        found = []
        for number in range(8):
            body = {**ASKS[path], system: f"Part {number}. " + "x" * 3000}
            urls = {await asked_prefill(s, body, path) for _ in range(3)}
            assert len(urls) == 1
            found.append(urls.pop())
        assert len(set(found)) > 1  # although the conversations are the same


@on_uvloop
async def test_a_client_that_leaves_ends_the_workers_request() -> None:
    async with running() as s:
        s.decode[0].token_gap_s = 30.0
        asked = asyncio.create_task(s.post({**ASKS[RESPONSES], "stream": True}, RESPONSES))
        await until(lambda: s.decode[0].running, "it runs")
        asked.cancel()
        await until(lambda: s.decode[0].generated[0].aborted, "the worker is told")
