"""Makes the demo's requests, which are sent with a fixed number in flight.

With a fixed arrival rate, batch sizes and active experts would depend on the speed of this machine. With a fixed number
in flight (a closed loop), every policy decodes the same number of sequences at a time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from eldr.load.request import Request
from eldr.workloads.prompt import Prompt

MAX_TOKENS_RANGE = (32, 64)


def make_requests(
    prompts: Sequence[Prompt], *, seed: int, max_tokens: tuple[int, int] = MAX_TOKENS_RANGE
) -> list[Request]:
    """Make one request for each prompt. Output lengths are drawn uniformly from `max_tokens`, bounds included."""
    rng = random.Random(seed)
    return [Request(number, prompt, rng.randint(*max_tokens)) for number, prompt in enumerate(prompts)]
