"""The text by which a worker's cache is guessed: the same for prompts that a model sees begin alike."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.kernels import JsonNames, JsonObject
from eldr.router.protocols.openai import CHAT, COMPLETIONS, ENDPOINTS, MESSAGES, RESPONSES
from eldr.router.protocols.prompt_prefix import MOST_BYTES, PromptPrefix, prompt_prefix
from tests.router.prompts import chat


def read(path: bytes, body: dict[str, Any] | bytes) -> PromptPrefix:
    endpoint = ENDPOINTS[path]
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return prompt_prefix(endpoint, JsonObject(raw, JsonNames(endpoint.members)))


def test_a_longer_conversation_begins_with_a_shorter_one() -> None:
    turns = ("tell me a story", "once upon a time", "go on", "there was", "and then?")
    for count in range(1, len(turns)):
        for system in (None, "be brief"):
            shorter, longer = read(CHAT, chat(*turns[:count], system=system)), read(CHAT, chat(*turns, system=system))
            assert longer.text.startswith(shorter.text)
            assert 0 < shorter.tokens < longer.tokens
    assert not read(CHAT, chat(*turns, system="be long")).text.startswith(read(CHAT, chat("tell me")).text)


@pytest.mark.parametrize(("path", "system"), [(RESPONSES, "instructions"), (MESSAGES, "system")])
def test_instructions_come_first(path: bytes, system: str) -> None:
    messages = {ENDPOINTS[path].input: [{"role": "user", "content": "x" * 600}]}
    one, same, other = (read(path, {**messages, system: text}) for text in ("be brief", "be brief", "be long"))
    assert one == same
    assert one.text[:16] != other.text[:16]
    assert one.tokens > read(path, messages).tokens


def test_it_does_not_matter_how_a_prompt_is_written() -> None:
    plain = read(COMPLETIONS, b'{"prompt":"a\xc3\xa4b"}')
    assert read(COMPLETIONS, rb'{ "prompt" : "a\u00e4b" }') == plain
    assert read(COMPLETIONS, b'{"prompt":["a\xc3\xa4b"]}') == plain
    ids = read(COMPLETIONS, {"prompt": [1, 22, 333]})
    assert ids == read(COMPLETIONS, b'{"prompt":[ [1 ,22,\n333] ]}') == PromptPrefix(b"1,22,333", 8 / 3, 3)
    assert read(CHAT, b'{"messages":[{"role":"user","content":"x"}]}') == read(
        CHAT, b'{"messages": [ {"content": "x", "role": "user"} ]}'
    )


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_of_a_long_prompt_the_start_is_read(path: bytes) -> None:
    text = "word " * MOST_BYTES
    prefix = read(path, {"prompt": text} if path == COMPLETIONS else chat("x" * 100, text, system="y" * 100))
    assert len(prefix.text) == MOST_BYTES
    assert prefix.tokens == pytest.approx(len(text) / 4, rel=0.01)
    ids = read(COMPLETIONS, {"prompt": list(range(10_000, 90_000))})
    assert ids.tokens == pytest.approx(80_000, rel=0.01)
    assert read(COMPLETIONS, {"prompt": list(range(30_000))}).tokens == 30_000
    assert ids.bytes_per_token == pytest.approx(6, rel=0.01)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just("role"), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([COMPLETIONS, CHAT, RESPONSES, MESSAGES]), anything, st.none() | anything)
def test_whatever_a_client_sends_has_a_start(path: bytes, value: Any, instructions: Any) -> None:
    endpoint = ENDPOINTS[path]
    prefix = read(path, {endpoint.input: value, **({endpoint.system: instructions} if endpoint.system else {})})
    assert prefix.tokens >= 0
    assert prefix.bytes_per_token > 0
