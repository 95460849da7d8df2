"""Compares routed outputs with those of a single plain worker, as text.

Greedy decoding picks the token with the largest logit. If the two largest are so close that float32 rounding decides,
which depends on the batch, either token is right. Such a difference is a tie and is counted separately.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from eldr.demo.measure import PolicyRun
from eldr.load.outcome import Outcome
from eldr.load.request import Request

TIE_LOGIT_GAP = 1e-4

# The generated tokens of a request, and for each the gap between the reference's two largest logits.
TopTwo = tuple[list[int], list[float]]


@dataclass(frozen=True, slots=True)
class Difference:
    """A routed output that differs from the reference.

    number: the request's. position: of the first token that differs. None if all tokens are equal.
    """

    policy: str
    number: int
    position: int | None
    reason: str


@dataclass(slots=True)
class OutputCheck:
    """How the compared outputs came out: equal, tied or different. Failed requests are not compared."""

    equal: int = 0
    ties: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.equal + self.ties + len(self.differences)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first index at which two sequences differ. If one begins with the other, that is where the shorter ends.

    None if they are equal.
    """
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return position
    return None if len(one) == len(other) else min(len(one), len(other))


async def check_outputs(
    run: PolicyRun,
    reference: Sequence[Outcome],
    ask_reference: Callable[[int], Awaitable[TopTwo]],
    check: OutputCheck,
) -> None:
    """Compare each successful output of `run` with the `reference` of the same number, and count it in `check`.

    ask_reference: returns the reference's tokens and top-two gaps for a request number. Called only where texts differ.
    """
    expected = {outcome.number: outcome for outcome in reference}
    for outcome in run.succeeded:
        own = expected[outcome.number]
        if outcome.text == own.text:
            check.equal += 1
            continue
        position = first_difference(outcome.token_ids, own.token_ids)
        reason = _why_no_tie(position, own.token_ids, await ask_reference(outcome.number))
        if reason is None:
            check.ties += 1
        else:
            check.differences.append(Difference(run.policy, outcome.number, position, reason))


def _why_no_tie(position: int | None, tokens: Sequence[int], asked: TopTwo) -> str | None:
    again, gaps = asked
    if position is None:
        return "the texts differ although the tokens are equal"
    if position >= min(len(tokens), len(gaps)):
        return "one output ends before the other"
    if list(tokens[:position]) != again[:position]:
        return "the reference itself did not repeat its output"
    if gaps[position] < TIE_LOGIT_GAP:
        return None
    return f"the reference's top two logits there are {gaps[position]:.2g} apart"


async def top_two_gaps(url: str, model: str, request: Request) -> TopTwo:
    """Ask a plain worker for `request` again, with the log-probabilities of the two likeliest tokens at each position.

    Raises aiohttp.ClientError if it does not answer.
    """
    body = {
        "model": model,
        "prompt": request.prompt.text,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 2,
        "return_token_ids": True,
        # By id, because several bytes have no text of their own and would share one key.
        "return_tokens_as_token_ids": True,
    }
    async with (
        aiohttp.ClientSession(raise_for_status=True) as session,
        session.post(f"{url}/v1/completions", json=body) as response,
    ):
        choice: dict[str, Any] = (await response.json())["choices"][0]
    gaps = []
    for likeliest in choice["logprobs"]["top_logprobs"]:
        first, second = sorted(likeliest.values(), reverse=True)[:2]
        gaps.append(first - second)
    return choice["token_ids"], gaps
