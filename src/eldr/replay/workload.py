"""The workload of a replay: when requests arrive, and which request of the trace each arrival is.

Everything here depends only on the seed, so policies compared under one seed see the same arrivals and the same draw.
The only exception is a draw that would put a request in flight twice, which is swapped with a later one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from eldr.replay.errors import ReplayError
from eldr.replay.prompts import Prompt, Prompts


@dataclass(frozen=True, slots=True)
class ServedKind:
    """A kind of requests and its share of the arrivals.

    labels: the labels of the kind in the trace.
    share: relative to the shares of the other kinds.
    """

    name: str
    labels: tuple[str, ...]
    share: float


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """The arrivals of one run.

    arrival_s: float64 [n], ascending. None for a closed loop, where so many requests are in flight as long as there
        are more, and the next arrives when one ends.
    request: int64 [n], the index into the trace wanted for each arrival.
    measured: the arrivals that are measured. Those before warm the fleet up, those after keep it loaded.
    max_tokens: the limit that every request states. None for none.
    with_counts: whether the policy sees expert counts.
    fleet_changes: arrival -> workers that join before it (positive), or that start to drain there (negative).
    slowdowns: arrival -> worker -> how many times as long as at first its steps take from then on.
    aggregated: whether the worker that is chosen for a request also computes its prompt.
    prompts: the lengths and shared blocks of the prompts. None for the lengths of the trace.
    router: int64 [n], the number of the router that each arrival goes to. None for a single router.
    in_flight: the requests in flight of a closed loop.
    """

    arrival_s: NDArray[np.float64] | None
    request: NDArray[np.int64]
    measured: range
    max_tokens: int | None = None
    with_counts: bool = True
    fleet_changes: Mapping[int, int] = field(default_factory=dict)
    slowdowns: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    aggregated: bool = False
    prompts: Prompts | None = None
    router: NDArray[np.int64] | None = None
    in_flight: int = 0

    def prompt(self, arrival: int, trace_tokens: int) -> Prompt:
        """The prompt of an arrival. trace_tokens: its length in the trace."""
        return Prompt(trace_tokens) if self.prompts is None else self.prompts.of(arrival, trace_tokens)


def poisson_arrivals(rate_per_s: float, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Arrival times of a Poisson process, float64 [count]."""
    return np.cumsum(rng.exponential(1 / rate_per_s, count))


def traced_arrivals(recorded_s: NDArray[np.float64], rate_per_s: float, count: int) -> NDArray[np.float64]:
    """Arrival times with the recorded gaps, stretched to the mean rate and repeated as needed, float64 [count]."""
    gaps = np.diff(np.sort(recorded_s))
    if not len(gaps) or gaps.sum() <= 0:
        raise ReplayError("the recorded arrival times are all the same; use Poisson arrivals")
    gaps = gaps / gaps.mean() / rate_per_s
    return np.cumsum(np.tile(gaps, -(-count // len(gaps)))[:count])


def draw_order(
    pool: NDArray[np.int64], count: int, expected_in_flight: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw from `pool` at random, int64 [count], such that a request has most likely ended before it is drawn again.

    A request is drawn again only after 1.25 times as many other arrivals as are expected in flight. Conflicts with a
    request still running are then rare, and policies see the same draw.
    """
    rest = int(min(1.25 * expected_in_flight + 2, len(pool) - 1))
    shuffled = rng.permutation(pool).tolist()
    ready, resting = shuffled, deque[int]()
    picks = rng.random(count)
    order = np.empty(count, dtype=np.int64)
    for position in range(count):
        at = int(picks[position] * len(ready))
        ready[at], ready[-1] = ready[-1], ready[at]
        chosen = ready.pop()
        order[position] = chosen
        resting.append(chosen)
        if len(resting) > rest:
            ready.append(resting.popleft())
    return order


def mixed_draw_order(
    pools: Sequence[tuple[NDArray[np.int64], float]], count: int, expected_in_flight: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw from several pools at random, int64 [count], from each as often as its share says."""
    shares = np.array([share for _, share in pools])
    shares /= shares.sum()
    kind = rng.choice(len(pools), count, p=shares)
    order = np.empty(count, dtype=np.int64)
    for number, (pool, _) in enumerate(pools):
        at = np.flatnonzero(kind == number)
        order[at] = draw_order(pool, len(at), expected_in_flight * shares[number], rng)
    return order


class Draws:
    """Hands out the workload's draws, but never a request that is still in flight."""

    def __init__(self, workload: Workload) -> None:
        self._order: list[int] = workload.request.tolist()
        self._running: set[int] = set()
        self._requests = len(set(self._order))

    def draw(self, arrival: int) -> int:
        """Return the request of this arrival. If it is still running, return the next one in the order that is not.

        Raises ReplayError if all are in flight.
        """
        order = self._order
        at = arrival
        while at < len(order) and order[at] in self._running:
            at += 1
        if at == len(order):
            free = set(order) - self._running
            if not free:
                raise ReplayError(
                    f"the load needs more than the {self._requests} requests that the trace has to serve at once; "
                    "lower the rate, the batch or the number of workers, or record a longer trace"
                )
            order[arrival] = min(free)
        else:
            order[arrival], order[at] = order[at], order[arrival]
        self._running.add(order[arrival])
        return order[arrival]

    def release(self, request: int) -> None:
        """Note that `request` has ended."""
        self._running.remove(request)
