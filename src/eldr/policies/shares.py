"""What several routers tell each other of their running requests, so that their policies decide as one.

A policy's state is made of running requests. Where several routers send requests to the same workers, each of them
tells the others what it started and what has ended, and every policy counts all of it. Shares are whole numbers and
sums of them commute: in whatever order starts and ends arrive, the policies end up with the same state, bit for bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Share:
    """What a policy keeps of a running request, and what the policies of other routers must know of it.

    Immutable. Two shares are never equal: each stands for a request of its own.

    codes: uint8 [D], its profile as `eldr.policies.unions.encode_exposure` writes it. None if the policy has none.
    context_tokens: the tokens of its prompt.
    known: whether the profile is its own, and not the fleet's mean. Means and directions learn from own ones alone.
    computes_prompt: whether its worker computes its prompt, and a policy prices that.
    uncached_tokens: then the tokens of the prompt that the worker has to compute, otherwise 0.
    """

    __slots__ = ("codes", "computes_prompt", "context_tokens", "known", "uncached_tokens")

    def __init__(
        self,
        codes: NDArray[np.uint8] | None,
        context_tokens: int,
        known: bool = False,
        computes_prompt: bool = False,
        uncached_tokens: int = 0,
    ) -> None:
        self.codes = codes
        self.context_tokens = context_tokens
        self.known = known
        self.computes_prompt = computes_prompt
        self.uncached_tokens = uncached_tokens
