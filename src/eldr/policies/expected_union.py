"""Expected-union routing: send a request to the worker where it adds the least decode time.

The added time follows from the experts that the request will activate. Let p[r] be the probabilities that a decode step
of request r activates each (layer, expert). A worker with the requests R then activates U = sum(1 - q) distinct experts
per step in expectation, where q = prod over R of (1 - p[r]). One more request adds dU = q . p. The step time
T = a + b U + c B + d context grows by dT = b dU + c + d context(r). The newcomer pays T + dT in every step, and each of
the B requests already there pays dT.

Two more terms look beyond the time added now:

- The *self-anchor* rewards sending a request where similar ones went recently. Every worker keeps a moving average of
  the direction in which the profiles of its requests differ from the fleet's mean. A request pays for its distance to
  the nearest direction. In this way workers find their own zones without a fit, and the zones follow the traffic.
- The *tail guard* leaves out a worker if its step would become longer than the mean step elsewhere by more than
  locality saves on that mean. Without it locality may fill one worker with its kind of request, and such workers make
  the tail of TPOT. The saving is known: the mean profile tells how many experts random batches would activate. The tail
  is made at the fleet's busiest times, so at all others a step may be as long as it could be then.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from eldr import kernels
from eldr.activation import ActivationModel, own_frequencies
from eldr.cost import DEFAULT_PRESET, PRESETS, CostModel
from eldr.counts import ExpertCounts
from eldr.policies.base import Decision, DecodeRequest, Picture, Policy
from eldr.policies.load import least_loaded
from eldr.policies.placement import Placement
from eldr.policies.request_model import Arrival, RequestModel
from eldr.policies.rows import WorkerRows
from eldr.policies.unions import Geometry, Profile, Unions
from eldr.policies.worker_costs import WorkerCosts

# Weight of the self-anchor per unit of cosine similarity, relative to the expert time of an average worker's batch.
ANCHOR = 0.1
# How much longer than the mean a step may become, in units of what locality saves on the mean step: at 1, up to the
# mean step of a fleet routed by load alone. GUARD_EXPERT_SHARE of the expert time is allowed in addition, because steps
# differ that much by chance even if nothing can be saved.
TAIL_GUARD = 1.0
GUARD_EXPERT_SHARE = 0.01


class ExpectedUnion(Policy):
    """Sends each request to the worker where it adds the least decode time.

    predictor: a fitted activation model. Without one the prompt's own expert frequencies are used.
    cost, scope: the step-time model of every worker.
    worker_costs: step-time models of single workers, if hardware differs.
    others_weight: the weight of the time added to the requests already there. 1 is their true share in steady state.
        0.5 favours the tail of TPOT, 2 its median. With a tail guard it matters little.
    anchor: the weight of the self-anchor. 0 turns it off.
    tail_guard: the margin of the tail guard, in units of what locality saves. At 1 hardly any step becomes longer than
        the mean of a fleet routed by load. Larger favours the median, smaller the tail. Infinity turns it off.
    step_tokens: the number of independent tokens that a request gains per step. More than 1 with speculative decoding
        (`eldr.activation.of_a_step`).
    ranks: expert-parallel ranks per worker. A step then waits for the rank with the most active experts
        (`eldr.activation.busiest_rank_experts`).
    seed: the seed of random choices.

    A request without usable counts goes where the fleet's mean profile adds least. The state is exact: after any number
    of starts and finishes it depends only on the running requests.
    """

    name = "expected-union"

    def __init__(
        self,
        predictor: ActivationModel | None = None,
        *,
        cost: CostModel = PRESETS[DEFAULT_PRESET],
        scope: str = "step",
        worker_costs: Mapping[str, CostModel] | None = None,
        others_weight: float = 1.0,
        anchor: float = ANCHOR,
        tail_guard: float = TAIL_GUARD,
        step_tokens: float = 1.0,
        ranks: int = 1,
        seed: int = 0,
    ) -> None:
        self._request_model = RequestModel(predictor, step_tokens)
        self._worker_costs = WorkerCosts(cost, scope, worker_costs or {}, step_tokens)
        self._weights = kernels.PlacementWeights(others_weight, anchor, tail_guard, GUARD_EXPERT_SHARE)
        self._ranks = ranks
        self._rng = random.Random(seed)
        self._rows = WorkerRows()
        self._running: dict[tuple[str, str], Profile] = {}
        self._latest: Arrival | None = None
        self._placement: Placement | None = None
        if predictor is not None:
            experts = len(predictor.mean_profile) // predictor.layers
            if experts % ranks:
                raise ValueError(f"{experts} experts cannot be divided over {ranks} ranks")
            self._make_placement(predictor.layers, experts, predictor.top_k)

    def _make_placement(self, layers: int, experts: int, top_k: int) -> Placement:
        geometry = Geometry(layers, experts, self._ranks)
        means = self._request_model.first_means(geometry, top_k)
        self._placement = placement = Placement(geometry, top_k, self._weights, means)
        for worker in self._rows.names:
            placement.append(self._worker_costs.step_cost(worker, layers))
        return placement

    def _placement_for(self, counts: ExpertCounts | None) -> Placement | None:
        """The placement. A predictor or the first usable counts make it; until then it is None."""
        if self._placement is None and counts is not None and counts.experts % self._ranks == 0:
            return self._make_placement(counts.layers, counts.experts, counts.top_k)
        return self._placement

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        placement = self._placement_for(request.counts)
        if placement is None:
            return Decision(least_loaded(in_flight, self._rng), _why_unusable(request.counts))
        self._latest = arrival = self._look_at(request, placement)
        workers = list(in_flight)
        best, _ = placement.costs(arrival, self._rows.rows(workers), list(in_flight.values()))
        reason = "expected_union" if arrival.frequency is not None else _why_unusable(request.counts)
        return Decision(workers[best], reason)

    def costs(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> dict[str, float] | None:
        """Return the costs that `choose` compares, or None while the model is unknown.

        A cost is the seconds of decode time per step that `request` would add on a worker, anchor included. It is
        infinity for a worker that the tail guard rules out.
        """
        placement = self._placement_for(request.counts)
        if placement is None:
            return None
        rows = self._rows.rows(list(in_flight))
        _, costs = placement.costs(self._look_at(request, placement), rows, list(in_flight.values()))
        return dict(zip(in_flight, costs.tolist(), strict=True))

    @property
    def unions(self) -> Unions | None:
        """The experts that each worker's running requests activate together. None while the model is unknown."""
        return None if self._placement is None else self._placement.unions

    def row(self, worker: str) -> int:
        """The worker's row in `unions`."""
        return self._rows.row_of[worker]

    def _look_at(self, request: DecodeRequest, placement: Placement) -> Arrival:
        """Return the request with its profile. If its counts cannot be used, it gets the fleet's mean profile."""
        counts, means = request.counts, placement.means
        if counts is None or (counts.layers, counts.experts, counts.top_k) != placement.shape:
            return Arrival(request.request_id, request.prompt_tokens, means.profile.copy(), None, None)
        frequency = own_frequencies(counts, means.frequency)
        profile = self.predict(request, counts, frequency)
        direction = placement.anchor.direction(profile, means.profile)
        return Arrival(request.request_id, request.prompt_tokens, profile, frequency, direction)

    def predict(
        self, request: DecodeRequest, counts: ExpertCounts, frequency: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Predict the probability that one decode step of `request` activates each expert, float32 [D].

        request: the request.
        counts: its expert counts.
        frequency: float32 [D], its own expert frequencies, mixed with the fleet's mean.
        """
        means = None if self._placement is None else self._placement.means
        return self._request_model.profile(counts, frequency, means)

    def started(self, request: DecodeRequest, worker: str) -> None:
        placement = self._placement_for(request.counts)
        if placement is None:
            return
        arrival = self._latest
        if arrival is None or arrival.request_id != request.request_id:
            arrival = self._look_at(request, placement)
        self._running[request.request_id, worker] = placement.start(self._rows.row_of[worker], arrival)

    def finished(self, request: DecodeRequest, worker: str) -> None:
        profile = self._running.pop((request.request_id, worker), None)
        if profile is not None and self._placement is not None:
            self._placement.finish(self._rows.row_of[worker], profile)

    def joined(self, worker: str) -> None:
        self._rows.append(worker)
        if self._placement is not None:
            self._placement.append(self._worker_costs.step_cost(worker, self._placement.shape[0]))

    def left(self, worker: str) -> None:
        row = self._rows.remove(worker)
        self._running = {key: profile for key, profile in self._running.items() if key[1] != worker}
        if self._placement is not None:
            self._placement.remove(row)

    def picture(self) -> Picture | None:
        if self._placement is None:
            return None
        _, experts, _ = self._placement.shape
        rows = self._placement.unions.by_layer().tolist()
        return Picture("expected_union", dict(zip(self._rows.names, rows, strict=True)), experts)


def _why_unusable(counts: ExpertCounts | None) -> str:
    """The reason to give for a decision without counts that fit the model."""
    return "no_signature" if counts is None else "wrong_geometry"
