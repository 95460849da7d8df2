"""The cost of a placement: the workers' unions, directions and step times, and the kernel that weighs them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eldr import kernels
from eldr.cost import StepCost
from eldr.policies.anchor import Anchor
from eldr.policies.heavy_times import HeavyTimes
from eldr.policies.means import FleetMeans
from eldr.policies.request_model import Arrival
from eldr.policies.residents import HostShare, Residents
from eldr.policies.shares import Share
from eldr.policies.unions import Geometry, RandomBatches, Unions, decode_exposure, encode_exposure

# What was learned from reports of finished requests may be wrong. If the reports lie, steps that are said to cost
# nothing would fill one worker. So one more request is taken to add at least this share of what it would add if all
# experts were as likely. If no count of its own bears out what was learned, no worker gets it that runs more than
# CROWDED times the mean. True profiles stay within both limits.
LEAST_ADDED = 0.25
CROWDED = 1.5


class Placement:
    """The workers of a fleet that serves one model, one row per worker, and the cost of one more request on each.

    shape: the layers, experts and top-k of the model's counts.
    unions: the experts that each worker's requests activate.
    anchor: the directions of each worker's requests.
    means: the means over the fleet's requests.
    chunk_tokens: the tokens of a step of a worker that computes prompts.
    host: how much of each layer the workers' devices hold. None if all.
    """

    def __init__(
        self,
        geometry: Geometry,
        top_k: int,
        weights: kernels.PlacementWeights,
        means: FleetMeans,
        chunk_tokens: int,
        host: HostShare | None = None,
    ) -> None:
        self.shape = (geometry.layers, geometry.experts, top_k)
        self.unions = Unions(geometry)
        self.anchor = Anchor(geometry)
        self.means = means
        self._weights = weights
        self._uniform = RandomBatches(geometry)
        self._residents = None if host is None else Residents(geometry, host)
        self._chunk_tokens = chunk_tokens
        self._set_experts(means.in_use)
        self._heavy = HeavyTimes()
        self._set_columns(np.zeros((4, 0)))

    def _set_experts(self, in_use: NDArray[np.bool_]) -> None:
        """Take these experts, bool [L, E], for those that tokens can choose."""
        self._in_use = in_use
        layers, _, top_k = self.shape
        experts = np.maximum(in_use.sum(axis=1, keepdims=True), top_k)
        self._uniform.set_mean((in_use * (top_k / experts)).reshape(-1).astype(np.float32))
        self._least = np.zeros(0)
        total = float(experts.sum())
        all_reads = total if self._residents is None else self._residents.all_reads
        self._prefill = kernels.PrefillTerms(
            all_reads, 1 - layers * top_k / total, self._chunk_tokens, self._weights.others
        )

    def _set_columns(self, columns: NDArray[np.float64]) -> None:
        """Adjust the kernel's state after workers came or went. columns: see `FleetState`."""
        unions = self.unions
        reads = unions.union if self._residents is None else self._residents.reads
        self._fleet = kernels.FleetState(columns, reads, unions.context, self.anchor.length)

    def append_worker(self, cost: StepCost) -> None:
        """Add a row for one more worker with this step time."""
        self.unions.append()
        self.anchor.append()
        if self._residents is not None:
            self._residents.append()
        self._set_columns(np.append(self._fleet.columns, _column(cost)[:, None], axis=1))

    def set_cost(self, row: int, cost: StepCost) -> None:
        """Let the steps of a worker take this time from now on."""
        self._fleet.columns[:, row] = _column(cost)

    def reads_per_expert(self, row: int) -> float:
        """What a step of a worker waits for, for each of its distinct experts. 1 if its device holds all."""
        experts = float(self.unions.union[row])
        return 1.0 if self._residents is None or experts <= 0 else float(self._residents.reads[row]) / experts

    def remove_worker(self, row: int) -> None:
        """Remove a worker's row. The last row takes its place."""
        self.unions.remove(row)
        self.anchor.remove(row)
        if self._residents is not None:
            self._residents.remove(row)
        columns = self._fleet.columns
        columns[:, row] = columns[:, -1]
        self._set_columns(np.ascontiguousarray(columns[:, :-1]))

    def costs(self, arrival: Arrival, rows: NDArray[np.int64], load: list[int]) -> tuple[int, NDArray[np.float64]]:
        """Choose among the workers in `rows`, and note the guard's limit in the arrival.

        rows: int64 [N], rows of the eligible workers.
        load: their N requests in flight.

        Returns the position of the best worker and float64 [N], the seconds of decode time per step that each placement
        costs, anchor included. Infinity marks workers that the tail guard rules out, which is never the one with the
        shortest step, and crowded ones (CROWDED).
        """
        residents = self._residents
        added = self.unions.added(arrival.profile) if residents is None else residents.added(arrival.profile)
        if not arrival.learned:
            return self._weighed(arrival, added, rows, load)
        most = max(load)
        added[rows] = np.maximum(added[rows], self._least_added(most)[load])
        limit = CROWDED * sum(load) / len(load)
        if most <= limit or arrival.frequency is not None:
            return self._weighed(arrival, added, rows, load)
        free = [at for at, running in enumerate(load) if running <= limit]
        costs = np.full(len(load), np.inf)
        best, costs[free] = self._weighed(arrival, added, rows[free], [load[at] for at in free])
        return free[best], costs

    def _least_added(self, most: int) -> NDArray[np.float64]:
        """The experts that one more request adds at least to batches of 0, 1, 2, ... requests, [at least most + 1]."""
        if most >= len(self._least):
            self._least = LEAST_ADDED * np.diff(self._uniform.experts(2 * most + 2))
        return self._least

    def _at_random(self, most: int) -> NDArray[np.float64]:
        """Reads of random batches of 0, 1, 2, ... requests, [at least most + 1], at what an expert costs on average."""
        experts = self.means.at_random.experts(most)
        if self._residents is None:
            return experts
        running = float(self.unions.union.sum())
        return experts * (float(self._residents.reads.sum()) / running) if running > 0 else experts

    def _weighed(
        self, arrival: Arrival, added: NDArray[np.float64], rows: NDArray[np.int64], load: list[int]
    ) -> tuple[int, NDArray[np.float64]]:
        """`costs`, given the experts that the request adds on each worker, float64 [W]."""
        unions = self.unions
        direction = arrival.direction if self._weights.anchor > 0 else None
        costs = np.empty(len(load))
        best, arrival.limit_s = kernels.placement_cost(
            self._fleet,
            self._weights,
            added,
            np.zeros(unions.count) if direction is None else self.anchor.along(direction),
            self._at_random(max(load) + 1),
            rows,
            load,
            arrival.context_tokens,
            self._heavy.limit_s,
            costs,
        )
        return best, costs

    def add_prefill(
        self,
        costs: NDArray[np.float64],
        prompt_tokens: int,
        rows: NDArray[np.int64],
        load: list[int],
        waiting: list[int],
        uncached: list[int],
        scale: float,
    ) -> int:
        """Add to `costs` what the workers in `rows` and their requests pay for a prompt, times `scale`.

        waiting, uncached: the tokens of other prompts, and of this one, that each of them has to compute.
        The other parameters are those of `costs`. Returns the position of the best worker.
        """
        return kernels.add_prefill(
            self._fleet, self._prefill, rows, load, waiting, uncached, prompt_tokens, scale, costs
        )

    def start(self, row: int, arrival: Arrival) -> NDArray[np.uint8]:
        """Add a request to a worker and learn from it. Returns the codes of its profile, uint8 [D], for its share."""
        codes = encode_exposure(arrival.profile)
        self.unions.add(row, codes, arrival.context_tokens, 1)
        self._changed(row)
        if arrival.direction is not None:
            self.anchor.turn(row, arrival.direction)
        if arrival.known:
            self.means.move(arrival.frequency, arrival.profile)
            if self.means.in_use is not self._in_use:
                self._set_experts(self.means.in_use)
        if arrival.limit_s is not None:
            self._heavy.add(arrival.limit_s)
        return codes

    def add(self, row: int, share: Share) -> None:
        """Add a running request to a worker, and learn from its profile. Ignores a share of another model."""
        codes = self._codes(share)
        if codes is None:
            return
        self.unions.add(row, codes, share.context_tokens, 1)
        self._changed(row)
        if share.known:
            profile = decode_exposure(codes)
            direction = self.anchor.direction(profile, self.means.profile)
            if direction is not None:
                self.anchor.turn(row, direction)
            self.means.move(None, profile)

    def remove(self, row: int, share: Share) -> None:
        """Remove a request from its worker. Ignores a share that `add` ignored."""
        codes = self._codes(share)
        if codes is not None:
            self.unions.add(row, codes, share.context_tokens, -1)
            self._changed(row)

    def _changed(self, row: int) -> None:
        """Other requests run on a worker now."""
        if self._residents is not None:
            self._residents.changed(row, self.unions.survival[row], self.means.profile)

    def _codes(self, share: Share) -> NDArray[np.uint8] | None:
        """The codes of a request's profile. None if it has none, or one of another model."""
        codes = share.codes
        return codes if codes is not None and len(codes) == len(self.means.profile) else None


def _column(cost: StepCost) -> NDArray[np.float64]:
    """A worker's step time as a column of `FleetState`, float64 [4]."""
    return np.array([cost.base_s, cost.per_expert_s, cost.per_token_s, cost.per_context_token_s])
