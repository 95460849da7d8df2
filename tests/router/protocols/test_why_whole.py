"""Which requests to /v1/responses and /v1/messages can be handed off."""

from __future__ import annotations

import json
from typing import Any

import pytest

from eldr.kernels import JsonObject
from eldr.router.http.errors import ApiError
from eldr.router.protocols import openai
from eldr.router.protocols.vllm_nixl import VllmNixl

# These mean something for completions, and nothing for other APIs.
OTHERS = {"n": 2, "best_of": 2, "use_beam_search": True, "echo": True, "prompt_logprobs": 1, "suffix": "x"}
OFTEN = b",".join([b'"type":"message"'] * 2000)
SAID: list[Any] = [{"role": "user", "content": "hello"}]


def read(protocol: VllmNixl, endpoint: openai.Endpoint, body: bytes) -> JsonObject:
    names = openai.body_names(endpoint.members | protocol.members)
    return openai.read_body(endpoint, body, names, openai.body_names(frozenset()))


def why(path: bytes, body: dict[str, Any]) -> str | None:
    protocol, endpoint = VllmNixl(), openai.ENDPOINTS[path]
    return protocol.why_whole(endpoint, read(protocol, endpoint, json.dumps(body).encode()))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"input": "hello"}, None),
        ({"input": ""}, None),
        ({"input": SAID}, None),
        ({"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "x"}]}]}, None),
        ({"input": [{"role": "assistant", "content": [{"type": "output_text", "text": "x"}]}]}, None),
        ({"input": [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}], "summary": []}]}, None),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"}]}, None),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "42"}]}, None),
        ({"input": [{"type": "function_call_output", "output": [{"type": "input_text", "text": "42"}]}]}, None),
        ({"input": [{"type": "function_call_output", "output": [{"type": "input_image"}]}]}, "multimodal"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "multimodal"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "multimodal"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input_item"),
        ({"input": [{"type": "computer_call_output", "output": {"type": "computer_screenshot"}}]}, "input_item"),
        ({"input": [{"type": 5}]}, "input_item"),
        ({"input": ["odd", 5, None]}, None),
        ({"input": "x", "tools": []}, None),
        ({"input": "x", "tools": None}, None),
        ({"input": "x", "tools": [{"type": "function", "name": "f"}]}, None),
        ({"input": "x", "tools": [{"type": "function"}, {"type": "web_search_preview"}]}, "builtin_tools"),
        ({"input": "x", "tools": [{"type": "mcp", "server_label": "l"}]}, "builtin_tools"),
        ({"input": "x", "tools": [{"type": "code_interpreter"}]}, "builtin_tools"),
        ({"input": "x", "tools": [{"name": "f"}]}, "builtin_tools"),
        ({"input": "x", "truncation": "disabled"}, None),
        ({"input": "x", "truncation": "auto"}, "truncate_to_context"),
        ({"input": "x", "previous_input_messages": []}, "previous_input_messages"),
        ({"input": "x", "max_output_tokens": 3, "store": True, "stream": True}, None),
        ({"input": "x", "top_logprobs": -1}, "all_logprobs"),
        ({"input": "x", **OTHERS}, None),
    ],
)
def test_responses(body: dict[str, Any], reason: str | None) -> None:
    assert why(openai.RESPONSES, body) == reason


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (openai.RESPONSES, b'{"input":[{%b}]}' % OFTEN),
        (openai.RESPONSES, b'{"input":[{"type":"function_call_output","output":[{%b}]}]}' % OFTEN),
        (openai.RESPONSES, b'{"input":"x","tools":[{%b}]}' % OFTEN),
        (
            openai.MESSAGES,
            b'{"messages":[{"content":"tool_result",%b}]}' % OFTEN.replace(b"type", b"content"),
        ),
    ],
)
def test_names_that_are_repeated_without_end_are_refused(path: bytes, body: bytes) -> None:
    protocol, endpoint = VllmNixl(), openai.ENDPOINTS[path]
    fields = read(protocol, endpoint, body)
    with pytest.raises(ApiError) as refused:
        protocol.why_whole(endpoint, fields)
    assert refused.value.status == 400


def blocks(*content: Any) -> dict[str, Any]:
    return {"messages": [*SAID, {"role": "user", "content": list(content)}]}


