"""The words of a client's prompt: of every endpoint and form, of its end, and whatever else its body says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from eldr.prompt.words import MOST_TEXT_BYTES, Words, words_of_text, words_of_tokens
from eldr.router.protocols.openai import CHAT, COMPLETIONS, ENDPOINTS, MESSAGES, RESPONSES, read_body
from eldr.router.protocols.prompt_text import prompt_text, prompt_words

USER = {"role": "user", "content": "what is it"}


def text_of(path: bytes, body: object) -> bytes | None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    endpoint = ENDPOINTS[path]
    return prompt_text(endpoint, read_body(endpoint, raw, endpoint.members, frozenset()))


def words_of(path: bytes, body: object) -> Words:
    endpoint = ENDPOINTS[path]
    return prompt_words(endpoint, read_body(endpoint, json.dumps(body).encode(), endpoint.members, frozenset()))


def same(one: Words, other: Words) -> bool:
    return one.buckets.tolist() == other.buckets.tolist() and one.counts.tolist() == other.counts.tolist()


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (COMPLETIONS, {"prompt": "a text"}, b"a text"),
        (COMPLETIONS, {"prompt": ["one", "two"]}, b"one\ntwo"),
        (COMPLETIONS, {"prompt": "caf\u00e9 \U0001f600\n\"quoted\" \\ back"}, 'café 😀\n"quoted" \\ back'.encode()),
        (CHAT, {"messages": [USER]}, b"what is it"),
        (CHAT, {"messages": [{"role": "system", "content": "rules"}, USER]}, b"what is it"),
        (CHAT, {"messages": [{"role": "developer", "content": "rules"}, USER, {"role": "system", "content": "x"}]},
         b"what is it\nx"),
        (CHAT, {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []},
                             {"role": "tool", "content": "42", "tool_call_id": "1"}]}, b"what is it\n42"),
        (CHAT, {"messages": [{"role": "user", "content": [
            {"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:AAAA"}}, "this"]}]},
         b"see\nthis"),
        (RESPONSES, {"input": "question"}, b"question"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text", "text": "why"}]}]}, b"why"),
        (RESPONSES, {"input": [USER], "instructions": "be brief"}, b"what is it"),
        (MESSAGES, {"max_tokens": 3, "system": "be brief", "messages": [USER]}, b"what is it"),
        (MESSAGES, {"max_tokens": 3, "messages": [{"role": "user", "content": [{"type": "text", "text": "s"}]}]}, b"s"),
    ],
)  # fmt: skip
def test_the_text_of_each_form(path: bytes, body: dict[str, Any], expected: bytes) -> None:
    assert text_of(path, {"model": "tiny", **body}) == expected
    assert same(words_of(path, {"model": "tiny", **body}), words_of_text(expected))


@pytest.mark.parametrize("prompt", [[1, 22, 4096], [[1, 22], [4096]], [[[1, 22, 4096]]]])
def test_token_ids_are_words(prompt: object) -> None:
    assert text_of(COMPLETIONS, {"prompt": prompt}) is None
    assert same(words_of(COMPLETIONS, {"prompt": prompt}), words_of_tokens(b"1,22,4096", 0, 9))
    spaced = json.dumps({"prompt": prompt}, indent=2).encode()
    assert text_of(COMPLETIONS, spaced) is None


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, b'{"prompt": "  "}'),
        (COMPLETIONS, b'{"prompt": {"text": "no"}}'),
        (COMPLETIONS, b'{"prompt": [true, null, {}]}'),
        (CHAT, b'{"messages": [{"role": "user", "content": {"text": "no"}}]}'),
        (CHAT, b'{"messages": [{"role": "user", "content": 7}, {"role": "user"}, 7, null]}'),
        (CHAT, b'{"messages": [{"role": "system", "content": "only rules"}]}'),
        (CHAT, b'{"messages": [{"role": "user", "content": [{"type": "text", "text": ["no"]}]}]}'),
    ],
)
def test_a_body_without_text_has_no_words(path: bytes, body: bytes) -> None:
    endpoint = ENDPOINTS[path]
    found = prompt_words(endpoint, read_body(endpoint, body, endpoint.members, frozenset()))
    assert not len(found)


def test_of_duplicate_members_the_last_is_what_the_worker_reads() -> None:
    assert text_of(COMPLETIONS, b'{"prompt": "first", "prompt": "last"}') == b"last"
    assert text_of(COMPLETIONS, b'{"prompt": [1, 2], "pro\\u006dpt": "last"}') == b"last"


def test_only_the_end_is_read() -> None:
    long = "word " * 10000 + "the question"
    for body in ({"prompt": long}, {"prompt": [long]}):
        found = text_of(COMPLETIONS, body)
        assert found is not None
        assert found.endswith(b"the question")
        assert MOST_TEXT_BYTES - 64 <= len(found) <= MOST_TEXT_BYTES
        assert found.startswith(b"word ")
    talk = [{"role": "user", "content": f"turn {number}"} for number in range(5000)]
    found = text_of(CHAT, {"messages": talk})
    assert found is not None
    assert found.endswith(b"turn 4998\nturn 4999")
    assert len(found) <= MOST_TEXT_BYTES
    escaped = text_of(COMPLETIONS, json.dumps({"prompt": "\u4e2d" * 20000}).encode())
    assert escaped is not None
    # Lengths count as JSON writes them, and the first escape may be cut in two.
    assert escaped.decode().lstrip("u4e2d") == "\u4e2d" * (MOST_TEXT_BYTES // len("\\u4e2d"))
