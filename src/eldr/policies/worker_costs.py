"""The step time of every worker, which differs where hardware does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from eldr.cost import CostModel, StepCost


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

    def step_cost(self, worker: str, layers: int) -> StepCost:
        """The step time of a worker, for a model with this many MoE layers.

        Raises CostError if the worker's model does not have the scope.
        """
        cost = self._of_workers.get(worker, self._cost).step_cost(layers, self._scope)
        return dataclasses.replace(
            cost, per_expert_s=cost.per_expert_s / self._ranks, per_token_s=cost.per_token_s * self._step_tokens
        )
