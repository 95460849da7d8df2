"""Prompts that the workers themselves compute (aggregated serving): what is yet to be computed where, and its price.

The price of a prompt is a time paid once, where a placement's other costs are paid in every step. Divided by the steps
that the request will probably make, the two can be added. A worker computes prompts in chunks, in order of arrival, and
a chunk shares its step with the decodes there, so the price has two parts:

- the newcomer waits for the prompts before it and for its own: as many steps as their chunks need, each as long as a
  decode step there plus the chunk's tokens and experts;
- each of the requests there waits for the newcomer's chunks: their tokens, context and experts.

Cached tokens need not be computed, so a cache hit lowers both. A chunk activates experts as if each token chose them
evenly. Real tokens prefer some experts and activate fewer, but from some 60 tokens on nearly all are activated either
way. The arithmetic is a kernel (`eldr.kernels.add_prefill`).
"""

from __future__ import annotations

from eldr.policies.shares import Share

# The steps that a request makes, as long as none has ended whose length is known.
FIRST_STEPS = 200.0
# Length of the moving average of their number, in requests.
LENGTH_REQUESTS = 500


class Backlog:
    """The prompt tokens that each worker has yet to compute.

    tokens: worker -> tokens. A worker without any may be missing.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {}
        self._waiting: set[Share] = set()

    def add(self, worker: str, share: Share) -> None:
        """The worker has to compute the prompt of a request."""
        self._waiting.add(share)
        self.tokens[worker] = self.tokens.get(worker, 0) + share.uncached_tokens

    def remove(self, worker: str, share: Share) -> None:
        """The worker has computed the prompt, or no longer has to. Does nothing if it did before."""
        if share in self._waiting:
            self._waiting.remove(share)
            left = self.tokens[worker] - share.uncached_tokens
            if left:
                self.tokens[worker] = left
            else:
                del self.tokens[worker]


class OutputLength:
    """How many decode steps a request will probably make: the mean of those that ended, and at most its limit."""

    def __init__(self) -> None:
        self._steps = FIRST_STEPS
        self._requests = 0

    def ended(self, generated_tokens: int | None) -> None:
        """A request has ended. Its prompt made the first token, so G tokens are G - 1 steps."""
        if generated_tokens is not None and generated_tokens > 1:
            self._requests = min(self._requests + 1, LENGTH_REQUESTS)
            self._steps += (generated_tokens - 1 - self._steps) / self._requests

    def steps(self, max_tokens: int | None) -> float:
        """The expected number of steps of a request with this limit on generated tokens, at least 1."""
        return max(self._steps if max_tokens is None else min(self._steps, max_tokens - 1.0), 1.0)
