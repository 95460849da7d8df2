"""Prefill choice: one worker for one prefix, load bounded."""

from __future__ import annotations

from collections import Counter

from eldr.router.fleet.workers import Fleet
from eldr.router.placement.prefill import LOAD_FACTOR, PrefillRing
from eldr.router.protocols.openai import CHAT, COMPLETIONS
from tests.router.prompts import chat, start


def ring_of(workers: int) -> tuple[Fleet, PrefillRing]:
    fleet = Fleet()
    ring = PrefillRing(fleet.groups[0])
    fleet.on_change(ring.fleet_changed)
    for n in range(workers):
        fleet.set_healthy(fleet.add(f"http://p:{n}", "prefill", 2**31), True)
    return fleet, ring


def chosen(ring: PrefillRing, key: bytes) -> str:
    """The URL of the worker that the ring chooses."""
    choice = ring.choose(key)
    assert choice is not None
    return choice[0].url


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


def test_a_long_shared_system_prompt_does_not_collapse_onto_one_worker() -> None:
    fleet, ring = ring_of(4)
    system = "You are a helpful assistant. " * 500
    urls = [chosen(ring, start(CHAT, chat(f"question {n}", system=system))) for n in range(400)]
    assert max(Counter(urls).values()) < 200
    assert len(set(urls)) == len(fleet.workers("prefill"))
