"""Lines of a fair queue: what cannot start holds up nobody else, and gives no client a larger share."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.router.placement.fair_queue import FairQueue


def test_lines_do_not_multiply_a_clients_share() -> None:
    queue: FairQueue[Any] = FairQueue(1000)
    for number in range(100):
        queue.push(("many", number), b"many", 10, line=number)
    for number in range(100):
        queue.push(("one", number), b"one", 10, line="x")
    first = [queue.pop() for _ in range(40)]
    assert sum(item is not None and item[0] == "one" for item in first) in (19, 20, 21)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(1, 9)), max_size=40),
    st.lists(st.sets(st.sampled_from("xyz")), max_size=40),
)
def test_only_lines_that_may_move_do_and_each_keeps_its_order(
    pushed: list[tuple[str, str, int]], moves: list[set[str]]
) -> None:
    queue: FairQueue[tuple[str, str, int]] = FairQueue(1000)
    for number, (client, line, cost) in enumerate(pushed):
        queue.push((client, line, number), client.encode(), cost, line)
    left = [(client, line, number) for number, (client, line, _) in enumerate(pushed)]
    for lines in moves:
        item = queue.pop(lines.__contains__)
        assert (item is None) == all(line not in lines for _, line, _ in left)
        if item is not None:
            assert item == next(each for each in left if each[:2] == item[:2])
            left.remove(item)
    assert len(queue) == len(left)
    for line in "xyz":
        assert sorted(queue.take(line)) == sorted(each for each in left if each[1] == line)
    assert len(queue) == 0
