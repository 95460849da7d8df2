"""Requests that work: hand-off, streams, what each worker gets, what the client gets."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openai as openai_client
import pytest

from eldr.policies.base import DecodeRequest
from eldr.router.observe import logs
from eldr.router.protocols.vllm_nixl import VllmNixl
from eldr.router.request.intake import NO_BODY, Intake, Job
from tests.router.certificates import certificate
from tests.router.fake_worker import (
    EXPERTS,
    LAYERS,
    FakeWorker,
    Seen,
    begin_stream,
    chunk,
    counts_wire,
    end_stream,
    reply,
)
from tests.router.harness import ASK, CHAT, Scripted, Setup, interpreted, on_uvloop, running, until


@on_uvloop
async def test_prefill_then_decode() -> None:
    async with running() as s:
        answer = await s.post()
        assert answer.status == 200
        assert answer.json()["choices"][0]["text"] == "abcd"
        (prefill,), (decode,) = s.prefill[0].generated, s.decode[0].generated
        assert prefill.body["kv_transfer_params"] == {"do_remote_decode": True, "do_remote_prefill": False}
        params = decode.body["kv_transfer_params"]
        assert params["remote_engine_id"] == s.prefill[0].engine_id
        assert params["remote_block_ids"] == [[1]]
        assert "eldr_counts" not in params
        assert {k: v for k, v in decode.body.items() if k != "kv_transfer_params"} == ASK


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@on_uvloop
async def test_a_stream_equals_the_workers_own(path: str) -> None:
    body = {**(CHAT if "chat" in path else ASK), "stream": True, "stream_options": {"include_usage": True}}
    async with running() as s:
        answer = await s.post(body, path, {"x-request-id": "one"})
        (seen,) = s.decode[0].generated
        assert answer.body == b"".join(s.decode[0].events(seen, list("abcd"), "chat" in path))
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["x-request-id"] == "one"
        assert await s.metric("eldr_time_to_first_token_seconds_count") == 1
        assert await s.metric("eldr_time_per_output_token_seconds_count") == 1


@on_uvloop
async def test_events_arrive_as_the_worker_sends_them() -> None:
    heard = asyncio.Semaphore(0)

    async def one_by_one(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await begin_stream(writer)
        for event in worker.events(seen, list("abcd"), False):
            await chunk(writer, event)
            await heard.acquire()  # nothing more before the client has it
        await end_stream(writer)

    async with running() as s:
        s.decode[0].behaviour = one_by_one
        async with s.session.post(s.url + "/v1/completions", json={**ASK, "stream": True}) as answer:
            (seen,) = s.decode[0].generated
            for event in s.decode[0].events(seen, list("abcd"), False):
                assert await answer.content.readexactly(len(event)) == event
                heard.release()
            assert await answer.content.read() == b""


@on_uvloop
async def test_the_prefill_body_keeps_what_a_worker_may_refuse_and_drops_what_does_harm() -> None:
    keeps = {
        "messages": [{"role": "user", "content": "x"}],
        "model": "tiny",
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "tool_choice": "auto",
        "chat_template_kwargs": {"enable_thinking": False},
        "add_generation_prompt": True,
        "continue_final_message": False,
        "truncate_prompt_tokens": 100,
        "reasoning_effort": "low",
        "response_format": {"type": "json_object"},
        "cache_salt": "salt",
        "priority": 3,
        "unknown_to_us": [1, 2],
        "n": 1,
        "stop": ["x"],
        "stop_token_ids": [4],
        "logprobs": True,
        "top_logprobs": 3,
        "temperature": 0.3,
        "seed": 4,
        "logit_bias": {"1": 2},
        "ignore_eos": True,
        "structured_outputs": {"regex": "a*"},
    }
    drops = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "min_tokens": 3,
        "return_token_ids": True,
        "return_prompt_text": True,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
    }
    limits = {"max_tokens": 9, "max_completion_tokens": 8}
    async with running() as s:
        await s.chat({**keeps, **drops, **limits})
        body = s.prefill[0].generated[0].body
        one = {"max_tokens": 1, "max_completion_tokens": 1, "stream": False}
        params = {"do_remote_decode": True, "do_remote_prefill": False}
        assert body == {**keeps, **one, "kv_transfer_params": params}
        decode = s.decode[0].generated[0].body
        assert decode.pop("kv_transfer_params")["remote_engine_id"] == s.prefill[0].engine_id
        del drops["kv_transfer_params"], drops["ec_transfer_params"]
        assert decode == {**keeps, **drops, **limits}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n": 2}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"use_beam_search": True}, "beam_search"),
        ({"echo": True}, "echo"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"prompt": ["a", "b"]}, "prompt_list"),
        ({"prompt": [[1, 2], [3]]}, "prompt_list"),
        ({"suffix": "end"}, "suffix"),
        ({"prompt": None, "prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"truncate_prompt_tokens": -1}, "truncate_to_context"),
    ],
)
@on_uvloop
async def test_what_cannot_be_handed_off_runs_whole_on_a_decode_worker(change: Any, reason: str) -> None:
    policy = Scripted()
    async with running(policy=policy) as s:
        answer = await s.post({**ASK, **change})
        assert answer.status == 200
        assert s.prefill[0].generated == []
        assert s.decode[0].generated[0].body == {**ASK, **change}
        assert await s.metric("eldr_passthrough_total", reason=reason) == 1
        assert policy.asked[0][0].counts is None


@on_uvloop
async def test_an_image_runs_whole() -> None:
    content = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    async with running() as s:
        await s.chat({**CHAT, "messages": [{"role": "user", "content": content}]})
        assert s.prefill[0].generated == []
        assert await s.metric("eldr_passthrough_total", reason="multimodal") == 1


@pytest.mark.parametrize("prompt", [[1, 2, 3], ["hello"], [[1, 2, 3]], "hello"])
@on_uvloop
async def test_one_prompt_is_handed_off_however_it_is_written(prompt: Any) -> None:
    async with running() as s:
        assert (await s.post({**ASK, "prompt": prompt})).status == 200
        assert s.prefill[0].generated[0].body["prompt"] == prompt
        assert s.decode[0].generated[0].body["prompt"] == prompt


@on_uvloop
async def test_the_last_of_duplicate_keys_counts_and_what_the_router_sends_stands_once() -> None:
    async with running() as s:
        raw = b'{"model":"no","max_tokens":"x","n":2,"model":"tiny","prompt":"p","kv_transfer_params":null,"n":1,'
        raw += b'"max_tokens":3,"kv_transfer_params":null,"stream":true,"stre\\u0061m":false}'
        answer = await s.post(raw)
        assert answer.json()["choices"][0]["text"] == "abc"
        (prefill,), (decode,) = s.prefill[0].generated, s.decode[0].generated
        for seen in (prefill, decode):
            assert seen.raw.count(b"kv_transfer_params") == 1
        assert prefill.raw.count(b"max_tokens") == 1
        assert b'"stre\\u0061m"' not in prefill.raw
        assert decode.raw.startswith(raw.partition(b'"kv')[0])


@on_uvloop
async def test_headers_that_steer_a_worker_are_dropped_and_those_that_serve_a_client_go_on() -> None:
    sent = {
        "X-data-parallel-rank": "3",
        "X-Vllm-Priority": "-9",
        "X-Session-ID": "s",
        "X-Forwarded-For": "10.0.0.1",
        "Cookie": "a=b",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "Authorization": "Bearer mine",
    }
    async with running() as s:
        await s.post(headers=sent)
        for worker in (s.prefill[0], s.decode[0]):
            headers = worker.generated[0].headers
            assert headers.keys() == {
                "host", "content-type", "content-length", "x-request-id", "traceparent", "authorization",
                "x-session-id",
            }  # fmt: skip
            assert headers["authorization"] == "Bearer mine"
            assert headers["traceparent"] == sent["traceparent"]


@on_uvloop
async def test_the_workers_key_replaces_the_clients(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\n")

    def guard(s: Setup) -> None:
        for worker in (*s.prefill, *s.decode):
            worker.api_key = "secret"

    async with running(prepare=guard, worker_api_key_file=key) as s:
        assert (await s.post(headers={"authorization": "Bearer theirs"})).status == 200
        assert (await s.get("/v1/models")).json()["data"][0]["id"] == "tiny"


@on_uvloop
async def test_a_clients_own_key_is_passed_through_and_judged_by_the_worker() -> None:
    def guard(s: Setup) -> None:
        for worker in (*s.prefill, *s.decode):
            worker.api_key = "theirs"

    async with running(prepare=guard) as s:
        assert (await s.post(headers={"authorization": "Bearer theirs"})).status == 200
        assert (await s.post()).status == 401
        assert (await s.get("/v1/models")).status == 401


@on_uvloop
async def test_request_ids_are_the_clients_and_differ_per_leg() -> None:
    async with running() as s:
        answer = await s.post(headers={"x-request-id": "abc"})
        assert answer.headers["x-request-id"] == "abc"
        assert answer.json()["id"] == "cmpl-abc"
        ids = [worker.generated[0].headers["x-request-id"] for worker in (s.prefill[0], s.decode[0])]
        assert ids == ["abc-prefill-1", "abc"]
        assert (await s.post({**ASK, "request_id": "in-body"})).headers["x-request-id"] == "in-body"
        assert "request_id" not in s.decode[0].generated[1].body
        strange = await s.post(headers={"x-request-id": "a b" * 80})
        assert len(strange.headers["x-request-id"]) == 32


@on_uvloop
async def test_transfer_parameters_of_a_worker_never_reach_the_client() -> None:
    async def leak(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fields = worker.whole(seen, ["a"], False)
        fields["kv_transfer_params"] = {"remote_host": "10.0.0.1", "eldr_decode_experts": {}}
        fields["ec_transfer_params"] = {"peer": "10.0.0.2"}
        await reply(writer, 200, json.dumps(fields).encode())

    async with running() as s:
        s.decode[0].behaviour = leak
        answer = await s.post()
        assert b"10.0.0" not in answer.body
        assert b"eldr_" not in answer.body
        assert answer.json()["kv_transfer_params"] is None


@on_uvloop
async def test_text_that_looks_like_transfer_parameters_is_left_alone() -> None:
    tricky = '"kv_transfer_params":null,"kv_transfer_params":{"a":1}'
    async with running() as s:
        s.decode[0].tokens = [tricky]
        assert (await s.post()).json()["choices"][0]["text"] == tricky


@on_uvloop
async def test_the_lease_is_renewed_when_it_is_sent_on() -> None:
    async with running() as s:
        s.prefill[0].lease = {"left_s": 20.0, "unix_s": time.time() - 3600}  # a clock an hour slow
        before = time.time()
        await s.post()
        lease = s.decode[0].generated[0].body["kv_transfer_params"]["eldr_lease"]
        assert 19.0 < lease["left_s"] < 20.0
        assert before <= lease["unix_s"] <= time.time()


@on_uvloop
async def test_the_policy_sees_the_request_and_hears_of_its_course() -> None:
    policy = Scripted()
    async with running(decode=2, policy=policy) as s:
        urls = [worker.url for worker in s.decode]
        assert policy.heard == [("joined", url) for url in urls]
        await s.chat({**CHAT, "max_completion_tokens": 7}, headers={"X-Eldr-Label": "code"})
        request, in_flight = policy.asked[0]
        assert in_flight == dict.fromkeys(urls, 0)
        assert request.label == "code"
        assert request.max_tokens == 7
        assert request.prompt_tokens == 4
        assert request.counts.counts.shape == (LAYERS, EXPERTS)
        assert policy.heard[2:] == [("started", urls[0]), ("finished", urls[0])]
        assert await s.metric("eldr_decisions_total", policy="scripted", reason="scripted") == 1


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        (None, "missing"),
        ({"v": 2, "unavailable": "loaded_blocks"}, "unavailable"),
        ({"v": 9}, "version"),
        ("rubbish", "malformed"),
        ({**counts_wire(4), "prompt_tokens": 5}, "inconsistent"),
    ],
)
@on_uvloop
async def test_unusable_counts_are_counted_and_harm_nobody(counts: Any, reason: str) -> None:
    policy = Scripted()
    async with running(policy=policy) as s:
        s.prefill[0].counts = counts
        assert (await s.post()).status == 200
        assert policy.asked[0][0].counts is None
        assert await s.metric("eldr_counts_errors_total", reason=reason) == 1


@pytest.mark.parametrize("fault", ["raises", "unknown"])
@on_uvloop
async def test_a_policy_that_fails_is_replaced_by_jsq(fault: str) -> None:
    def choose(request: DecodeRequest, in_flight: Mapping[str, int]) -> str:
        if fault == "raises":
            raise RuntimeError("policy bug")
        return "http://nowhere:1"

    policy = Scripted(choose)
    async with running(policy=policy) as s:
        assert (await s.post()).status == 200
        assert await s.metric("eldr_decisions_total", reason="policy_error") == 1
        assert await s.metric("eldr_policy_errors_total") == 1
        assert [what for what, _ in policy.heard] == ["joined", "started", "finished"]


@on_uvloop
async def test_a_prefill_worker_that_hands_nothing_off_costs_no_request() -> None:
    async with running() as s:
        s.prefill[0].role = "plain"
        assert (await s.post()).json()["choices"][0]["text"] == "abcd"
        assert "kv_transfer_params" not in s.decode[0].generated[0].body
        assert await s.metric("eldr_passthrough_total", reason="no_handoff") == 1


@on_uvloop
async def test_recording(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("admin\n")
    headers = {"X-Eldr-Record": "1", "Authorization": "Bearer admin"}
    async with running(admin_key_file=key) as s:
        answer = await s.post(headers=headers)
        record = answer.json()["eldr_record"]
        assert record["counts"] == counts_wire(4)
        assert record["decode_experts"]["tokens"] == 3
        assert answer.json()["kv_transfer_params"] is None
        for worker in (s.prefill[0], s.decode[0]):
            assert worker.generated[0].body["kv_transfer_params"]["eldr_record"] is True
            assert "authorization" not in worker.generated[0].headers
        assert (await s.post(headers={**headers, "Authorization": "Bearer wrong"})).status == 403
        assert (await s.post({**ASK, "stream": True}, headers=headers)).status == 400
        assert (await s.post({**ASK, "n": 2}, headers=headers)).status == 400
        assert b"eldr_record" not in (await s.post()).body


@on_uvloop
async def test_nobody_records_without_an_admin_key() -> None:
    async with running() as s:
        assert (await s.post(headers={"X-Eldr-Record": "1", "Authorization": "Bearer "})).status == 403
        assert s.prefill[0].generated == []


@on_uvloop
async def test_the_openai_client_runs_clean() -> None:
    async with running() as s:
        client = openai_client.AsyncOpenAI(base_url=s.url + "/v1", api_key="x", max_retries=0)
        answer = await client.completions.create(model="tiny", prompt="p", max_tokens=4)
        assert answer.choices[0].text == "abcd"
        stream = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=4, stream=True
        )
        assert "".join([event.choices[0].delta.content or "" async for event in stream]) == "abcd"
        assert [model.id async for model in client.models.list()] == ["tiny"]
        await client.close()


@on_uvloop
async def test_many_requests_at_once_all_get_their_own_answer() -> None:
    async with running(prefill=2, decode=4) as s:
        bodies = [{**ASK, "prompt": f"prompt {n}", "stream": n % 2 == 0} for n in range(200)]
        answers = await asyncio.gather(
            *(s.post(body, headers={"x-request-id": f"r{n}"}) for n, body in enumerate(bodies))
        )
        for n, answer in enumerate(answers):
            assert answer.status == 200
            first = answer.events[0] if bodies[n]["stream"] else answer.json()
            assert first["id"] == f"cmpl-r{n}"
        used = [seen.body["kv_transfer_params"]["remote_request_id"] for w in s.decode for seen in w.generated]
        assert len(used) == len(set(used)) == 200
        assert all(worker.in_flight == 0 for worker in s.router.services.fleet.workers("decode").values())
        assert s.router.services.admission.admitted == 0


@on_uvloop
async def test_connections_to_workers_are_kept() -> None:
    async with running() as s:
        for _ in range(20):
            await s.post()
        # One for the probes, one for the requests, and one more where they met.
        assert s.decode[0].connections <= 3


@on_uvloop
async def test_health_ready_and_models() -> None:
    async with running() as s:
        assert (await s.get("/health")).status == 200
        assert (await s.get("/ready")).status == 200
        assert (await s.get("/v1/models")).json()["data"][0]["id"] == "tiny"
        s.prefill[0].healthy = False
        await until(lambda: not s.router.services.fleet.ready, "the worker is found out")
        ready = await s.get("/ready")
        assert ready.status == 503
        assert "prefill" in ready.error["message"]
        assert (await s.get("/health")).status == 200
        assert await s.metric("eldr_worker_up", role="prefill") == 0
        assert await s.metric("eldr_worker_up", role="decode") == 1
        assert abs(await s.metric("eldr_worker_clock_skew_seconds", role="decode")) < 2
        s.prefill[0].healthy = True
        await until(lambda: s.router.services.fleet.ready, "the worker is back")


@on_uvloop
async def test_the_log_has_a_line_per_request_and_no_prompt(capfd: pytest.CaptureFixture[str]) -> None:
    logs.set_up("debug")
    try:
        async with running() as s:
            await s.post({**ASK, "prompt": "my secret"}, headers={"x-request-id": "r1", "authorization": "Bearer key"})
        written = capfd.readouterr().err
        lines = [json.loads(line) for line in written.splitlines()]
        (line,) = (line for line in lines if line["message"] == "request")
        assert line["id"] == "r1"
        assert line["status"] == 200
        assert (line["prefill"], line["decode"]) == (s.prefill[0].url, s.decode[0].url)
        assert "secret" not in written
        assert "key" not in written
    finally:
        logs.set_up("warning")


@pytest.mark.parametrize("trusted", [True, False])
@on_uvloop
async def test_workers_behind_tls(tmp_path: Path, trusted: bool) -> None:
    cert, key = certificate(tmp_path, "worker")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    async with running(worker_tls=context, worker_ca=cert if trusted else None) as s:
        assert s.decode[0].url.startswith("https:")
        assert (await s.get("/ready")).status == (200 if trusted else 503)
        assert (await s.post()).status == (200 if trusted else 503)
        if trusted:
            assert len((await s.post({**ASK, "stream": True})).events) == 5
        else:
            assert s.decode[0].seen == []


@interpreted
@on_uvloop
async def test_a_stream_holds_its_prompt_until_the_first_token_and_its_counts_until_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs: list[Job] = []
    requests: list[DecodeRequest] = []
    held: list[Any] = []
    take = Intake.take

    def keep(*given: Any) -> Job:
        jobs.append(take(*given))
        return jobs[-1]

    monkeypatch.setattr(Intake, "take", keep)

    def choose(request: DecodeRequest, in_flight: Mapping[str, int]) -> str:
        requests.append(request)
        held.append((request.counts is not None, request.counts_wire is not None, jobs[0].body.text))
        return next(iter(in_flight))

    async with running(policy=Scripted(choose)) as s:
        s.decode[0].token_gap_s = 0.3
        answer = asyncio.create_task(s.post({**ASK, "stream": True}))
        await until(lambda: jobs and jobs[0].body is NO_BODY, "the first token is there")
        assert not answer.done()
        assert held == [(True, True, json.dumps({**ASK, "stream": True}).encode())]
        assert (requests[0].counts, requests[0].counts_wire) == (None, None)
        assert (await answer).events[-1] == "data: [DONE]"


@interpreted
@on_uvloop
async def test_a_defect_of_the_router_is_not_put_down_to_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(self: VllmNixl, *given: Any) -> None:
        raise TypeError("of the router's own making")

    async with running() as s:
        monkeypatch.setattr(VllmNixl, "prefill_body", defect)
        answer = await s.post()
        assert answer.status == 500
        assert "own making" not in answer.error["message"]
        assert s.prefill[0].generated == []
        monkeypatch.undo()
        assert (await s.post()).status == 200
