"""Expected-union routing: the worker on which a request adds least decode time, by the experts it will activate.

With p[r] the probabilities that a decode step of request r activates each (layer, expert), a worker with the requests
R activates in expectation U = sum(1 - q) distinct experts a step, q = prod over R of (1 - p[r]). One more request
adds dU = q . p. The step time T = a + b U + c B + d context then grows by dT = b dU + c + d context(r); the newcomer
pays T + dT in every step, and each of the B requests already there pays dT.

Least added time now is not the whole of it, and two terms look further:

- The *self-anchor* rewards sending a request where similar ones went lately. Every worker keeps a moving average of
  the direction in which the expert frequencies of its requests differ from the fleet's mean, and a request pays for
  its distance to the nearest one. Workers so find their own zones, with no fit, and the zones follow the traffic.
- The *tail guard* leaves out workers whose step would become longer than the mean of what it would become elsewhere,
  by more than locality saves on that mean. Locality may fill a worker with its kind of request; the tail of TPOT is
  made there. What it saves is known: the mean profile says how many experts batches drawn at random would activate.
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

# Weight of the self-anchor, in expert time of a mean worker's whole batch per unit of cosine similarity.
ANCHOR = 0.1
# How much longer than the mean a step may become, in units of what locality saves on the mean step, and on top of it
# this share of expert time: where there is nothing to save, steps differ that much by chance.
TAIL_GUARD = 1.25
GUARD_EXPERT_SHARE = 0.01
# The anchor looks at so many (layer, expert) entries at most, of layers evenly spaced: layers agree on what a request
# is about, and a fleet of a thousand workers is a matter of memory bandwidth.
ANCHOR_ENTRIES = 2048
# Requests that the fleet's mean frequencies and profile remember.
MEAN_REQUESTS = 500


class _Arrival:
    """What is known of a request to be placed. profile: float32 [D], its probabilities. frequency: float32 [D], None
    where its counts cannot be used. direction: float32 [A], unit vector from the fleet's mean frequencies to these;
    None where there is none."""

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
    """Sends each request where it adds the least decode time.

    predictor: fitted activation model; without one the prompt's own expert frequencies are used.
    cost, scope: step-time model of every worker; worker_costs: of single workers, where hardware differs.
    others_weight: weight of what the newcomer adds to the requests already there. 1 is their true share in steady
        state; 0.5 favours the tail of TPOT, 2 its median, little while there is a tail guard.
    anchor: weight of the self-anchor, 0 for none.
    tail_guard: margin of the tail guard, in units of what locality saves. At 1 about no step becomes longer than the
        mean of a fleet routed by load; larger favours the median, smaller the tail; infinity for no guard.
    step_tokens: independent tokens that a step takes a request further, more than 1 with speculative decoding
        (`eldr.activation.of_a_step`). ranks: of expert parallelism in every worker; a step then waits for the rank
        with the most active experts (`eldr.activation.busiest_rank_experts`).

    A request without usable counts goes where the fleet's mean profile adds least. The state is exact: after any
    number of starts and finishes it depends on the running requests alone.
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
        """Workers have come or gone, and the arrays of `unions` with them. columns: as in `FleetState`."""
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
        """What `choose` compares: seconds of decode time per step that `request` would cost on each worker, anchor
        included; infinity behind the tail guard. None while the geometry is unknown."""
        self._unusable(request.counts)
        if self._geometry is None:
            return None
        rows = np.array([self._row[worker] for worker in in_flight])
        _, cost = self._placement_cost(self._look_at(request), rows, list(in_flight.values()))
        return dict(zip(in_flight, cost.tolist(), strict=True))

    @property
    def unions(self) -> Unions | None:
        """What each worker's running requests activate together; None while the geometry is unknown."""
        return None if self._geometry is None else self._unions

    def row(self, worker: str) -> int:
        """The worker's row in `unions`."""
        return self._row[worker]

    def _placement_cost(
        self, arrival: _Arrival, rows: NDArray[np.int64], load: list[int]
    ) -> tuple[int, NDArray[np.float64]]:
        """Of the workers in `rows` with these loads: the best one's place, and float64 [N], seconds of decode time per
        step that the placement costs, anchor included; infinity behind the tail guard, which always lets the least step
        time through."""
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
        """Why counts cannot be used, None if they can. The first usable counts set the geometry."""
        if counts is None:
            return "no_signature"
        geometry = (counts.layers, counts.experts, counts.top_k)
        if self._geometry is None and counts.experts % self._ranks == 0:
            self._set_geometry(*geometry)
        return None if geometry == self._geometry else "wrong_geometry"

    def _look_at(self, request: DecodeRequest) -> _Arrival:
        """The request's profile; the fleet's mean profile where its counts cannot be used."""
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
        """float32 [D]: probability that one decode step of `request` activates each expert.

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
    """float64 [4, W], as in `FleetState`."""
    columns = [(cost.base_s, cost.per_expert_s, cost.per_token_s, cost.per_context_token_s) for cost in costs]
    return np.ascontiguousarray(np.array(columns, dtype=np.float64).reshape(-1, 4).T)
