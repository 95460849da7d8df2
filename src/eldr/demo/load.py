"""The demo's requests, which are sent with a fixed number in flight.

Closed loop, because a fixed arrival rate would make the batches, and with them the active experts, depend on how
fast this machine is; with a fixed number in flight both policies decode the same number of sequences at a time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from eldr.load.request import Request
from eldr.workloads.prompt import Prompt

MAX_TOKENS_RANGE = (96, 160)


def make_requests(prompts: Sequence[Prompt], *, seed: int) -> list[Request]:
    """A request for each prompt, lengths drawn evenly from MAX_TOKENS_RANGE."""
    rng = random.Random(seed)
    return [Request(number, prompt, rng.randint(*MAX_TOKENS_RANGE)) for number, prompt in enumerate(prompts)]
