"""Prefill choice: one worker for one prefix, load bounded."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.router.fleet.workers import Fleet
from eldr.router.placement.prefill import LOAD_FACTOR, PrefillRing
from eldr.router.protocols.openai import CHAT, COMPLETIONS, prompt_start


def ring_of(workers: int) -> tuple[Fleet, PrefillRing]:
    fleet = Fleet()
    ring = PrefillRing(fleet.groups[0])
    fleet.on_change(ring.fleet_changed)
    for n in range(workers):
        fleet.set_healthy(fleet.add(f"http://p:{n}", "prefill", 2**31), True)
    return fleet, ring


def start(path: bytes, body: dict[str, Any]) -> bytes:
    return prompt_start(path, body, 1024)


def chosen(ring: PrefillRing, key: bytes) -> str:
    """The URL of the worker that the ring chooses."""
    choice = ring.choose(key)
    assert choice is not None
    return choice[0].url


def chat(*contents: str, system: str | None = None) -> dict[str, Any]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return {"messages": messages + [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]}


def test_keys_spread_evenly_and_keep_their_worker_when_another_leaves() -> None:
    fleet, ring = ring_of(8)
    keys = [start(COMPLETIONS, {"prompt": f"prompt {n}"}) for n in range(8000)]
    before = [chosen(ring, key) for key in keys]
    shares = Counter(before).values()
    assert len(shares) == 8
    assert max(shares) < 1.35 * 1000
    gone = next(iter(fleet.workers("prefill").values()))
    fleet.set_healthy(gone, False)
    after = [chosen(ring, key) for key in keys]
    assert gone.url not in after
    assert all(b == a for b, a in zip(before, after, strict=True) if b != gone.url)


def test_load_is_bounded_and_spills_go_to_one_next_worker() -> None:
    fleet, ring = ring_of(4)
    key = start(COMPLETIONS, {"prompt": "all the same"})
    spills = 0
    for sent in range(400):
        choice = ring.choose(key)
        assert choice is not None
        worker, spilled = choice
        spills += spilled
        fleet.started(worker)
        most = max(w.in_flight for w in fleet.workers("prefill").values())
        assert most <= -(-LOAD_FACTOR * (sent + 1) // 4)
    loads = sorted(w.in_flight for w in fleet.workers("prefill").values())
    assert loads[-1] == 125
    assert spills == 400 - 125


def test_the_same_start_has_the_same_key_within_the_window() -> None:
    start = partial(prompt_start, window_bytes=16)
    assert start(COMPLETIONS, {"prompt": "x" * 16 + "a"}) == start(COMPLETIONS, {"prompt": "x" * 16 + "b"})
    assert start(COMPLETIONS, {"prompt": "x" * 15 + "a"}) != start(COMPLETIONS, {"prompt": "x" * 15 + "b"})
    assert start(COMPLETIONS, {"prompt": "ä" * 8 + "a"}) == start(COMPLETIONS, {"prompt": "ä" * 8 + "b"})
    assert start(COMPLETIONS, {"prompt": ["x"]}) == start(COMPLETIONS, {"prompt": "x"})
    assert start(COMPLETIONS, {"prompt": [1, 2, 3, 4, 5]}) == start(COMPLETIONS, {"prompt": [1, 2, 3, 4, 9]})
    assert start(COMPLETIONS, {"prompt": [1, 2]}) != start(COMPLETIONS, {"prompt": [1, 3]})


def test_a_long_shared_system_prompt_does_not_collapse_onto_one_worker() -> None:
    fleet, ring = ring_of(4)
    system = "You are a helpful assistant. " * 500
    urls = [chosen(ring, start(CHAT, chat(f"question {n}", system=system))) for n in range(400)]
    assert max(Counter(urls).values()) < 200
    assert len(set(urls)) == len(fleet.workers("prefill"))


def test_a_conversation_stays_when_it_grows_beyond_the_window() -> None:
    start = partial(prompt_start, window_bytes=64)
    first = chat("tell me a story about " + "a" * 80, system="be brief")
    later = chat("tell me a story about " + "a" * 80, "once", "go on", system="be brief")
    assert start(CHAT, first) == start(CHAT, later)
    assert start(CHAT, first) != start(CHAT, chat("tell me a story about " + "a" * 80, system="be long"))


def test_the_order_of_keys_in_a_message_does_not_matter() -> None:
    a = {"messages": [{"role": "user", "content": "x"}]}
    b = {"messages": [{"content": "x", "role": "user"}]}
    assert start(CHAT, a) == start(CHAT, b)


@settings(max_examples=50, deadline=None)
@given(st.recursive(st.none() | st.integers(0, 9) | st.text(max_size=5), lambda s: st.lists(s, max_size=3)))
def test_any_json_has_a_key(value: Any) -> None:
    start(COMPLETIONS, {"prompt": value})
    start(CHAT, {"messages": [value]})
