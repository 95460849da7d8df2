"""What the router remembers of the workers' prefix caches, against a plain cache of prefixes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.router.fleet.workers import Worker
from eldr.router.placement.prefixes import CHUNK_BYTES, MOST_CHUNKS, Prefix, SeenPrefixes

WORKERS = ("http://w:1", "http://w:2", "http://w:3")


def prompt(letters: str, spare: int = 0) -> Prefix:
    """A prompt of one chunk per letter, and some bytes that fill none."""
    text = "".join(letter * CHUNK_BYTES for letter in letters).encode() + b"." * spare
    return Prefix(text, 4, len(text) // 4)


class PlainCache:
    """A cache of whole prefixes, each with the time of its last use. Of the oldest, it drops the longest first.

    That is what an engine does: the blocks of a prompt are used together, and evicted from the end.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.used: dict[str, int] = {}

    def add(self, letters: str, now: int) -> None:
        for length in range(1, len(letters) + 1):
            self.used[letters[:length]] = now
        while len(self.used) > self.most:
            self.used.pop(min(self.used, key=lambda prefix: (self.used[prefix], -len(prefix))))

    def longest(self, letters: str) -> int:
        return max((n for n in range(1, len(letters) + 1) if letters[:n] in self.used), default=0)


texts = st.text("ab", max_size=8)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.sampled_from(WORKERS), texts, st.booleans()), max_size=40))
def test_the_same_is_known_as_a_plain_cache_would_hold(most: int, events: list[tuple[str, str, bool]]) -> None:
    workers = {url: Worker(url, "aggregated", 1, cache_tokens=most * CHUNK_BYTES // 4) for url in WORKERS}
    seen, plain = SeenPrefixes(), {url: PlainCache(most) for url in WORKERS}
    for now, (url, letters, restart) in enumerate(events):
        if restart:
            seen.forget(url)
            plain[url] = PlainCache(most)
        seen.sent(prompt(letters), workers[url])
        plain[url].add(letters, now)
        for asked in ("aaaaaaaa", "abababab", letters, letters + "b"):
            expected = {url: plain[url].longest(asked) * CHUNK_BYTES // 4 for url in WORKERS}
            assert seen.cached_tokens(prompt(asked, 7), WORKERS) == {url: n for url, n in expected.items() if n}


def test_only_whole_chunks_of_the_start_count() -> None:
    seen, worker = SeenPrefixes(), Worker(WORKERS[0], "aggregated", 1)
    seen.sent(prompt("abc", 100), worker)
    assert seen.cached_tokens(prompt("abc", 300), WORKERS) == {worker.url: 3 * CHUNK_BYTES // 4}
    assert seen.cached_tokens(prompt("abx"), WORKERS) == {worker.url: 2 * CHUNK_BYTES // 4}
    assert seen.cached_tokens(prompt("xbc"), WORKERS) == {}
    assert seen.cached_tokens(prompt("", 511), WORKERS) == {}
    assert seen.cached_tokens(prompt("abc"), WORKERS[1:]) == {}


def test_an_adapter_has_a_cache_of_its_own() -> None:
    seen, worker, text = SeenPrefixes(), Worker(WORKERS[0], "aggregated", 1), b"a" * 4096
    seen.sent(Prefix(text, 4, 1024, "sql"), worker)
    assert seen.cached_tokens(Prefix(text, 4, 1024, "sql"), WORKERS) == {worker.url: 1024}
    assert seen.cached_tokens(Prefix(text, 4, 1024, "c"), WORKERS) == {}
    assert seen.cached_tokens(Prefix(text, 4, 1024), WORKERS) == {}


def test_a_worker_that_keeps_no_prefixes_has_none() -> None:
    seen, worker = SeenPrefixes(), Worker(WORKERS[0], "aggregated", 1, cache_tokens=0)
    seen.sent(prompt("abc"), worker)
    assert seen.cached_tokens(prompt("abc"), WORKERS) == {}


def test_no_more_is_remembered_than_is_allowed() -> None:
    seen, worker = SeenPrefixes(), Worker(WORKERS[0], "aggregated", 1, cache_tokens=10**12)
    first = Prefix(b"first" * CHUNK_BYTES, 4, 640)
    seen.sent(first, worker)
    for number in range(MOST_CHUNKS // 64):
        assert seen.cached_tokens(first, WORKERS)
        seen.sent(Prefix(b"%07d." % number * 64 * 64, 4, 8192), worker)
    assert seen.cached_tokens(first, WORKERS) == {}
