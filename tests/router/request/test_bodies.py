"""Bodies: what a client sent is what workers get, byte for byte, and what no worker takes costs no prefill."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from typing import Any

import pytest

import eldr.kernels
from eldr.router.http.message import Request
from tests.router.fake_worker import FakeWorker, Seen, reply
from tests.router.harness import ASK, CHAT, Setup, on_uvloop, running

KV = b"kv_transfer_params"


def without_handoff(raw: bytes) -> bytes:
    """The decode leg's body as the client would have written it."""
    head, _, tail = raw.rpartition(b',"kv_transfer_params":')
    assert json.loads(tail[:-1])
    return head + b"}"


@pytest.mark.parametrize(
    "member",
    [
        b'"seed":18446744073709551617',
        b'"metadata": {"x": 1e999, "y": NaN, "z": -Infinity}',
        b'"metadata":' + b'{"a":' * 400 + b"1.10" + b"}" * 400,
        b'"metadata":' + b"[" * 700 + b"]" * 700,
        b'"user":"\\ud800\\u00e4\xc3\xa4\\/"',
        b'"user":"\xed\xa0\x80"',
        b'"temperature":1.0E-0 ,\t"top_p" : 1.00',
        b'"unknown":"kv_transfer_params","x":{"kv_transfer_params":1,"eldr_x":2}',
    ],
)
@on_uvloop
async def test_both_legs_get_the_clients_own_bytes(member: bytes) -> None:
    raw = b'{"model":"tiny", "messages": [{"role":"user","content":"\\u0041 "}],%b,"max_tokens":4}' % member
    async with running() as s:
        answer = await s.chat(raw)
        assert answer.status == 200, answer.body
        assert without_handoff(s.decode[0].generated[0].raw) == raw
        prefill = s.prefill[0].generated[0].raw
        assert prefill.startswith(raw.removesuffix(b'"max_tokens":4}'))
        assert prefill.count(b'"max_tokens":1') == 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-be"])
@on_uvloop
async def test_other_encodings_reach_workers_as_utf_8(encoding: str) -> None:
    text = '{"model": "tiny", "prompt": "ä€😀"}'
    async with running() as s:
        assert (await s.post(text.encode(encoding))).status == 200
        assert without_handoff(s.decode[0].generated[0].raw) == text.encode()


@pytest.mark.parametrize("field", ["kv_transfer_params", "ec_transfer_params"])
@on_uvloop
async def test_null_transfer_parameters_are_as_good_as_none(field: str) -> None:
    raw = b'{"%b":null,"model":"tiny","prompt":"x","\\u006b\\u0076_transfer_params":null}' % field.encode()
    async with running() as s:
        assert (await s.post(raw)).status == 200
        for worker in (s.prefill[0], s.decode[0]):
            sent = worker.generated[0].raw
            assert sent.count(b"transfer_params") == 1
            assert sent.count(KV) == 1
            assert b"\\u006b" not in sent
        whole = await s.post(raw[:-1] + b',"n":2}')
        assert whole.status == 200
        assert s.decode[0].generated[1].raw == b'{"model":"tiny","prompt":"x","n":2}'


@pytest.mark.parametrize(
    "member",
    [
        b'"kv_transfer_params":{}',
        b'"kv_transfer_params":{"a":1},"kv_transfer_params":null',
        b'"kv_transfer_par\\u0061ms":{}',
        b'"ec_transfer_params":0',
        b'"eldr_x":null',
        b'"\\u0065ldr_record":true',
        b'"vllm_xargs":{"a":1,"kv_transfer_params":"x"}',
        b'"vllm_xargs":{"kv_transfer_p\\u0061rams":1,"a":1},"vllm_xargs":null',
        b'"vllm_xargs":{"a":1,"eldr_x":1,"eldr_x":2}',
    ],
)
@on_uvloop
async def test_what_only_the_router_may_say_is_refused_however_it_is_written(member: bytes) -> None:
    async with running() as s:
        for raw in (b'{"model":"tiny","prompt":"x",%b}', b'{%b,"model":"tiny","prompt":"x"}'):
            answer = await s.post(raw % member)
            assert answer.status == 400
            assert "set by the router" in answer.error["message"]
        assert s.prefill[0].generated == s.decode[0].generated == []


