"""Where there is room, compared with every way of giving out the slots."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.router.placement.room import Need, spare

WORKERS = "abcd"

needs = st.lists(st.tuples(st.sets(st.sampled_from(WORKERS)), st.integers(0, 4)), max_size=4)
slots = st.dictionaries(st.sampled_from(WORKERS), st.integers(0, 4))


def most_met(wanted: list[Need], free: dict[str, int]) -> int:
    """How many requests can have a slot: Hall's theorem, by what each set of workers must serve and can."""
    total = sum(count for _, count in wanted)
    lacking = 0
    for size in range(len(wanted) + 1):
        for some in combinations(wanted, size):
            usable = set().union(*(workers for workers, _ in some))
            lacking = max(lacking, sum(count for _, count in some) - sum(free.get(worker, 0) for worker in usable))
    return total - lacking


@settings(max_examples=1000, deadline=None)
@given(needs, slots)
def test_a_worker_can_be_spared_if_as_many_requests_are_met_without_one_of_its_slots(
    wanted: list[Need], free: dict[str, int]
) -> None:
    before = most_met(wanted, free)
    expected = {
        worker for worker, left in free.items() if left > 0 and most_met(wanted, {**free, worker: left - 1}) == before
    }
    assert spare(wanted, free) == expected
    for some in ({"a"}, {"b", "c"}, set(WORKERS)):
        assert (most_met([*wanted, (some, 1)], free) > before) == (not some.isdisjoint(expected))
