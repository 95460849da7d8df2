"""Prefix affinity: send a request to the worker that has most of its prompt in its prefix cache."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from eldr.policies.base import Decision, DecodeRequest, Policy
from eldr.policies.load import least_loaded

# A worker's cache counts if it has this share of the prompt. Long prompts often share a first block with everybody.
LEAST_CACHED = 0.3
# A worker may have this many times the mean load, the newcomer included.
OVERLOAD = 1.25


def most_cached(request: DecodeRequest, in_flight: Mapping[str, int], rng: random.Random) -> str:
    """Return the worker with most cached tokens of those that are not overloaded, and on a tie the least loaded.

    Less than LEAST_CACHED of the prompt counts as nothing.
    A worker is overloaded if one more request would bring it above OVERLOAD times the mean, rounded up. This is
    consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018), where the caches do the hashing.
    """
    least = LEAST_CACHED * request.prompt_tokens
    cached = {worker: tokens for worker, tokens in (request.cached_tokens or {}).items() if tokens >= least}
    if not cached:
        return least_loaded(in_flight, rng)
    limit = math.ceil(OVERLOAD * (sum(in_flight.values()) + 1) / len(in_flight))
    allowed = [worker for worker, load in in_flight.items() if load < limit]
    most = max(cached.get(worker, 0) for worker in allowed)
    return least_loaded({worker: in_flight[worker] for worker in allowed if cached.get(worker, 0) == most}, rng)


class PrefixAffinity(Policy):
    """Sends each request where most of its prompt is cached, unless that worker is overloaded (`most_cached`).

    It looks at no experts. Where workers do not compute prompts, nothing is cached and it is jsq.
    """

    name = "prefix-affinity"

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        worker = most_cached(request, in_flight, self._rng)
        cached = (request.cached_tokens or {}).get(worker, 0)
        return Decision(worker, "prefix_cached" if cached else "least_loaded")
