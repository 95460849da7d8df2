"""Expert parallelism in a replay: what steps wait for, and how the experts of a worker are placed on its ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr.expert_ranks.eplb import eplb
from eldr.expert_ranks.placement import ExpertPlacement, PlacementError, check_slots, contiguous
from eldr.expert_ranks.replicas import BalancedTokens, FewestActive, RandomReplica, ReplicaChoice
from eldr.expert_ranks.union_aware import union_aware
from eldr.replay.errors import ReplayError
from eldr.replay.packed import PackedTrace
from eldr.replay.reading import Reading, ReadingMaker, unpacked

PLACEMENTS = ("contiguous", "eplb", "union-aware")
TRAFFICS = ("fleet", "worker")
REPLICAS = ("random", "lp", "fewest")
# A worker with a placement of its own moves its experts when vLLM's EPLB does by default: each INTERVAL_STEPS, the
# first time after a quarter of them, by what the last WINDOW_STEPS used (`EPLBConfig` and `EplbState.add_model`).
INTERVAL_STEPS = 3000
WINDOW_STEPS = 1000
# Adjacent steps differ little, so it looks at every so many of them.
EVERY_STEPS = 4
# Steps of random batches that stand for the fleet's traffic.
FLEET_STEPS = 512


@dataclass(frozen=True, slots=True)
class ExpertParallel:
    """How the ranks of a worker share its experts. Their number is `PolicyOptions.expert_parallel`.

    placement: one of PLACEMENTS.
    placement_of: one of TRAFFICS: whether experts are placed once, by the traffic of the calibration requests, or again
        and again by what each worker's steps used lately. A worker begins with the former.
    redundant: redundant copies in each layer.
    replica: one of REPLICAS: how a copy is chosen.
    """

    placement: str = "contiguous"
    placement_of: str = "fleet"
    redundant: int = 0
    replica: str = "random"

    def check(self, experts: int, ranks: int) -> None:
        """Raise ReplayError if a model with so many experts cannot be placed like this."""
        if ranks == 1 and self != ExpertParallel():
            raise ReplayError("a placement, redundant experts and the choice of replica need --expert-parallel")
        if self.placement == "contiguous" and self.placement_of == "worker":
            raise ReplayError("a contiguous placement is the same for all traffic; --placement-of worker needs another")
        try:
            check_slots(experts, ranks, self.redundant)
        except PlacementError as error:
            raise ReplayError(str(error)) from None

    def shown(self, ranks: int) -> str:
        """The layout in words."""
        of = "" if self.placement == "contiguous" else f" by the {self.placement_of}'s traffic"
        copies = f", {self.redundant} redundant experts, replica {self.replica}" if self.redundant else ""
        return f"{ranks} ranks, {self.placement}{of}{copies}"

    def place(self, tokens: NDArray[np.uint8], ranks: int) -> ExpertPlacement:
        """Place experts by past steps. tokens: uint8 [S, L, E], the tokens of every expert in each of them."""
        _, layers, experts = tokens.shape
        if self.placement == "eplb":
            return eplb(tokens.sum(axis=0, dtype=np.float64), ranks, self.redundant)
        if self.placement == "union-aware":
            return union_aware((tokens > 0).astype(np.uint8), ranks, self.redundant)
        return contiguous(layers, experts, ranks, self.redundant)

    def choice(self, placement: ExpertPlacement, seed: int) -> ReplicaChoice:
        """What chooses the copies."""
        if not self.redundant or self.replica == "fewest":
            return FewestActive(placement)
        return RandomReplica(placement, seed) if self.replica == "random" else BalancedTokens(placement)


class Ranks(Reading):
    """A worker whose experts stay where they are. A layer ends with the rank that reads the most experts.

    layers, experts: L and E.
    choice: chooses the copies of replicated experts, and knows where they are.
    """

    def __init__(self, layers: int, experts: int, choice: ReplicaChoice) -> None:
        self._shape = (layers, experts)
        self._choice = choice

    def of_batch(self, active: NDArray[np.uint64]) -> NDArray[np.float64]:
        return self._choice.reads(self._by_layer(active))

    def of_requests(self, active: NDArray[np.uint64], requests: Sequence[NDArray[np.uint64]]) -> NDArray[np.float64]:
        if not self._choice.of_tokens:
            return self.of_batch(active)
        return self._choice.reads(self._tokens(requests))

    def of_expected(self, active: NDArray[np.float64]) -> NDArray[np.float64]:
        return self._choice.expected(active.reshape(len(active), *self._shape))

    def _by_layer(self, active: NDArray[np.uint64]) -> NDArray[np.uint8]:
        layers, experts = self._shape
        return unpacked(active, layers * experts).reshape(len(active), layers, experts)

    def _tokens(self, requests: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint8]:
        """Tokens of every expert, uint8 [S, L, E]. 255 stands for more."""
        tokens = self._by_layer(requests[0])
        for request in requests[1:]:
            tokens += self._by_layer(request) & (tokens < 255)
        return tokens


class OwnRanks(Ranks):
    """A worker that moves its experts now and then, to where its own traffic wants them. Moving takes no time, as if
    it happened beside the steps, as vLLM's asynchronous EPLB does it.

    place: makes the choice of copies for a placement by these tokens, uint8 [S, L, E].
    The other parameters are those of `Ranks`.
    """

    def __init__(
        self, layers: int, experts: int, choice: ReplicaChoice, place: Callable[[NDArray[np.uint8]], ReplicaChoice]
    ) -> None:
        super().__init__(layers, experts, choice)
        self._place = place
        self._requests: Sequence[NDArray[np.uint64]] = ()
        self._seen: deque[NDArray[np.uint8]] = deque(maxlen=WINDOW_STEPS // EVERY_STEPS)
        self._steps = 0
        self._next = INTERVAL_STEPS // 4

    def of_requests(self, active: NDArray[np.uint64], requests: Sequence[NDArray[np.uint64]]) -> NDArray[np.float64]:
        self._requests = requests
        return super().of_requests(active, requests)

    def of_expected(self, active: NDArray[np.float64]) -> NDArray[np.float64]:
        self._requests = ()
        return super().of_expected(active)

    def made(self, active: NDArray[np.uint64]) -> None:
        first = -self._steps % EVERY_STEPS
        self._steps += len(active)
        rows = [request[first : len(active) : EVERY_STEPS] for request in self._requests]
        # With prompts in the steps, the tokens of decodes are known only as experts that they activate.
        self._seen.extend(self._tokens(rows or [active[first::EVERY_STEPS]]))
        if self._steps >= self._next:
            self._next += INTERVAL_STEPS
            self._choice = self._place(np.array(self._seen))


def ranks_of(
    packed: PackedTrace, ranks: int, how: ExpertParallel, calibrate: NDArray[np.int64], batch: float, seed: int
) -> ReadingMaker:
    """Makes the readings of workers with this many ranks.

    calibrate: the requests whose traffic is known before the run.
    batch: the mean batch that the placement is made for.

    Raises ReplayError if there is no such traffic and the placement needs it.
    """
    layers, experts = packed.layers, packed.experts
    if how.placement == "contiguous" or (how.placement_of == "worker" and not len(calibrate)):
        placement = contiguous(layers, experts, ranks, how.redundant)
    elif not len(calibrate):
        raise ReplayError(f"--placement {how.placement} of the fleet needs requests to calibrate on")
    else:
        rng = np.random.default_rng([seed, 5])
        placement = how.place(sampled_tokens(packed, calibrate, max(1, round(batch)), FLEET_STEPS, rng), ranks)

    def make(worker: int) -> Reading:
        draws = (seed << 16) + worker
        choice = how.choice(placement, draws)
        if how.placement_of == "fleet":
            return Ranks(layers, experts, choice)
        return OwnRanks(layers, experts, choice, lambda tokens: how.choice(how.place(tokens, ranks), draws))

    return make


def sampled_tokens(
    packed: PackedTrace, chosen: NDArray[np.int64], batch: int, steps: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Steps of random batches: the tokens of every expert, uint8 [steps, L, E].

    Each step has a random decode row of `batch` different requests, or of all if there are fewer.

    chosen: the requests to draw from. Those without a decode row are left out.

    Raises ReplayError if none has one.
    """
    first, count = np.array(packed.first_row)[chosen], np.array(packed.end_row)[chosen]
    count -= first
    first, count = first[count > 0], count[count > 0]
    if not len(first):
        raise ReplayError("none of the requests to place experts by has a decode step")
    layers, experts = packed.layers, packed.experts
    tokens = np.zeros((steps, layers * experts), dtype=np.uint8)
    for step in tokens:
        which = rng.choice(len(first), min(batch, len(first), 255), replace=False)
        rows = first[which] + rng.integers(count[which])
        step += unpacked(packed.words[rows], layers * experts).sum(axis=0, dtype=np.uint8)
    return tokens.reshape(steps, layers, experts)
