"""When is a routed output right: equal text, or a tie of the reference's two largest logits."""

from typing import Any

import pytest

from eldr.demo.measure import PolicyRun, Round
from eldr.demo.outputs import OutputCheck, check_outputs, first_difference
from eldr.load.outcome import Outcome

REFERENCE = Outcome(3, "code", 0.0, "abcd", [97, 98, 99, 100], [1.0] * 4)


async def verdict(
    text: str, tokens: list[int], gaps: list[float], *, again: tuple[int, int, int, int] = (97, 98, 99, 100)
) -> Any:
    asked = []

    async def ask(number: int) -> Any:
        asked.append(number)
        return list(again), list(gaps)

    check = OutputCheck()
    run = PolicyRun("jsq", [Round(outcomes=[Outcome(3, "code", 0.0, text, list(tokens), [1.0] * len(tokens))])])
    await check_outputs(run, [REFERENCE], ask, check)
    return check, asked


async def test_equal_text_is_equal_and_asks_nothing() -> None:
    check, asked = await verdict("abcd", [97, 98, 99, 100], [])
    assert (check.equal, check.ties, check.differences, check.total, asked) == (1, 0, [], 1, [])


async def test_a_difference_at_a_tie_is_a_tie() -> None:
    check, asked = await verdict("abxy", [97, 98, 120, 121], [5.0, 5.0, 0.00009, 5.0])
    assert (check.equal, check.ties, check.differences, check.total, asked) == (0, 1, [], 1, [3])


@pytest.mark.parametrize(
    "gaps",
    [
        [5.0, 5.0, 0.0001, 5.0],  # not closer than 1e-4
        [0.0, 0.0, 5.0, 0.0],  # ties elsewhere do not count
    ],
)
async def test_a_difference_elsewhere_is_a_difference(gaps: list[float]) -> None:
    check, _ = await verdict("abxy", [97, 98, 120, 121], gaps)
    assert (check.equal, check.ties, check.total) == (0, 0, 1)
    assert (check.differences[0].number, check.differences[0].position) == (3, 2)


async def test_a_shorter_output_is_a_difference() -> None:
    check, _ = await verdict("ab", [97, 98], [0.0, 0.0, 0.0, 0.0])
    assert check.ties == 1  # the reference's third token was a coin toss between going on and stopping
    check, _ = await verdict("abcde", [97, 98, 99, 100, 101], [0.0] * 4)
    assert len(check.differences) == 1


async def test_a_reference_that_does_not_repeat_itself_proves_no_tie() -> None:
    check, _ = await verdict("abxy", [97, 98, 120, 121], [0.0] * 4, again=(97, 122, 99, 100))
    assert check.ties == 0
    assert "repeat" in check.differences[0].reason


async def test_requests_that_failed_are_not_compared() -> None:
    async def ask(number: int) -> tuple[list[int], list[float]]:
        raise AssertionError("nothing to ask")

    check = OutputCheck()
    await check_outputs(
        PolicyRun("jsq", [Round(outcomes=[Outcome(3, "code", 0.0, error="status 500")])]), [REFERENCE], ask, check
    )
    assert check.total == 0


@pytest.mark.parametrize(
    ("one", "other", "position"),
    [([], [], None), ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([9, 2], [1, 2], 0), ([], [1], 0)],
)
def test_first_difference(one: list[int], other: list[int], position: int | None) -> None:
    assert first_difference(one, other) == position
