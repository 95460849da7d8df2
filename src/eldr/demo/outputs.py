"""Are routed outputs the ones of a single plain worker? Compared as text, with one exception for ties.

Greedy decoding picks the largest logit. Where the two largest are closer than float32 arithmetic can tell apart in
batches of different shape, either is right: such a difference is a tie, counted separately.
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

# Gap between the reference's two largest logits at each generated token of a request, and the tokens.
TopTwo = tuple[list[int], list[float]]


@dataclass(frozen=True, slots=True)
class Difference:
    """A routed output that is not the reference's. position: of the first differing token, None if none differs."""

    policy: str
    number: int
    position: int | None
    reason: str


@dataclass(slots=True)
class OutputCheck:
    """equal + ties + differences are all the compared outputs; requests that failed are not among them."""

    equal: int = 0
    ties: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.equal + self.ties + len(self.differences)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token at which two sequences differ, the end of the shorter included; None if equal."""
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
    """Compare the successful outputs of `run` with the `reference` of the same number; add the verdicts to `check`.

    ask_reference: number of a request -> the reference's tokens and top-two gaps; asked only where texts differ.
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
    """Ask a plain worker for `request` again, with the log-probabilities of its two likeliest tokens.

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
        # By id: several bytes have no text of their own and would share one key.
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
