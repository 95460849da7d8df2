"""/v1/responses, /v1/messages and what one worker answers alone: the router answers as one plain vLLM worker does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import anthropic
import openai
import pytest

from tests.e2e.real_fleet import MODEL, Fleet, Router, call, metric

TEXT = "def area(width, height):\n    return width * height\n\ndef volume(width, height, depth):\n    return "
SAID: list[Any] = [{"role": "user", "content": "What is 2 + 2?"}]
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
FUNCTION = {"type": "function", "name": "f", "parameters": SCHEMA}
CALLED: list[Any] = [
    {"role": "user", "content": "hi"},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "42"},
]
RESULT: list[Any] = [
    *SAID,
    {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}}]},
    {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "4"}]}],
    },
]
# What differs from request to request: ids and times.
VARY = ("id", "item_id", "call_id", "created_at", "completed_at", "signature", "sequence_number")

RESPONSES: dict[str, dict[str, Any]] = {
    "text": {"input": TEXT},
    "empty": {"input": ""},
    "one token": {"input": "hi", "max_output_tokens": 1},
    "instructions": {"input": "hi", "instructions": "Answer in one word."},
    "a conversation": {"input": [*SAID, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}]},
    "function calls": {"input": CALLED},
    "a named function": {"input": "hi", "tools": [FUNCTION], "tool_choice": {"type": "function", "name": "f"}},
    "json": {"input": "hi", "text": {"format": {"type": "json_object"}}},
    "logprobs": {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2},
    "messages": {"input": "hi", "extra_body": {"enable_response_messages": True}},
    "stored": {"input": "hi", "store": True},
    "truncated": {"input": "hi", "truncation": "auto"},
}
MESSAGES: dict[str, dict[str, Any]] = {
    "text": {"messages": SAID},
    "one token": {"messages": SAID, "max_tokens": 1},
    "system": {"messages": SAID, "system": "Answer in one word."},
    "blocks": {"messages": [{"role": "user", "content": [{"type": "text", "text": TEXT}]}]},
    "stop sequence": {"messages": SAID, "stop_sequences": ["e"], "max_tokens": 60},
    "a tool's result": {"messages": RESULT},
}


def strip(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: strip(item) for key, item in value.items() if key not in VARY}
    return [strip(item) for item in value] if isinstance(value, list) else value


def collect(stream: Iterable[Any]) -> tuple[list[str], str, list[Any]]:
    """The kinds of a stream's events, its text, and the events that are no part of a text."""
    kinds: list[str] = []
    text, others = "", []
    for event in stream:
        data = strip(event.model_dump())
        if not kinds or kinds[-1] != data["type"]:
            kinds.append(data["type"])
        if data["type"].endswith("delta") and data["type"] != "message_delta":
            delta = data["delta"]
            text += delta if isinstance(delta, str) else delta["text"]
        else:
            others.append(data)
    return kinds, text, others


def anthropic_of(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0, timeout=60)


@pytest.mark.parametrize("name", RESPONSES)
def test_responses(router: Router, routed: openai.OpenAI, plain: openai.OpenAI, name: str) -> None:
    ask = {"model": MODEL, "temperature": 0, "max_output_tokens": 24, **RESPONSES[name]}
    handed_off = metric(router.url, "eldr_handoffs_total")
    ours, theirs = (strip(client.responses.create(**ask).model_dump()) for client in (routed, plain))
    assert ours == theirs
    ours, theirs = (collect(client.responses.create(stream=True, **ask)) for client in (routed, plain))
    assert ours == theirs
    assert ours[0][-1] == "response.completed"
    assert metric(router.url, "eldr_handoffs_total") - handed_off == (0 if name == "truncated" else 2)


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(router: Router, fleet: Fleet, name: str) -> None:
    ask = {"model": MODEL, "max_tokens": 24, "extra_body": {"temperature": 0}, **MESSAGES[name]}
    handed_off = metric(router.url, "eldr_handoffs_total")
    clients = [anthropic_of(url) for url in (router.url, fleet.plain.url)]
    ours, theirs = (strip(client.messages.create(**ask).model_dump()) for client in clients)
    assert ours == theirs
    ours, theirs = (collect(client.messages.create(stream=True, **ask)) for client in clients)
    assert ours == theirs
    assert ours[0][-1] == "message_stop"
    assert metric(router.url, "eldr_handoffs_total") - handed_off == 2


def test_no_wrong_answer_was_suspected(router: Router) -> None:
    assert metric(router.url, "eldr_worker_failures_total") == 0
    assert metric(router.url, "eldr_counts_errors_total") == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "hello"}),
        ("/tokenize", {"messages": SAID}),
        ("/detokenize", {"tokens": [68, 69]}),
        ("/v1/messages/count_tokens", {"messages": SAID}),
        ("/generative_scoring", {"query": "a", "items": ["b"], "label_token_ids": [1, 2]}),
        ("/v1/embeddings", {"input": "hello"}),
        ("/v1/completions/render", {"prompt": "hello"}),
        ("/version", None),
    ],
)
def test_what_one_worker_answers_alone(router: Router, fleet: Fleet, path: str, body: dict[str, Any] | None) -> None:
    ask = None if body is None else {"model": MODEL, **body}
    (status, _, ours), (plain_status, _, theirs) = (call(url, path, ask) for url in (router.url, fleet.plain.url))
    assert status == plain_status
    left_out = ("id", "request_id", "created")
    assert [
        {key: value for key, value in json.loads(raw).items() if key not in left_out} for raw in (ours, theirs)
    ] == [{key: value for key, value in json.loads(theirs).items() if key not in left_out}] * 2


REFUSED: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "/v1/responses": (
        {"input": "hi"},
        [
            {"max_output_tokens": 0}, {"max_output_tokens": 10**6}, {"max_output_tokens": 4.5}, {"temperature": -1},
            {"previous_response_id": "resp_x"}, {"background": True}, {"input": []}, {"input": None}, {"top_p": 9},
            {"stream": "x"}, {"tools": "x"}, {"prompt": {"id": "x"}}, {"model": "other"},
        ],
    ),
    "/v1/messages": (
        {"messages": SAID, "max_tokens": 4},
        [
            {"max_tokens": 0}, {"max_tokens": 10**6}, {"max_tokens": None}, {"temperature": -1}, {"messages": []},
            {"messages": "x"}, {"thinking": {"type": "enabled", "budget_tokens": 2000}}, {"stream": "x"},
            {"tool_choice": {"type": "tool"}}, {"messages": [{"role": "user", "content": [{"type": "x"}]}]},
            {"model": "other"},
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body"), [(path, {**base, **wrong}) for path, (base, every) in REFUSED.items() for wrong in every]
)
def test_what_a_worker_refuses_is_refused_with_its_status(router: Router, fleet: Fleet, path: str, body: Any) -> None:
    ask = {"model": MODEL, **body}
    ours, theirs = (call(url, path, ask)[0] for url in (router.url, fleet.plain.url))
    assert (ours, ours >= 400) == (theirs, True)
