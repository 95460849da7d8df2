"""How long a prefill worker counts as busy with a prompt whose prefill nobody sees end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eldr.router.picker.prefill_times import PrefillTimes

STREAMS = st.lists(st.tuples(st.integers(0, 10**7), st.floats(0, 100)), min_size=1, max_size=200)


def test_nothing_is_known_before_the_first_stream() -> None:
    assert PrefillTimes().most_s(1000) is None


def test_twice_the_time_of_streams_and_more_for_longer_prompts() -> None:
    times = PrefillTimes()
    for _ in range(3):
        times.began(1000, 0.2)
    assert times.most_s(1000) == pytest.approx(0.4)
    assert times.most_s(10) == pytest.approx(0.4)
    assert times.most_s(5000) == pytest.approx(2.0)


def test_what_is_long_ago_is_forgotten() -> None:
    times = PrefillTimes()
    for _ in range(100):
        times.began(1000, 10.0)
    for _ in range(1000):
        times.began(1000, 0.1)
    assert times.most_s(1000) == pytest.approx(0.2, rel=0.01)


@given(STREAMS, st.integers(0, 10**7))
def test_it_lies_between_twice_the_shortest_and_what_the_prompt_adds_to_the_longest(
    streams: list[tuple[int, float]], size: int
) -> None:
    times = PrefillTimes()
    for prompt_bytes, seconds in streams:
        times.began(prompt_bytes, seconds)
    most_s = times.most_s(size)
    assert most_s is not None
    sizes, seconds_of = zip(*streams, strict=True)
    assert 2 * min(seconds_of) * 0.999 <= most_s
    assert most_s <= 2 * max(seconds_of) * max(1.0, size / max(min(sizes), 1)) * 1.001
