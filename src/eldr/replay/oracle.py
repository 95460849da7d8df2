"""Oracle policies for the replay only: they know things that no router can know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eldr.policies.base import Decision, DecodeRequest, ExpectedStep, Policy
from eldr.policies.expected_union import ExpectedUnion
from eldr.policies.learned import Learned
from eldr.policies.shares import Share
from eldr.policies.worker_costs import LearnedCost
from eldr.prompt.model import ProfileMap
from eldr.replay.packed import PackedTrace

if TYPE_CHECKING:
    from eldr.replay.engine import Engine


def trace_index(request: DecodeRequest) -> int:
    """Return the request's index into the trace. The engine writes it after the dot in the request id."""
    return int(request.request_id.rpartition(".")[2])


class ToldProfiles(Policy):
    """Expected-union that is told the profile of every request. With the true ones it bounds any predictor.

    It holds the policy and does not derive from it, since that may be compiled.

    profiles: float32 [N, D], one for each request of the trace.
    layers, top_k: the geometry of the trace.
    options: those of `ExpectedUnion`. `signature` does not matter.
    """

    name = ExpectedUnion.name

    def __init__(self, profiles: NDArray[np.float32], layers: int, top_k: int, **options: Any) -> None:
        self._policy = policy = ExpectedUnion(**options | {"signature": "prompt"})
        # A latent with a single one picks its row from the map.
        mean = profiles.mean(axis=0)
        policy.learned(Learned(ProfileMap(mean, np.ascontiguousarray(profiles - mean), layers, top_k), None))
        self._requests = len(profiles)

    @property
    def prices_steps(self) -> bool:
        return self._policy.prices_steps

    def expected_step(self, worker: str) -> ExpectedStep | None:
        return self._policy.expected_step(worker)

    def cost_learned(self, worker: str, learned: LearnedCost) -> None:
        self._policy.cost_learned(worker, learned)

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        request.words = None
        request.latent = np.zeros(self._requests, dtype=np.float32)
        request.latent[trace_index(request)] = 1
        return self._policy.choose(request, in_flight)

    def started(self, request: DecodeRequest, worker: str) -> None:
        self._policy.started(request, worker)

    def prompt_computed(self, request: DecodeRequest, worker: str) -> None:
        self._policy.prompt_computed(request, worker)

    def finished(self, request: DecodeRequest, worker: str) -> None:
        self._policy.finished(request, worker)

    def joined(self, worker: str) -> None:
        self._policy.joined(worker)

    def left(self, worker: str) -> None:
        self._policy.left(worker)

    def share(self, request: DecodeRequest, worker: str) -> Share | None:
        return self._policy.share(request, worker)

    def elsewhere_started(self, worker: str, share: Share) -> None:
        self._policy.elsewhere_started(worker, share)

    def elsewhere_prompt_computed(self, worker: str, share: Share) -> None:
        self._policy.elsewhere_prompt_computed(worker, share)

    def elsewhere_finished(self, worker: str, share: Share) -> None:
        self._policy.elsewhere_finished(worker, share)


class Clairvoyant(Policy):
    """Greedy placement with full knowledge of the future steps of every running request.

    For each worker it computes, from the recorded rows, the expert reads that the newcomer would add to every step it
    shares with the requests there. It picks the worker with the least added decode time: the same cost as
    expected-union, with the truth instead of expectations. It knows nothing about future arrivals and has no anchor, so
    it is not an upper bound on the gains of routing.
    """

    name = "clairvoyant"

    def __init__(self, trace: PackedTrace) -> None:
        self._trace = trace
        self._engine: Engine | None = None

    def attach(self, engine: Engine) -> None:
        """Give it access to the running requests of `engine`."""
        self._engine = engine

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        assert self._engine is not None
        index = trace_index(request)
        costs = [self._placement_s(index, name) for name in in_flight]
        return Decision(list(in_flight)[int(np.argmin(costs))], "clairvoyant")

    def _placement_s(self, index: int, name: str) -> float:
        """Seconds that the newcomer and the others pay together on one worker, over the newcomer's whole decode."""
        assert self._engine is not None
        trace = self._trace
        row, end = trace.first_row[index], trace.end_row[index]
        mine = trace.words[row:end]
        union = np.zeros_like(mine)
        running = np.zeros(len(mine))
        worker = self._engine.fleet.by_name[name]
        for other_row, other_end in worker.future_rows(self._engine.clock.now_s):
            shared = min(other_end - other_row, len(mine))
            union[:shared] |= trace.words[other_row : other_row + shared]
            running[:shared] += 1
        there = worker.reading.of_batch(union)
        added = worker.reading.of_batch(union | mine) - there
        cost = worker.cost
        step_s = cost.base_s + cost.per_expert_s * there + cost.per_token_s * running
        added_s = cost.per_expert_s * added + cost.per_token_s
        return float((step_s + (1 + running) * added_s).sum())