async def strict(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Refuses what vLLM refuses before it computes anything."""
    body = seen.body
    if body.get("temperature", 0) < 0 or body.get("logprobs", 0) > 20 or body.get("stop") == "":
        await reply(writer, 400, b'{"error":{"message":"refused by vLLM","type":"BadRequestError","code":400}}')
    else:
        await reply(writer, 200, json.dumps(worker.whole(seen, ["a"], False)).encode())


@pytest.mark.parametrize("change", [{"temperature": -1}, {"logprobs": 21}, {"stop": ""}])
@on_uvloop
async def test_the_prefill_worker_refuses_in_its_own_words(change: dict[str, Any]) -> None:
    async with running() as s:
        s.prefill[0].behaviour = s.decode[0].behaviour = strict
        answer = await s.post({**ASK, **change})
        assert answer.status == 400
        assert answer.error["message"] == "refused by vLLM"
        assert len(s.prefill[0].generated) == 1
        assert s.decode[0].generated == []
        assert (await s.post()).status == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b'{"model":"tiny","prompt":"x","max_tokens":0}'),
        ("/v1/completions", b'{"model":"tiny","prompt":"x","max_tokens":4097}'),
        ("/v1/completions", b'{"model":"tiny","prompt":"x","stream_options":{"include_usage":true}}'),
        ("/v1/completions", b'{"model":"tiny","prompt":"x","stream":"maybe"}'),
        ("/v1/completions", b'{"model":"tiny","prompt":[ ]}'),
        ("/v1/completions", b'{"model":"tiny","prompt":""}'),
        ("/v1/completions", b'{"model":"tiny","prompt":null,"prompt_embeds":[]}'),
        ("/v1/completions", b'{"model":"tiny"}'),
        ("/v1/completions", b'{"model":5,"prompt":"x"}'),
        ("/v1/completions", b'["prompt"]'),
        ("/v1/completions", b'{"prompt":"x"'),
        ("/v1/completions", b'{"prompt":"x"}}'),
        ("/v1/completions", b'{"prompt":"\x00"}'),
        ("/v1/completions", b""),
        ("/v1/completions", b"\xff\xfex"),
        ("/v1/chat/completions", b'{"model":"tiny","messages":[]}'),
        ("/v1/chat/completions", b'{"model":"tiny","messages":"x"}'),
        ("/v1/chat/completions", b'{"model":"tiny","messages":null}'),
        ("/v1/chat/completions", b'{"model":"tiny","messages":[{}],"min_tokens":5,"max_completion_tokens":4}'),
        ("/v1/chat/completions", b'{"messages":[{}],"metadata":' + b"[" * 70_000 + b"]" * 70_000 + b"}"),
        ("/v1/completions", b'{"prompt":"x"' + b',"n":1' * 2000 + b"}"),
    ],
)
@on_uvloop
async def test_what_the_router_refuses_reaches_no_worker(path: str, body: bytes) -> None:
    def limited(s: Setup) -> None:
        s.decode[0].max_model_len = 4096

    async with running(prepare=limited) as s:
        answer = await s.post(body, path)
        assert answer.status == 400
        assert answer.error["type"] == "BadRequestError"
        assert s.prefill[0].generated == s.decode[0].generated == []


@on_uvloop
async def test_the_length_of_a_model_is_that_of_the_worker_that_takes_most() -> None:
    def limited(s: Setup) -> None:
        s.decode[0].max_model_len, s.decode[1].max_model_len = 4096, 8192

    async with running(decode=2, prepare=limited) as s:
        assert (await s.post({**ASK, "max_tokens": 8192})).status == 200
        answer = await s.post({**ASK, "max_tokens": 8193})
        assert answer.error["message"].startswith("max_tokens=8193 cannot be greater than max_model_len=8192.")
        # A request that runs whole is judged by its worker.
        assert (await s.post({**ASK, "max_tokens": 8193, "n": 2})).status == 200


@on_uvloop
async def test_a_model_whose_name_is_no_text_does_not_exist() -> None:
    async with running() as s:
        answer = await s.post(b'{"model":"\\ud800","prompt":"x"}')
        assert (answer.status, answer.error["message"]) == (404, "The model `\\ud800` does not exist.")
        answer = await s.post(b'{"eldr_\\ud800":1,"model":"tiny","prompt":"x"}')
        assert (answer.status, answer.error["param"]) == (400, "eldr_\\ud800")
        assert (await s.post(b'{"request_id":"\\ud800","model":"tiny","prompt":"x"}')).status == 200


@pytest.mark.parametrize("change", [{"logprobs": True, "top_logprobs": -1}, {"logprobs": -1}])
@on_uvloop
async def test_all_logprobs_of_a_vocabulary_are_not_sent_twice(change: dict[str, Any]) -> None:
    async with running() as s:
        assert (await s.chat({**CHAT, **change})).status == 200
        assert s.prefill[0].generated == []
        assert await s.metric("eldr_passthrough_total", reason="all_logprobs") == 1


@on_uvloop
async def test_parts_of_odd_types_are_no_text() -> None:
    async with running() as s:
        for kind in (b'["text"]', b"null", b"5"):
            raw = b'{"model":"tiny","messages":[{"role":"user","content":[{"type":%b}]}]}' % kind
            assert (await s.chat(raw)).status == 200
        assert await s.metric("eldr_passthrough_total", reason="multimodal") == 3


@on_uvloop
async def test_answers_keep_what_only_python_reads() -> None:
    extra = b'"big":18446744073709551617,"nan":NaN,"deep":' + b"[" * 2000 + b"]" * 2000

    async def odd(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fields = json.dumps(worker.whole(seen, ["a"], False)).encode()
        if worker is s.decode[0]:
            fields = fields.replace(b"null", params)
        sent.append(fields[:-1] + b"," + extra + b"}")
        await reply(writer, 200, sent[-1])

    async with running() as s:
        s.prefill[0].behaviour = s.decode[0].behaviour = odd
        for params in (b"null", b'{"remote_host": "10.0.0.1"}'):
            sent: list[bytes] = []
            answer = await s.post()
            assert answer.status == 200
            if params == b"null":
                assert answer.body == sent[-1]
            else:
                assert extra in answer.body
                assert answer.body.count(KV) == 1
                assert answer.body.endswith(b'"kv_transfer_params":null}')


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@on_uvloop
async def test_a_request_that_waits_takes_little_more_than_its_bytes(path: str) -> None:
    said = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    body = json.dumps({**CHAT, "messages": [said] * 10_000, "prompt": [300] * 500_000}).encode()
    async with running() as s:
        request = Request(b"POST", path.encode(), {b"content-type": b"application/json"}, body)
        intake = s.router.services.intake
        intake.take(request, "first")  # whatever is made once
        tracemalloc.start()
        try:
            job = intake.take(request, "second")
            held, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert job.body.text is body
    assert held < len(body) / 10
    if eldr.kernels.COMPILED:  # the reader in Python decodes the text to check it
        assert peak < len(body) / 2  # nor did the memory of a tree come and go
