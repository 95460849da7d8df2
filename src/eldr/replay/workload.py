"""What arrives when: arrival times, and which request of the trace each arrival is.

Everything here depends on the seed alone, so that policies compared under one seed see the same arrivals and the
same draw. Only a draw that would put a request in flight twice is swapped with a later one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from eldr.replay.errors import ReplayError


@dataclass(frozen=True, slots=True)
class ServedKind:
    """A kind of requests with its share of the arrivals (shares are relative). labels: of the trace."""

    name: str
    labels: tuple[str, ...]
    share: float


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """arrival_s: float64 [n], ascending. request: int64 [n], index into the trace wanted for each arrival.

    measured: arrivals whose requests count; those before warm the fleet up, those after keep it loaded.
    max_tokens: the limit every request states, None for none. with_counts: whether the policy sees expert counts.
    fleet_changes: arrival -> workers that join before it (positive), or that drain from it on (negative).
    """

    arrival_s: NDArray[np.float64]
    request: NDArray[np.int64]
    measured: range
    max_tokens: int | None = None
    with_counts: bool = True
    fleet_changes: Mapping[int, int] = field(default_factory=dict)


def poisson_arrivals(rate_per_s: float, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """float64 [count]: arrival times of a Poisson process."""
    return np.cumsum(rng.exponential(1 / rate_per_s, count))


def traced_arrivals(recorded_s: NDArray[np.float64], rate_per_s: float, count: int) -> NDArray[np.float64]:
    """float64 [count]: the recorded gaps, stretched to the mean rate and repeated as often as needed."""
    gaps = np.diff(np.sort(recorded_s))
    if not len(gaps) or gaps.sum() <= 0:
        raise ReplayError("the recorded arrival times do not differ; use Poisson arrivals")
    gaps = gaps / gaps.mean() / rate_per_s
    return np.cumsum(np.tile(gaps, -(-count // len(gaps)))[:count])


def draw_order(
    pool: NDArray[np.int64], count: int, expected_in_flight: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """int64 [count] of `pool`, at random, each request rested until it has most likely ended.

    A request is drawn again only after 1.25 times as many other arrivals as are expected in flight, so that a
    conflict with one still running is rare and policies see the same draw.
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
    """int64 [count] of several pools, each drawn from as often as its share says, at random."""
    shares = np.array([share for _, share in pools])
    shares /= shares.sum()
    kind = rng.choice(len(pools), count, p=shares)
    order = np.empty(count, dtype=np.int64)
    for number, (pool, _) in enumerate(pools):
        at = np.flatnonzero(kind == number)
        order[at] = draw_order(pool, len(at), expected_in_flight * shares[number], rng)
    return order


class Draws:
    """Hands out the workload's draws, never a request that is still in flight."""

    def __init__(self, workload: Workload) -> None:
        self._order: list[int] = workload.request.tolist()
        self._running: set[int] = set()
        self._requests = len(set(self._order))

    def draw(self, arrival: int) -> int:
        """The request of this arrival; where it still runs, the next one of the order that does not.

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
        """`request` has ended."""
        self._running.remove(request)
