"""Expected-union routing: send a request to the worker where it adds the least decode time.

The added time follows from the experts that the request will activate. Let p[r] be the probabilities that a decode step
of request r activates each (layer, expert). A worker with the requests R then activates U = sum(1 - q) distinct experts
per step in expectation, where q = prod over R of (1 - p[r]). One more request adds dU = q . p. The step time
T = a + b U + c B + d context grows by dT = b dU + c + d context(r). The newcomer pays T + dT in every step, and each of
the B requests already there pays dT.

Two more terms look beyond the time added now:

- The *self-anchor* rewards sending a request where similar ones went recently. Every worker keeps a moving average of
  the direction in which the expert frequencies of its requests differ from the fleet's mean. A request pays for its
  distance to the nearest direction. In this way workers find their own zones without a fit, and the zones follow the
  traffic.
- The *tail guard* leaves out a worker if its step would become longer than the mean step elsewhere by more than
  locality saves on that mean. Without it locality may fill one worker with its kind of request, and such workers make
  the tail of TPOT. The saving is known: the mean profile tells how many experts random batches would activate.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from eldr import kernels
from eldr.activation import ActivationModel, of_a_step, own_frequencies, to_probabilities
from eldr.cost import DEFAULT_PRESET, PRESETS, CostModel, StepCost
from eldr.counts import ExpertCounts
from eldr.policies.base import Decision, DecodeRequest, Picture, Policy
from eldr.policies.load import least_loaded
from eldr.policies.unions import Geometry, Profile, RandomBatches, Unions, encode_exposure

# Weight of the self-anchor per unit of cosine similarity, relative to the expert time of an average worker's batch.
ANCHOR = 0.1
# How much longer than the mean a step may become, in units of what locality saves on the mean step. GUARD_EXPERT_SHARE
# of the expert time is allowed in addition, because steps differ that much by chance even if nothing can be saved.
TAIL_GUARD = 1.25
GUARD_EXPERT_SHARE = 0.01
# The anchor uses at most this many (layer, expert) entries, from evenly spaced layers. Layers agree on the topic of a
# request, and with a thousand workers the cost is memory bandwidth.
ANCHOR_ENTRIES = 2048
# Length of the moving averages of the fleet's mean frequencies and mean profile, in requests.
MEAN_REQUESTS = 500


class _Arrival:
    """A request to be placed.

    request_id: its id.
    context_tokens: the tokens of its prompt.
    profile: float32 [D], its activation probabilities.
    frequency: float32 [D], its expert frequencies. None if its counts cannot be used.
    direction: float32 [A], the unit vector from the fleet's mean frequencies to its own. None if there is none.
    """

    __slots__ = ("context_tokens", "direction", "frequency", "profile", "request_id")

    def __init__(
        self,
        request_id: str,
        context_tokens: int,
        profile: NDArray[np.float32],
        frequency: NDArray[np.float32] | None,
        direction: NDArray[np.float32] | None,
    ) -> None:
        self.request_id = request_id
        self.context_tokens = context_tokens
        self.profile = profile
        self.frequency = frequency
        self.direction = direction


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
        self._predictor = predictor
        self._cost, self._scope = cost, scope
        self._worker_costs = dict(worker_costs or {})
        self._weights = kernels.PlacementWeights(others_weight, anchor, tail_guard, GUARD_EXPERT_SHARE)
        self._step_tokens, self._ranks = step_tokens, ranks
        self._rng = random.Random(seed)
        self._workers: list[str] = []
        self._row: dict[str, int] = {}
        self._all_rows = np.arange(0)
        self._running: dict[tuple[str, str], Profile] = {}
        self._geometry: tuple[int, int, int] | None = None
        self._latest: _Arrival | None = None
        if predictor is not None:
            experts = len(predictor.mean_profile) // predictor.layers
            if experts % ranks:
                raise ValueError(f"{experts} experts cannot be divided over {ranks} ranks")
            self._set_geometry(predictor.layers, experts, predictor.top_k)
            self._mean_frequency = predictor.mean_frequency.astype(np.float32)
            self._mean_profile = of_a_step(predictor.mean_profile.astype(np.float32), step_tokens)
            self._mean_requests = MEAN_REQUESTS
            self._random.set_mean(self._mean_profile)

    def _set_geometry(self, layers: int, experts: int, top_k: int) -> None:
        self._geometry = (layers, experts, top_k)
        dimension = layers * experts
        self._mean_frequency = np.full(dimension, top_k / experts, dtype=np.float32)
        self._mean_profile = of_a_step(self._mean_frequency.copy(), self._step_tokens)
        self._mean_requests = 0
        self._anchor_every = -(-dimension // ANCHOR_ENTRIES)
        self._anchor_dimension = -(-layers // self._anchor_every) * experts
        divided = Geometry(layers, experts, self._ranks)
        self._unions = Unions(divided, self._anchor_dimension)
        self._random = RandomBatches(divided)
        self._random.set_mean(self._mean_profile)
        for _ in self._workers:
            self._unions.append()
        self._set_fleet(_cost_columns([self._step_cost(worker) for worker in self._workers]))

    def _set_fleet(self, columns: NDArray[np.float64]) -> None:
        """Adjust the state after workers came or went and the arrays of `unions` changed. columns: see `FleetState`."""
        unions = self._unions
        self._fleet = kernels.FleetState(columns, unions.union, unions.context, unions.length)

    def _step_cost(self, worker: str) -> StepCost:
        assert self._geometry is not None
        cost = self._worker_costs.get(worker, self._cost).step_cost(self._geometry[0], self._scope)
        return dataclasses.replace(cost, per_token_s=cost.per_token_s * self._step_tokens)

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        reason = self._unusable(request.counts)
        if self._geometry is None:
            return Decision(least_loaded(in_flight, self._rng), reason or "no_geometry")
        self._latest = arrival = self._look_at(request)
        workers = list(in_flight)
        rows = self._all_rows if workers == self._workers else np.array([self._row[worker] for worker in workers])
        best, _ = self._placement_cost(arrival, rows, list(in_flight.values()))
        return Decision(workers[best], reason or "expected_union")

    def costs(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> dict[str, float] | None:
        """Return the costs that `choose` compares, or None while the geometry is unknown.

        A cost is the seconds of decode time per step that `request` would add on a worker, anchor included. It is
        infinity for a worker that the tail guard rules out.
        """
        self._unusable(request.counts)
        if self._geometry is None:
            return None
        rows = np.array([self._row[worker] for worker in in_flight])
        _, cost = self._placement_cost(self._look_at(request), rows, list(in_flight.values()))
        return dict(zip(in_flight, cost.tolist(), strict=True))

    @property
    def unions(self) -> Unions | None:
        """The experts that each worker's running requests activate together. None while the geometry is unknown."""
        return None if self._geometry is None else self._unions

    def row(self, worker: str) -> int:
        """The worker's row in `unions`."""
        return self._row[worker]

    def _placement_cost(
        self, arrival: _Arrival, rows: NDArray[np.int64], load: list[int]
    ) -> tuple[int, NDArray[np.float64]]:
        """Choose among the workers in `rows`, which have these loads.

        Returns the position of the best worker and float64 [N], the seconds of decode time per step that each placement
        costs, anchor included. Infinity marks workers that the tail guard rules out. It never rules out the worker with
        the shortest step.
        """
        unions = self._unions
        direction = arrival.direction if self._weights.anchor > 0 else None
        cost = np.empty(len(load))
        best = kernels.placement_cost(
            self._fleet,
            self._weights,
            unions.added(arrival.profile),
            np.zeros(unions.count) if direction is None else unions.along(direction),
            self._random.experts(max(load) + 1),
            rows,
            load,
            arrival.context_tokens,
            cost,
        )
        return best, cost

    def _unusable(self, counts: ExpertCounts | None) -> str | None:
        """Return why counts cannot be used, or None if they can. The first usable counts set the geometry."""
        if counts is None:
            return "no_signature"
        geometry = (counts.layers, counts.experts, counts.top_k)
        if self._geometry is None and counts.experts % self._ranks == 0:
            self._set_geometry(*geometry)
        return None if geometry == self._geometry else "wrong_geometry"

    def _look_at(self, request: DecodeRequest) -> _Arrival:
        """Return the request with its profile. If its counts cannot be used, it gets the fleet's mean profile."""
        counts = request.counts
        if counts is None or (counts.layers, counts.experts, counts.top_k) != self._geometry:
            return _Arrival(request.request_id, request.prompt_tokens, self._mean_profile.copy(), None, None)
        frequency = own_frequencies(counts, self._mean_frequency)
        return _Arrival(
            request.request_id,
            request.prompt_tokens,
            self.predict(request, counts, frequency),
            frequency,
            self._direction_of(frequency, counts.layers),
        )

    def predict(
        self, request: DecodeRequest, counts: ExpertCounts, frequency: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Predict the probability that one decode step of `request` activates each expert, float32 [D].

        request: the request.
        counts: its expert counts.
        frequency: float32 [D], its own expert frequencies, mixed with the fleet's mean.
        """
        if self._predictor is not None:
            token = self._predictor.predict(counts)
        else:
            token = to_probabilities(frequency, counts.layers, counts.top_k)
        return of_a_step(token, self._step_tokens)

    def _direction_of(self, frequency: NDArray[np.float32], layers: int) -> NDArray[np.float32] | None:
        direction = np.empty(self._anchor_dimension, dtype=np.float32)
        every = self._anchor_every
        return direction if kernels.unit_direction(frequency, self._mean_frequency, layers, every, direction) else None

    def started(self, request: DecodeRequest, worker: str) -> None:
        self._unusable(request.counts)
        if self._geometry is None:
            return
        arrival = self._latest
        if arrival is None or arrival.request_id != request.request_id:
            arrival = self._look_at(request)
        row = self._row[worker]
        entry = Profile(encode_exposure(arrival.profile), arrival.context_tokens)
        self._running[request.request_id, worker] = entry
        self._unions.add(row, entry, 1)
        if arrival.direction is not None:
            self._unions.turn(row, arrival.direction)
        if arrival.frequency is not None:
            self._move_means(arrival.frequency, arrival.profile)

    def finished(self, request: DecodeRequest, worker: str) -> None:
        entry = self._running.pop((request.request_id, worker), None)
        if entry is not None:
            self._unions.add(self._row[worker], entry, -1)

    def _move_means(self, frequency: NDArray[np.float32], profile: NDArray[np.float32]) -> None:
        self._mean_requests = min(self._mean_requests + 1, MEAN_REQUESTS)
        kernels.move_towards(self._mean_frequency, frequency, 1 / self._mean_requests)
        kernels.move_towards(self._mean_profile, profile, 1 / self._mean_requests)
        self._random.started(self._mean_profile)

    def joined(self, worker: str) -> None:
        self._row[worker] = len(self._workers)
        self._workers.append(worker)
        self._all_rows = np.arange(len(self._workers))
        if self._geometry is not None:
            self._unions.append()
            self._set_fleet(np.append(self._fleet.columns, _cost_columns([self._step_cost(worker)]), axis=1))

    def left(self, worker: str) -> None:
        row = self._row.pop(worker)
        last = self._workers.pop()
        if last != worker:
            self._workers[row] = last
            self._row[last] = row
        self._all_rows = np.arange(len(self._workers))
        self._running = {key: entry for key, entry in self._running.items() if key[1] != worker}
        if self._geometry is not None:
            self._unions.remove(row)
            columns = self._fleet.columns
            columns[:, row] = columns[:, -1]
            self._set_fleet(np.ascontiguousarray(columns[:, :-1]))

    def picture(self) -> Picture | None:
        if self._geometry is None:
            return None
        _, experts, _ = self._geometry
        rows = self._unions.by_layer().tolist()
        return Picture("expected_union", dict(zip(self._workers, rows, strict=True)), experts)


def _cost_columns(costs: list[StepCost]) -> NDArray[np.float64]:
    """The columns of `FleetState`, float64 [4, W]."""
    columns = [(cost.base_s, cost.per_expert_s, cost.per_token_s, cost.per_context_token_s) for cost in costs]
    return np.ascontiguousarray(np.array(columns, dtype=np.float64).reshape(-1, 4).T)
