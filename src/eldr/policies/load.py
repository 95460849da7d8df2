"""The load balancers that ELDR is compared with.

Four see the load alone: round-robin, random, power of two choices and shortest queue. The fifth weighs queues by speed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from eldr.policies.base import Decision, DecodeRequest, Policy
from eldr.policies.worker_costs import LearnedCost, WorkerCosts

# How much the time of a step counts against the length of a queue (docs/policies.md#unequal-workers).
SPEED_POWER = 3.0


def least_loaded(in_flight: Mapping[str, int], rng: random.Random) -> str:
    """Return a worker with the fewest requests in flight. Ties are broken at random, so no worker gets them all."""
    fewest = min(in_flight.values())
    return rng.choice([worker for worker, load in in_flight.items() if load == fewest])


class RoundRobin(Policy):
    """Sends requests to workers in turn, in joining order. A worker that cannot take a request loses its turn."""

    name = "rr"

    def __init__(self) -> None:
        self._turn: dict[str, int] = {}
        self._turns_given = 0

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        # The worker whose last turn is longest ago. A new worker is due at once.
        return Decision(min(in_flight, key=lambda worker: self._turn.get(worker, -1)), "rr")

    def started(self, request: DecodeRequest, worker: str) -> None:
        self._turns_given += 1
        self._turn[worker] = self._turns_given

    def left(self, worker: str) -> None:
        self._turn.pop(worker, None)


class Random(Policy):
    """Sends each request to a random eligible worker."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        return Decision(self._rng.choice(list(in_flight)), "random")


class PowerOfTwo(Policy):
    """Sends each request to the less loaded of two workers drawn at random (Mitzenmacher 2001)."""

    name = "p2c"

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        drawn = self._rng.sample(list(in_flight), min(2, len(in_flight)))
        return Decision(min(drawn, key=in_flight.__getitem__), "p2c")


class ShortestQueue(Policy):
    """Sends each request to a worker with the fewest requests in flight."""

    name = "jsq"

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        return Decision(least_loaded(in_flight, self._rng), "jsq")


class FastestQueue(Policy):
    """Sends each request to the worker with the least (requests in flight + 1) x (time of a step)^SPEED_POWER.

    costs: the workers' step times as configured. Learned ones (`cost_learned`) replace them.

    Without either, all workers are as fast, and it is join-shortest-queue.
    """

    name = "jsq-speed"

    def __init__(self, costs: WorkerCosts, seed: int = 0) -> None:
        self._costs = costs
        self._rng = random.Random(seed)
        self._weight: dict[str, float] = {}

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        weight = self._weight
        queues = {worker: (load + 1) * weight[worker] for worker, load in in_flight.items()}
        least = min(queues.values())
        return Decision(self._rng.choice([worker for worker, queue in queues.items() if queue == least]), "jsq_speed")

    @property
    def prices_steps(self) -> bool:
        return True

    def cost_learned(self, worker: str, learned: LearnedCost) -> None:
        self._weight[worker] = learned.relative**SPEED_POWER

    def joined(self, worker: str) -> None:
        self._weight[worker] = (self._costs.typical_s(worker) / self._costs.typical_s("")) ** SPEED_POWER

    def left(self, worker: str) -> None:
        del self._weight[worker]
