"""Bodies at the edge of what vLLM takes: the router's status is that of one worker, and a refusal costs no prefill."""

from __future__ import annotations

import json

import pytest

from tests.e2e.real_fleet import Fleet, Router, call, metric

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

# Members that are put behind a valid request.
BOTH = (
    b'"temperature":-1',
    b'"temperature":1e999',
    b'"temperature":NaN',
    b'"temperature":"0.5"',
    b'"temperature":null',
    b'"top_p":0',
    b'"top_k":-2',
    b'"min_p":2',
    b'"seed":18446744073709551617',
    b'"seed":-1',
    b'"frequency_penalty":3',
    b'"presence_penalty":-3',
    b'"repetition_penalty":0',
    b'"stop":[""]',
    b'"stop":5',
    b'"stop":["a","b"]',
    b'"stop_token_ids":[1]',
    b'"stop_token_ids":[-1]',
    b'"stop_token_ids":[99999999]',
    b'"logit_bias":{"1":5}',
    b'"logit_bias":{"x":5}',
    b'"logit_bias":{"99999999":5}',
    b'"bad_words":[""]',
    b'"bad_words":["a"]',
    b'"allowed_token_ids":[]',
    b'"allowed_token_ids":[1,2]',
    b'"allowed_token_ids":[99999999]',
    b'"ignore_eos":true',
    b'"skip_special_tokens":"maybe"',
    b'"structured_outputs":{"regex":"a+"}',
    b'"structured_outputs":{"regex":"("}',
    b'"structured_outputs":{"choice":["x","y"]}',
    b'"structured_outputs":{"json":"no schema"}',
    b'"response_format":{"type":"json_object"}',
    b'"response_format":{"type":"json_schema"}',
    b'"priority":1',
    b'"priority":"x"',
    b'"priority":36893488147419103232',
    b'"cache_salt":""',
    b'"cache_salt":"s"',
    b'"max_tokens":0',
    b'"max_tokens":-1',
    b'"max_tokens":null',
    b'"max_tokens":"3"',
    b'"max_tokens":"x"',
    b'"max_tokens":3.0',
    b'"max_tokens":3.5',
    b'"max_tokens":[3]',
    b'"max_tokens":true',
    b'"max_tokens":2048',
    b'"max_tokens":2049',
    b'"max_tokens":36893488147419103232',
    b'"min_tokens":2',
    b'"min_tokens":3',
    b'"min_tokens":-1',
    b'"min_tokens":null',
    b'"min_tokens":"2"',
    b'"min_tokens":"x"',
    b'"min_tokens":true',
    b'"max_tokens":0,"max_tokens":3',
    b'"stream":"maybe"',
    b'"stream":2',
    b'"stream":"no"',
    b'"stream":0',
    b'"stream":null',
    b'"stream_options":{}',
    b'"stream_options":null',
    b'"stream_options":[]',
    b'"stream_options":"x"',
    b'"stream_options":{"include_usage":true}',
    b'"stream":true,"stream_options":{"include_usage":"x"}',
    b'"stream":true,"stream_options":[]',
    b'"stream":false,"stream_options":{"include_usage":false}',
    b'"stream_interval":0',
    b'"n":0',
    b'"n":"1"',
    b'"n":1.0',
    b'"n":1.5',
    b'"n":true',
    b'"truncate_prompt_tokens":2',
    b'"truncate_prompt_tokens":"-1"',
    b'"truncate_prompt_tokens":-2',
    b'"truncate_prompt_tokens":4096',
    b'"return_token_ids":true',
    b'"return_token_ids":"x"',
    b'"prompt_logprobs":-2',
    b'"use_beam_search":"x"',
    b'"repetition_detection":{"max_pattern_size":2,"min_pattern_size":1,"min_count":2}',
    b'"thinking_token_budget":"x"',
    b'"vllm_xargs":{"a":1}',
    b'"vllm_xargs":{"a":{}}',
    b'"kv_transfer_params":null',
    b'"ec_transfer_params":null',
    b'"unknown":{"a":[1e999,NaN]}',
    b'"unknown":%b1%b' % (b'{"a":' * 300, b"}" * 300),
    b'"unknown":%b' % (b"9" * 4000),
    b'"unknown":%b' % (b"9" * 5000),
    b'"user":5',
    b'"user":"\\ud800"',
    b'"model":5',
    b'"model":null',
    b'"model":""',
    b'"model":"no such model"',
    b'"x":01',
    b'"x":1.',
    b'"x":"\x01"',
    b'"x":"\xff"',
    b'"x":tru',
    b'"x":1,',
    b"5:1",
)
OF_COMPLETIONS = (
    b'"logprobs":3',
    b'"logprobs":21',
    b'"logprobs":-1',
    b'"logprobs":-2',
    b'"logprobs":true',
    b'"logprobs":"x"',
    b'"echo":"x"',
    b'"max_tokens":null,"min_tokens":17',
    b'"max_completion_tokens":"x"',
    b'"prompt":""',
    b'"prompt":null',
    b'"prompt":[]',
    b'"prompt":[[]]',
    b'"prompt":[""]',
    b'"prompt":[1,2,3]',
    b'"prompt":[[1,2,3]]',
    b'"prompt":["x"]',
    b'"prompt":[1,-2]',
    b'"prompt":[1,2.5]',
    b'"prompt":[1,2.0]',
    b'"prompt":[1,99999999]',
    b'"prompt":[1,18446744073709551617]',
    b'"prompt":[1,"x"]',
    b'"prompt":[[[1]]]',
    b'"prompt":{}',
    b'"prompt":5',
    b'"prompt":true',
    b'"prompt_embeds":"x"',
    b'"suffix":"x"',
)
OF_CHAT = (
    b'"logprobs":true,"top_logprobs":3',
    b'"logprobs":true,"top_logprobs":21',
    b'"logprobs":true,"top_logprobs":-1',
    b'"top_logprobs":3',
    b'"top_logprobs":"x"',
    b'"max_completion_tokens":0',
    b'"max_completion_tokens":2049',
    b'"max_completion_tokens":3,"max_tokens":0',
    b'"max_completion_tokens":3,"max_tokens":"x"',
    b'"max_completion_tokens":null,"max_tokens":null,"min_tokens":4',
    b'"max_completion_tokens":null,"max_tokens":null,"min_tokens":4096',
    b'"return_prompt_text":"x"',
    b'"tools":[]',
    b'"tools":{}',
    b'"tool_choice":"auto"',
    b'"reasoning_effort":"x"',
    b'"messages":[]',
    b'"messages":null',
    b'"messages":"x"',
    b'"messages":{}',
    b'"messages":[5]',
    b'"messages":[{"role":"user"}]',
    b'"messages":[{"role":"user","content":[{"type":"text","text":"x"}]}]',
    b'"messages":[{"role":"user","content":[{"type":"text"}]}]',
    b'"messages":[{"role":"user","content":[{"type":[]}]}]',
    b'"messages":[{"role":"user","content":"\\ud83d\\ude00"}]',
    b'"add_generation_prompt":true,"continue_final_message":true',
)
CASES = [(COMPLETIONS, member) for member in (*BOTH, *OF_COMPLETIONS)] + [
    (CHAT, member) for member in (*BOTH, *OF_CHAT)
]


