"""What several routers tell each other of their running requests, so that their policies decide as one.

A policy's state is made of running requests. Where several routers send requests to the same workers, each of them
tells the others what it started and what has ended, and every policy counts all of it. Shares are whole numbers and
sums of them commute: in whatever order starts and ends arrive, the policies end up with the same state, bit for bit.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

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

    def to_wire(self) -> dict[str, Any]:
        """Return a JSON-serialisable form, for logs."""
        codes = self.codes
        return {
            "codes": None if codes is None else base64.b64encode(codes.tobytes()).decode("ascii"),
            "context_tokens": self.context_tokens,
            "known": self.known,
            "computes_prompt": self.computes_prompt,
            "uncached_tokens": self.uncached_tokens,
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Share:
        """Build a share from its wire form. Raises KeyError, TypeError or ValueError if it is not valid."""
        encoded = wire["codes"]
        try:
            codes = None if encoded is None else np.frombuffer(base64.b64decode(encoded, validate=True), np.uint8)
        except binascii.Error as error:
            raise ValueError(str(error)) from None
        tokens, uncached = wire["context_tokens"], wire["uncached_tokens"]
        if type(tokens) is not int or type(uncached) is not int:
            raise TypeError(f"{tokens!r} and {uncached!r} are not numbers of tokens")
        return cls(codes, tokens, bool(wire["known"]), bool(wire["computes_prompt"]), uncached)
