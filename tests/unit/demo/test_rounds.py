"""Rounds: a warm-up first, the same requests for all policies, as many rounds as there is time for."""

from collections.abc import Sequence

import pytest

from eldr.demo.rounds import MIN_ROUNDS, ROUNDS_TIME_S, WARM_UP_REQUESTS, run_rounds, split
from eldr.load.request import Request
from eldr.workloads.prompt import Prompt


def make(count: int) -> list[Request]:
    return [Request(number, Prompt("code", str(number)), 5) for number in range(count)]


def test_every_request_is_in_one_round_in_order() -> None:
    requests = make(WARM_UP_REQUESTS + 21)
    rounds = split(requests, 7)
    assert [len(part) for part in rounds] == [WARM_UP_REQUESTS, 7, 7, 7]
    assert [request for part in rounds for request in part] == requests


async def taken(durations_s: Sequence[float]) -> list[int]:
    """The rounds that are run if each takes the time given, the warm-up included."""
    now_s = 50.0
    numbers: list[int] = []
    rounds = split(make(WARM_UP_REQUESTS + len(durations_s) - 1), 1)

    async def take(number: int, requests: Sequence[Request]) -> None:
        nonlocal now_s
        assert requests is rounds[number]
        numbers.append(number)
        now_s += durations_s[number]

    await run_rounds(rounds, take, lambda: now_s)
    return numbers


@pytest.mark.parametrize(
    ("durations_s", "last"),
    [
        ([1.0] * 9, 8),  # time for all
        ([ROUNDS_TIME_S] * 9, MIN_ROUNDS),  # at least so many
        ([10.0] + [(ROUNDS_TIME_S - 10) / 5] * 8, 5),  # five fill the time exactly
        ([10.0] + [(ROUNDS_TIME_S - 10) / 5 + 0.1] * 8, 4),
        ([10.0, ROUNDS_TIME_S / 2, *[1.0] * 7], MIN_ROUNDS),  # the next may take as long as the longest
    ],
)
async def test_rounds_end_when_the_next_would_probably_be_too_late(durations_s: list[float], last: int) -> None:
    assert await taken(durations_s) == list(range(last + 1))