IMAGE = {"type": "image", "source": {"type": "base64", "data": ""}}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"messages": SAID}, None),
        (blocks(), None),
        (blocks({"type": "text", "text": "an image of a tool_result"}), None),
        (blocks({"type": "thinking", "thinking": "x"}, {"type": "redacted_thinking", "data": "x"}), None),
        (blocks({"type": "tool_use", "id": "t", "name": "f", "input": {"content": [IMAGE]}}), None),
        (blocks({"type": "tool_result", "tool_use_id": "t", "content": "42"}), None),
        (blocks({"type": "tool_result", "tool_use_id": "t"}), None),
        (
            blocks({"type": "tool_result", "content": [{"type": "text", "text": "42"}, {"type": "tool_reference"}]}),
            None,
        ),
        (blocks({"type": "tool_result", "content": [{"type": "text", "text": "42"}, IMAGE]}), "multimodal"),
        (blocks({"type": "text", "text": "x"}, IMAGE), "multimodal"),
        (blocks({"type": "document", "source": {}}), "multimodal"),
        ({"messages": SAID, "tools": [{"name": "f", "input_schema": {}}], "system": "x"}, None),
        ({"messages": SAID, "top_logprobs": -1, "truncation": "auto", **OTHERS}, None),
    ],
)
def test_messages(body: dict[str, Any], reason: str | None) -> None:
    assert why(openai.MESSAGES, body) == reason


MANY = 20_000
OUTPUT = {"type": "function_call_output", "output": [{"type": "input_text"}] * 9}


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        (openai.RESPONSES, {"input": [{}] * MANY}, "input_item"),
        (openai.RESPONSES, {"input": [1] * MANY}, "input_item"),
        (openai.RESPONSES, {"input": [OUTPUT] * (MANY // 10)}, "multimodal"),
        (openai.RESPONSES, {"input": [OUTPUT] * (MANY // 20)}, None),
        (openai.RESPONSES, {"input": "x", "tools": [{"type": "function"}] * MANY}, "builtin_tools"),
        (openai.MESSAGES, {"messages": [{"content": "tool_result"}] * MANY}, "multimodal"),
        (openai.MESSAGES, {"messages": [{"content": "x"}] * MANY}, None),
    ],
)
def test_what_would_take_long_to_look_at_runs_whole(path: bytes, body: dict[str, Any], reason: str | None) -> None:
    """A body of empty objects alone has millions of them, and the router does nothing else meanwhile."""
    assert why(path, body) == reason


def test_an_image_is_found_however_it_is_written() -> None:
    raw = (
        rb'{"messages": [{"role": "user", "content": "no"}, {"role": "user", "\u0063ontent": [{"type": "tool_result",'
        rb' "content": [{"typ\u0065": "im\u0061ge"}]}]}]}'
    )
    protocol, endpoint = VllmNixl(), openai.ENDPOINTS[openai.MESSAGES]
    body = read(protocol, endpoint, raw)
    assert protocol.why_whole(endpoint, body) == "multimodal"


@pytest.mark.parametrize("extra", [{}, {"request_id": "mine"}, {"request_id": 5}])
def test_the_name_of_a_leg_is_written_once(extra: dict[str, Any]) -> None:
    protocol, endpoint = VllmNixl(), openai.ENDPOINTS[openai.RESPONSES]
    raw = json.dumps({"input": "x", "store": True, "enable_response_messages": True, **extra}).encode()
    body = read(protocol, endpoint, raw)
    for leg in ("mine", "mine-prefill-1", 'odd"name\\'):
        decode = protocol.whole_body(endpoint, body, False, leg)
        prefill = protocol.prefill_body(endpoint, body, False, leg)
        own = extra.get("request_id") == "mine" and leg.startswith("mine")
        for written in (decode, prefill):
            assert written.count(b'"request_id"') == 1
            assert json.loads(written)["request_id"] == (leg if own else f"resp_{leg}")
        assert json.loads(decode)["store"] is True
        assert json.loads(prefill)["store"] is False
        assert "enable_response_messages" not in json.loads(prefill)
        assert protocol.is_named_after(json.loads(decode)["request_id"], leg)
        assert not protocol.is_named_after(json.loads(decode)["request_id"], leg + "x")
