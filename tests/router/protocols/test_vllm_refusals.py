"""What vLLM refuses, refused in its words, and nothing else.

The expectations are those of vLLM 0.32, read in its sources and tried on a worker.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from eldr.kernels import JsonNames, JsonObject
from eldr.router.http.errors import ApiError
from eldr.router.protocols.openai import CHAT, COMPLETIONS, ENDPOINTS
from eldr.router.protocols.vllm_nixl import VllmNixl

PROTOCOL = VllmNixl()


def refusal(path: bytes, body: dict[str, Any] | bytes, max_model_len: int | None = None) -> ApiError | None:
    endpoint = ENDPOINTS[path]
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        PROTOCOL.refuse_early(endpoint, JsonObject(raw, JsonNames(endpoint.members | PROTOCOL.members)), max_model_len)
    except ApiError as error:
        return error
    return None


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"max_tokens": None, "stream": None, "stream_options": None, "return_token_ids": None},
        {"max_tokens": 1, "min_tokens": 1},
        {"max_tokens": "5", "min_tokens": 5.0},
        {"max_tokens": True, "min_tokens": False},
        {"max_tokens": 100},
        {"stream": "yes", "stream_options": {"include_usage": "on", "continuous_usage_stats": 0, "else": []}},
        {"stream": 1, "stream_options": {}},
        {"stream": False, "stream_options": {}},
        {"stream": "true", "return_token_ids": "F"},
        {"temperature": -1, "n": "x", "stop": 5, "seed": 2**80},  # the prefill worker says so itself
    ],
)
def test_what_vllm_takes(path: bytes, body: dict[str, Any]) -> None:
    assert refusal(path, body, 100) is None


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0."),
        ({"max_tokens": -5}, "max_tokens", "max_tokens must be at least 1, got -5."),
        ({"max_tokens": 1.5}, "max_tokens", "an integer"),
        ({"max_tokens": "many"}, "max_tokens", "an integer"),
        ({"max_tokens": [5]}, "max_tokens", "an integer"),
        ({"max_tokens": {}}, "max_tokens", "an integer"),
        ({"max_tokens": float("nan")}, "max_tokens", "an integer"),
        ({"max_tokens": float("inf")}, "max_tokens", "an integer"),
        (
            {"max_tokens": 101},
            "max_tokens",
            "max_tokens=101 cannot be greater than max_model_len=100. Please request fewer output tokens.",
        ),
        ({"max_tokens": 10**30}, "max_tokens", "cannot be greater than max_model_len=100"),
        ({"min_tokens": -1}, "min_tokens", "min_tokens must be greater than or equal to 0, got -1."),
        ({"min_tokens": None}, "min_tokens", "an integer"),
        ({"min_tokens": "x"}, "min_tokens", "an integer"),
        (
            {"min_tokens": 9, "max_tokens": 8},
            "min_tokens",
            "min_tokens must be less than or equal to max_tokens=8, got 9.",
        ),
        ({"min_tokens": 101}, "min_tokens", "got 101."),
        ({"stream": "maybe"}, "stream", "true or false"),
        ({"stream": 2}, "stream", "true or false"),
        ({"stream": []}, "stream", "true or false"),
        (
            {"stream_options": {"include_usage": True}},
            "stream_options",
            "Stream options can only be defined when `stream=True`.",
        ),
        ({"stream": False, "stream_options": "x"}, "stream_options", "Stream options can only"),
        ({"stream": True, "stream_options": []}, "stream_options", "an object"),
        ({"stream": True, "stream_options": "x"}, "stream_options", "an object"),
        ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options.include_usage", "true or false"),
        ({"return_token_ids": "perhaps"}, "return_token_ids", "true or false"),
    ],
)
def test_what_vllm_refuses(path: bytes, body: dict[str, Any], param: str, words: str) -> None:
    error = refusal(path, body, 100)
    assert error is not None
    assert (error.status, error.param) == (400, param)
    assert words in error.message


def test_a_completion_without_a_limit_has_vllms_own() -> None:
    assert refusal(COMPLETIONS, {"min_tokens": 16}) is None
    error = refusal(COMPLETIONS, {"min_tokens": 17, "max_completion_tokens": 99})
    assert error is not None
    assert error.message == "min_tokens must be less than or equal to max_tokens=16, got 17."
    assert refusal(CHAT, {"min_tokens": 17}) is None


def test_the_limit_of_a_chat_is_max_completion_tokens_if_it_is_given() -> None:
    assert refusal(CHAT, {"max_completion_tokens": 5, "max_tokens": 0}, 9) is None
    assert refusal(CHAT, {"max_completion_tokens": None, "max_tokens": 5}, 9) is None
    error = refusal(CHAT, {"max_completion_tokens": 10, "max_tokens": 5}, 9)
    assert error is not None
    assert error.message.startswith("max_completion_tokens=10 cannot")
    assert refusal(CHAT, {"max_completion_tokens": 5, "max_tokens": "x"}, 9) is not None
    # A completion knows no such member, and takes anything in it.
    assert refusal(COMPLETIONS, {"max_completion_tokens": "x", "return_prompt_text": "x"}, 9) is None


def test_of_duplicates_the_last_is_judged() -> None:
    assert refusal(CHAT, b'{"max_tokens":0,"max_tokens":1}') is None
    assert refusal(CHAT, b'{"max_tokens":1,"max_\\u0074okens":0}') is not None


def test_without_a_known_length_any_limit_may_be_right() -> None:
    assert refusal(CHAT, {"max_tokens": 10**30, "min_tokens": 10**29}) is None
