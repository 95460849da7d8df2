"""The step time of every worker, which differs where hardware does: as configured, or as learned from its reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eldr.cost import CostModel, StepCost

# A step to compare the speeds of workers at, where nothing is known of their steps.
TYPICAL_LAYERS, TYPICAL_EXPERTS, TYPICAL_BATCH = 32, 24, 8


@dataclass(frozen=True, slots=True)
class LearnedCost:
    """What a worker's reports say of the time of its steps.

    cost: its line, in the unit of the configured ones.
    relative: the time of its step over that of the median worker, at the mean step of the fleet.
    unit: seconds per second of `cost`.
    step_s: the time of its own mean step, in true seconds.
    """

    cost: StepCost
    relative: float
    unit: float = 1.0
    step_s: float = 0.0

    def to_wire(self) -> dict[str, Any]:
        """The form for JSON."""
        return {**dataclasses.asdict(self.cost), "relative": self.relative}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> LearnedCost:
        """Read the form that `to_wire` writes. Raises KeyError, TypeError or ValueError for any other."""
        return cls(
            StepCost(*(float(wire[part.name]) for part in dataclasses.fields(StepCost))), float(wire["relative"])
        )


class WorkerCosts:
    """Step-time models by worker.

    cost, scope: the model of every worker that has none of its own.
    of_workers: models of single workers.
    step_tokens: tokens of each request that a step computes.
    ranks: R, the expert-parallel ranks of a worker. They read at the same time, so an expert counts as 1/R of one.
    """

    def __init__(
        self, cost: CostModel, scope: str, of_workers: Mapping[str, CostModel], step_tokens: float, ranks: int
    ) -> None:
        self._cost = cost
        self._scope = scope
        self._of_workers = dict(of_workers)
        self._step_tokens = step_tokens
        self._ranks = ranks
        self._learned: dict[str, StepCost] = {}

    def step_cost(self, worker: str, layers: int) -> StepCost:
        """The step time of a worker, for a model with this many MoE layers: the learned one, once there is one.

        Raises CostError if the worker's model does not have the scope.
        """
        learned = self._learned.get(worker)
        return self.configured(worker, layers) if learned is None else learned

    def configured(self, worker: str, layers: int) -> StepCost:
        """The step time that the worker was configured with. Raises CostError as `step_cost` does."""
        cost = self._of_workers.get(worker, self._cost).step_cost(layers, self._scope)
        return dataclasses.replace(
            cost, per_expert_s=cost.per_expert_s / self._ranks, per_token_s=cost.per_token_s * self._step_tokens
        )

    def typical_s(self, worker: str) -> float:
        """The time of a typical step as configured. Raises CostError as `step_cost` does."""
        cost = self.configured(worker, TYPICAL_LAYERS)
        return cost.step_s(float(TYPICAL_LAYERS * TYPICAL_EXPERTS), TYPICAL_BATCH, 0.0)

    def learn(self, worker: str, cost: StepCost) -> None:
        """Believe this step time of a worker from now on, until it has left."""
        self._learned[worker] = cost

    def forget(self, worker: str) -> None:
        """The worker has left. Another may come under its name."""
        self._learned.pop(worker, None)
