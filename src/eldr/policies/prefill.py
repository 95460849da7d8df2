"""Prompts that the workers themselves compute (aggregated serving): what is yet to be computed where, and its price.

The price of a prompt is a time paid once, where a placement's other costs are paid in every step. Divided by the steps
that the request will probably make, the two can be added. A worker computes prompts in chunks, in order of arrival, and
a chunk shares its step with the decodes there, so the price has two parts:

- the newcomer waits for the prompts before it and for its own: as many steps as their chunks need, each as long as a
  decode step there plus the chunk's tokens and experts;
- each of the requests there waits for the newcomer's chunks: their tokens, context and experts.

Cached tokens need not be computed, so a cache hit lowers both.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# The steps that a request makes, as long as none has ended whose length is known.
FIRST_STEPS = 200.0
# Length of the moving average of their number, in requests.
LENGTH_REQUESTS = 500

Doubles = NDArray[np.float64]


class StepTimes(NamedTuple):
    """The coefficients of the step time of each of N workers, in seconds, each float64 [N] (`eldr.cost.StepCost`)."""

    base_s: Doubles
    per_expert_s: Doubles
    per_token_s: Doubles
    per_context_token_s: Doubles


class Backlog:
    """The prompt tokens that each worker has yet to compute.

    tokens: worker -> tokens. A worker without any may be missing.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {}
        self._of: dict[tuple[str, str], int] = {}

    def add(self, request_id: str, worker: str, tokens: int) -> None:
        """The worker has to compute `tokens` of the request's prompt."""
        self._of[request_id, worker] = tokens
        self.tokens[worker] = self.tokens.get(worker, 0) + tokens

    def remove(self, request_id: str, worker: str) -> None:
        """The worker has computed the prompt, or no longer has to. Does nothing if it did before."""
        self.tokens[worker] = self.tokens.get(worker, 0) - self._of.pop((request_id, worker), 0)

    def leave(self, worker: str) -> None:
        """Forget a worker."""
        self.tokens.pop(worker, None)
        self._of = {key: tokens for key, tokens in self._of.items() if key[1] != worker}


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


def chunk_experts(tokens: Doubles, experts: int, top_k: int) -> Doubles:
    """The share of a layer's experts that so many prompt tokens activate, as if each chose uniformly.

    Real tokens prefer some experts and activate fewer. From some 60 tokens on nearly all are activated either way.
    """
    return np.asarray(1 - (1 - top_k / experts) ** tokens)


def prefill_s(
    cost: StepTimes,
    load: Doubles,
    union: Doubles,
    context: Doubles,
    waiting: Doubles,
    uncached: Doubles,
    prompt_tokens: int,
    *,
    shape: tuple[int, int, int],
    ranks: int,
    chunk_tokens: int,
    others_weight: float,
) -> Doubles:
    """Seconds that the newcomer and the requests there pay together for its prompt, on each of N workers.

    cost: the step time of each worker.
    load, union, context: [N], the requests, expected experts per step and tokens of context of each worker.
    waiting, uncached: [N], tokens of other prompts, and of this one, that each worker has to compute.
    prompt_tokens: the length of this prompt.
    shape: layers, experts and top-k.
    ranks: expert-parallel ranks, which share the experts.
    chunk_tokens: the tokens that a worker computes in a step, decodes included.
    others_weight: the weight of the time that the requests there pay.
    """
    layers, experts, top_k = shape
    unused = np.maximum(layers * experts / ranks - union, 0.0)
    room = np.maximum(chunk_tokens - load, 1.0)

    def chunks_s(tokens: Doubles) -> tuple[Doubles, Doubles]:
        """The chunks that so many tokens take, and the time that they add to the steps that they are part of."""
        chunks = np.ceil(tokens / room)
        added = unused * chunk_experts(np.minimum(tokens, room), experts, top_k)
        return chunks, cost.per_token_s * tokens + chunks * cost.per_expert_s * added

    own_chunks, own_s = chunks_s(uncached)
    # Every chunk reads what was computed before it: the cached part and, on average, half of the rest.
    own_context_s = cost.per_context_token_s * (prompt_tokens + (own_chunks - 1) * (prompt_tokens - uncached / 2))
    chunks, until_first_token_s = chunks_s(waiting + uncached)
    decode_s = cost.base_s + cost.per_expert_s * union + cost.per_token_s * load + cost.per_context_token_s * context
    newcomer_s = chunks * decode_s + until_first_token_s + own_context_s
    return np.asarray(newcomer_s + others_weight * load * (own_s + own_context_s))
