"""Policies of the laboratory alone: they know what no router can know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eldr.activation import ActivationModel
from eldr.counts import ExpertCounts
from eldr.policies.base import Decision, DecodeRequest, Policy
from eldr.policies.expected_union import ExpectedUnion
from eldr.replay.packed import PackedTrace

if TYPE_CHECKING:
    from eldr.replay.engine import Engine


def trace_index(request: DecodeRequest) -> int:
    """Index into the trace, which the engine writes behind the dot of a request's id."""
    return int(request.request_id.rpartition(".")[2])


class TrueProfiles(ExpectedUnion):
    """Expected-union with the request's true decode profile in place of a prediction: the bound of any predictor."""

    name = "expected-union-true"

    def __init__(self, profiles: NDArray[np.float32], predictor: ActivationModel | None = None, **options: Any) -> None:
        """profiles: float32 [N, D]. The predictor gives the geometry and the fleet's first mean, nothing else."""
        super().__init__(predictor, **options)
        self._profiles = profiles

    def predict(
        self, request: DecodeRequest, counts: ExpertCounts, frequency: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        profile: NDArray[np.float32] = self._profiles[trace_index(request)]
        return profile


class Clairvoyant(Policy):
    """Greedy with full knowledge of the future steps of every running request.

    For each worker it computes the distinct experts that the newcomer would add to every step it shares with the
    requests there, from the recorded rows themselves, and sends it where it adds least decode time: the same cost as
    expected-union, with the truth in place of every expectation. It knows nothing of arrivals to come and has no
    anchor, so that it is no upper bound on what routing can gain.
    """

    name = "clairvoyant"

    def __init__(self, trace: PackedTrace) -> None:
        self._trace = trace
        self._engine: Engine | None = None

    def attach(self, engine: Engine) -> None:
        """Let it see the running requests of `engine`."""
        self._engine = engine

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        assert self._engine is not None
        index = trace_index(request)
        costs = [self._placement_s(index, position) for position in range(len(in_flight))]
        return Decision(list(in_flight)[int(np.argmin(costs))], "clairvoyant")

    def _placement_s(self, index: int, position: int) -> float:
        """Seconds that the newcomer and the others together pay for it on one worker, over its whole decode."""
        assert self._engine is not None
        trace = self._trace
        row, end = trace.first_row[index], trace.end_row[index]
        mine = trace.words[row:end]
        union = np.zeros_like(mine)
        running = np.zeros(len(mine))
        worker = self._engine.fleet.workers[position]
        for other_row, other_end in worker.future_rows(self._engine.clock.now_s):
            shared = min(other_end - other_row, len(mine))
            union[:shared] |= trace.words[other_row : other_row + shared]
            running[:shared] += 1
        there = trace.active_experts(union)
        added = trace.active_experts(union | mine) - there
        cost = worker.cost
        step_s = cost.base_s + cost.per_expert_s * there + cost.per_token_s * running
        added_s = cost.per_expert_s * added + cost.per_token_s
        return float((step_s + (1 + running) * added_s).sum())