@pytest.mark.parametrize(
    ("path", "member"), CASES, ids=[f"{path[4:]}-{member[:60].decode('latin-1')}" for path, member in CASES]
)
def test_the_status_is_that_of_one_worker(fleet: Fleet, router: Router, path: str, member: bytes) -> None:
    prompt = b'"messages":[{"role":"user","content":"hi"}]' if path == CHAT else b'"prompt":"hi"'
    body = b'{"model":"tiny",%b,"temperature":0,"max_tokens":2,%b}' % (prompt, member)
    status, _, _ = call(fleet.plain.url, path, body)
    computed = metric(fleet.prefill.url, "vllm:prompt_tokens_total")
    routed, _, answer = call(router.url, path, body)
    assert (routed, status) == (status, status), answer
    if status != 200:
        assert metric(fleet.prefill.url, "vllm:prompt_tokens_total") == computed


@pytest.mark.parametrize("raw", [b"", b"5", b"[]", b"null", b'"x"', b"{", b"\xff", b"{}", b"NaN"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_bodies_that_are_no_request(fleet: Fleet, router: Router, path: str, raw: bytes) -> None:
    assert call(router.url, path, raw)[0] == call(fleet.plain.url, path, raw)[0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
def test_encodings(fleet: Fleet, router: Router, encoding: str) -> None:
    body = '{"model":"tiny","prompt":"hä","temperature":0,"max_tokens":4}'.encode(encoding)
    expected, answer = call(fleet.plain.url, COMPLETIONS, body), call(router.url, COMPLETIONS, body)
    assert answer[0] == expected[0] == 200
    assert json.loads(answer[2])["choices"] == json.loads(expected[2])["choices"]
