"""A request through the router is answered as one plain vLLM worker answers it, whatever it asks for."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest

from tests.e2e.real_fleet import MODEL, Fleet, Router, call, metric

TEXT = "def area(width, height):\n    return width * height\n\ndef volume(width, height, depth):\n    return "
OTHER = "The tenant shall pay the rent on the first day of each month; the landlord shall "
MESSAGES = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "What is 2 + 2?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}

COMPLETIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
    "stop string": {"stop": ["width", "("], "max_tokens": 60},
    "stop string kept": {"stop": ["e"], "max_tokens": 60, "extra_body": {"include_stop_str_in_output": True}},
    "logprobs": {"logprobs": 3},
    "seeded sampling": {"temperature": 1.0, "seed": 7},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": 0.5, "logit_bias": {"65": 2}},
    "min tokens": {"stop": ["e"], "extra_body": {"min_tokens": 12}},
    "token ids": {"prompt": [68, 69, 70, 32, 71, 72, 73]},
    "n = 1": {"n": 1},
    "n = 2": {"n": 2, "temperature": 1.0, "seed": 3},
    "list of prompts": {"prompt": [TEXT, OTHER]},
    "echo": {"echo": True},
    "echo with logprobs": {"echo": True, "logprobs": 1, "max_tokens": 4},
    "prompt logprobs": {"extra_body": {"prompt_logprobs": 1}},
    "regex": {"extra_body": {"structured_outputs": {"regex": "[0-9]{3}-[0-9]{4}"}}},
    "ignore eos": {"extra_body": {"ignore_eos": True}},
}
CHATS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "max tokens, old name": {"max_tokens": 9},
    "max tokens, new name": {"max_completion_tokens": 9, "max_tokens": None},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "stop string": {"stop": "a"},
    "n = 2": {"n": 2, "temperature": 1.0, "seed": 11},
    "json": {"response_format": {"type": "json_object"}},
    "continued message": {
        "messages": [*MESSAGES, {"role": "assistant", "content": "It is f"}],
        "extra_body": {"continue_final_message": True, "add_generation_prompt": False},
    },
}


def strip(value: Any) -> Any:
    """An answer without what differs from request to request: ids and times."""
    if isinstance(value, dict):
        dropped = ("id", "created", "system_fingerprint", "kv_transfer_params", "prompt_token_ids")
        return {key: strip(item) for key, item in value.items() if key not in dropped}
    return [strip(item) for item in value] if isinstance(value, list) else value


def assert_same(routed: openai.OpenAI, plain: openai.OpenAI, at: Any = "answer") -> None:
    """Equal, floats (logprobs) to 1e-3."""
    if isinstance(plain, float) and isinstance(routed, float):
        assert math.isclose(routed, plain, abs_tol=1e-3), at
    elif isinstance(plain, dict):
        assert isinstance(routed, dict), at
        assert routed.keys() == plain.keys(), at
        for key in plain:
            assert_same(routed[key], plain[key], f"{at}.{key}")
    elif isinstance(plain, list):
        assert isinstance(routed, list), at
        assert len(routed) == len(plain), at
        for number, (left, right) in enumerate(zip(routed, plain, strict=True)):
            assert_same(left, right, f"{at}[{number}]")
    else:
        assert routed == plain, at


def collect(chunks: Any) -> Any:
    """What a stream says: per choice the text, the finish reason and the logprobs; and the usage.

    Chunks are joined: vLLM puts tokens that are ready at once into one.
    """
    choices: dict[int, Any] = {}
    usage = None
    for chunk in chunks:
        data = strip(chunk.model_dump())
        usage = data.get("usage") or usage
        for choice in data["choices"]:
            seen = choices.setdefault(choice["index"], {"text": "", "finish_reason": None, "logprobs": {}})
            delta = choice.get("delta") or {}
            seen["text"] += choice.get("text") or delta.get("content") or ""
            seen["finish_reason"] = choice["finish_reason"] or seen["finish_reason"]
            for key, values in (choice.get("logprobs") or {}).items():
                seen["logprobs"].setdefault(key, []).extend(values or [])
    return {"choices": choices, "usage": usage}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions(routed: openai.OpenAI, plain: openai.OpenAI, name: str, stream: bool) -> None:
    ask = {"model": MODEL, "prompt": TEXT, **GREEDY, **COMPLETIONS[name]}
    if stream:
        if name == "prompt logprobs":
            pytest.skip("vLLM refuses prompt_logprobs in a stream")
        ask |= {"stream": True, "stream_options": {"include_usage": True}}
        answers = [collect(client.completions.create(**ask)) for client in (routed, plain)]
        assert answers[1]["choices"], "the reference is empty"
    else:
        answers = [strip(client.completions.create(**ask).model_dump()) for client in (routed, plain)]
    assert_same(*answers)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", CHATS)
def test_chat(routed: openai.OpenAI, plain: openai.OpenAI, name: str, stream: bool) -> None:
    ask = {"model": MODEL, "messages": MESSAGES, **GREEDY, **CHATS[name]}
    if stream:
        ask |= {"stream": True, "stream_options": {"include_usage": True}}
        answers = [collect(client.chat.completions.create(**ask)) for client in (routed, plain)]
        assert answers[1]["choices"], "the reference is empty"
    else:
        answers = [strip(client.chat.completions.create(**ask).model_dump()) for client in (routed, plain)]
    assert_same(*answers)


def test_usage_in_every_chunk(routed: openai.OpenAI, plain: openai.OpenAI) -> None:
    """Chunk by chunk the counts may differ, because vLLM merges tokens that are ready at once; their end may not."""
    ask = {"model": MODEL, "prompt": OTHER, **GREEDY, "stream": True}
    ask["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    streams = [[chunk.usage for chunk in client.completions.create(**ask)] for client in (routed, plain)]
    assert all(usage is not None for usage in streams[0])
    ends = [(stream[-1].prompt_tokens, stream[-1].completion_tokens) for stream in streams]
    assert ends[0] == ends[1] == (len(OTHER), GREEDY["max_tokens"])


def test_a_prompt_seen_before_gives_the_same_answer(routed: openai.OpenAI, plain: openai.OpenAI) -> None:
    """The second time, the prefill worker answers from its prefix cache and the decode worker from its own."""
    ask = {"model": MODEL, "prompt": OTHER * 3, **GREEDY}
    expected = plain.completions.create(**ask).choices[0].text
    assert [routed.completions.create(**ask).choices[0].text for _ in range(4)] == [expected] * 4


def test_what_goes_whole_to_one_worker_is_counted(router: Router, routed: openai.OpenAI) -> None:
    before = metric(router.url, "eldr_passthrough_total")
    routed.completions.create(model=MODEL, prompt=TEXT, n=2, max_tokens=2)
    assert metric(router.url, "eldr_passthrough_total") == before + 1


def test_hand_offs_really_happen(router: Router, routed: openai.OpenAI, fleet: Fleet) -> None:
    """The decode worker computes no prompt of its own: the tokens came over NIXL."""
    name = "vllm:request_success_total"
    before = sum(metric(worker.url, name) for worker in fleet.decode), metric(fleet.prefill.url, name)
    with_counts = metric(router.url, "eldr_counts_errors_total")
    routed.completions.create(model=MODEL, prompt="never seen before: " + TEXT, **GREEDY)
    after = sum(metric(worker.url, name) for worker in fleet.decode), metric(fleet.prefill.url, name)
    assert (after[0] - before[0], after[1] - before[1]) == (1, 1)
    assert metric(router.url, "eldr_counts_errors_total") == with_counts


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 0},
        {"max_tokens": "x"},
        {"temperature": -1},
        {"prompt": None},
        {"max_tokens": 10**6},
        {"logprobs": 10**6},
        {"prompt": "a" * 5000},
        {"n": 0},
    ],
)
def test_what_a_worker_refuses_is_refused_with_its_status(router: Router, fleet: Fleet, body: Any) -> None:
    ask = {"model": MODEL, "prompt": TEXT, "max_tokens": 4, "temperature": 0, **body}
    (routed_status, _, routed_body), (status, _, plain_body) = (
        call(url, "/v1/completions", ask) for url in (router.url, fleet.plain.url)
    )
    assert (routed_status, b'"error"' in routed_body) == (status, b'"error"' in plain_body)
