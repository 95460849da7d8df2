"""The start of a prompt: the same however it is written, and no more than is needed to tell prompts apart."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.router.protocols.openai import CHAT, COMPLETIONS
from tests.router.prompts import chat, start


def test_the_same_start_has_the_same_key_within_the_window() -> None:
    short = partial(start, window_bytes=16)
    assert short(COMPLETIONS, {"prompt": "x" * 16 + "a"}) == short(COMPLETIONS, {"prompt": "x" * 16 + "b"})
    assert short(COMPLETIONS, {"prompt": "x" * 15 + "a"}) != short(COMPLETIONS, {"prompt": "x" * 15 + "b"})
    assert short(COMPLETIONS, {"prompt": "ä" * 8 + "a"}) == short(COMPLETIONS, {"prompt": "ä" * 8 + "b"})
    assert short(COMPLETIONS, {"prompt": ["x"]}) == short(COMPLETIONS, {"prompt": "x"})
    assert short(COMPLETIONS, {"prompt": [[1, 2]]}) == short(COMPLETIONS, {"prompt": [1, 2]})
    assert short(COMPLETIONS, {"prompt": [1, 2, 3, 4, 5]}) == short(COMPLETIONS, {"prompt": [1, 2, 3, 4, 9]})
    assert short(COMPLETIONS, {"prompt": [1, 2, 3, 45]}) != short(COMPLETIONS, {"prompt": [1, 2, 3, 4]})
    assert short(COMPLETIONS, {"prompt": [1, 2]}) != short(COMPLETIONS, {"prompt": [1, 3]})


def test_a_conversation_stays_when_it_grows_beyond_the_window() -> None:
    short = partial(start, window_bytes=64)
    first = chat("tell me a story about " + "a" * 80, system="be brief")
    later = chat("tell me a story about " + "a" * 80, "once", "go on", system="be brief")
    assert short(CHAT, first) == short(CHAT, later)
    assert short(CHAT, first) != short(CHAT, chat("tell me a story about " + "a" * 80, system="be long"))


@pytest.mark.parametrize("count", [1, 15, 16, 17, 40])
def test_all_leading_system_messages_count_and_no_later_one(count: int) -> None:
    system = [{"role": "developer" if n % 2 else "system", "content": f"rule {n}"} for n in range(count)]
    talk = [{"role": "user", "content": "x" * 2000}, {"role": "system", "content": "late"}]
    whole = start(CHAT, {"messages": [*system, *talk]})
    assert whole == start(CHAT, {"messages": [*system, *talk, *talk]})
    assert whole != start(CHAT, {"messages": [*system[:-1], *talk]})
    assert start(CHAT, {"messages": system}) != start(
        CHAT, {"messages": system[:-1]} if count > 1 else {"messages": talk}
    )


def test_short_messages_fill_the_window_however_many_they_are() -> None:
    many = [{"role": "user", "content": str(n)} for n in range(100)]
    other = [*many[:99], {"role": "user", "content": "other"}]
    assert start(CHAT, {"messages": many}, 10_000) != start(CHAT, {"messages": other}, 10_000)
    assert start(CHAT, {"messages": many}, 500) == start(CHAT, {"messages": other}, 500)


def test_a_long_message_is_known_by_its_beginning() -> None:
    def said(role: str, text: str) -> bytes:
        return start(CHAT, {"messages": [{"role": role, "content": text}]}, 64)

    assert said("user", "a" * 500) == said("user", "a" * 400)
    assert said("user", "a" * 500) != said("user", "b" + "a" * 499)
    parts = [{"type": "text", "text": "a" * 500}]
    one = start(CHAT, {"messages": [{"role": "user", "content": parts}]}, 64)
    assert one == start(CHAT, {"messages": [{"content": [*parts, *parts], "role": "user"}]}, 64)


texts = st.text(st.characters(codec="utf-8"), max_size=30)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(("system", "user", "assistant")), texts), min_size=1, max_size=4), texts)
def test_the_way_it_is_written_does_not_matter(said: list[tuple[str, str]], prompt: str) -> None:
    def written(body: dict[str, Any], **style: Any) -> bytes:
        return json.dumps(body, **style).encode()

    talk = {"messages": [{"role": role, "content": text} for role, text in said]}
    turned = {"messages": [{"content": text, "role": role} for role, text in said]}
    text, ids = {"prompt": prompt}, {"prompt": [len(word) for word in (prompt or "x")]}
    for path, one, other in ((CHAT, talk, turned), (COMPLETIONS, text, text), (COMPLETIONS, ids, ids)):
        for window_bytes in (3, 16, 1024):
            keys = {
                start(path, written(one), window_bytes),
                start(path, written(other, indent=2), window_bytes),
                start(path, written(other, ensure_ascii=False, separators=(",", ":")), window_bytes),
            }
            assert len(keys) == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(("a", "\\", "ä", "€", "😀", '"', "\n")), max_size=60).map("".join), st.integers(1, 20))
def test_a_text_is_cut_where_it_would_be_without_escapes(prompt: str, window_bytes: int) -> None:
    text = prompt + "x" * 400
    expected = json.dumps(text, ensure_ascii=False).encode()[: len('"') + window_bytes]
    assert start(COMPLETIONS, {"prompt": text}, window_bytes) == expected


@settings(max_examples=50, deadline=None)
@given(st.recursive(st.none() | st.integers(0, 9) | st.text(max_size=5), lambda s: st.lists(s, max_size=3)))
def test_any_json_has_a_key(value: Any) -> None:
    start(COMPLETIONS, {"prompt": value})
    start(CHAT, {"messages": [value]})


def test_what_no_other_parser_reads_has_a_key() -> None:
    for text in (b'{"x":NaN}', b'{"x":1e999,"role":"system"}', b"[" * 2000 + b"]" * 2000, b'{"role":"\\ud800"}'):
        assert start(CHAT, b'{"messages":[%b]}' % text)
    assert start(COMPLETIONS, b'{"prompt":"\\ud800%b"}' % (b"\\ud83d\\ude00" * 1000))
