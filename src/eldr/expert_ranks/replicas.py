"""Which copy of a replicated expert computes, and the experts that the busiest rank of a step then reads.

Without copies all three rules are the same, and `FewestActive` is the fastest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from eldr.expert_ranks.placement import ExpertPlacement, PlacementError

Floats = NDArray[np.float64]
# `FewestActive` looks at sets of ranks, of which there may be 2 to the power of their number.
MOST_RANKS = 10
# Rounds of balancing of `BalancedTokens`. More change the busiest rank by less than a per cent of its tokens.
ROUNDS = 8


class ReplicaChoice(ABC):
    """Says what steps wait for, given where the experts are. Every active expert of a step is computed somewhere."""

    of_tokens: ClassVar[bool]
    """Whether it needs the tokens of each expert, and not only whether there are any."""

    @abstractmethod
    def reads(self, tokens: NDArray[np.uint8]) -> Floats:
        """Experts that the busiest rank reads, summed over layers, float64 [S].

        tokens: [S, L, E], the tokens of every expert in each step.
        """

    @abstractmethod
    def expected(self, active: Floats) -> Floats:
        """The same where experts are not known for certain, float64 [S].

        active: [S, L, E], the probability that a step activates an expert. Where a rule needs tokens, their number is
            taken to have the Poisson distribution with this probability of not being 0.
        """


class FewestActive(ReplicaChoice):
    """Every active expert is computed on one rank, so that the busiest one reads as few as possible.

    This is the objective of METRO (arXiv 2512.09277), which reaches it nearly, by a greedy rule on the device. Here it
    is exact. By Hall's theorem m experts on every rank suffice if and only if no set T of ranks has more than m |T|
    active experts that are nowhere else. The answer is thus the largest ceil(experts only in T / |T|). Only sets that
    replicated experts connect matter: in any other, one part has as many experts per rank as the whole, or more.

    Raises PlacementError for copies on more than MOST_RANKS ranks.
    """

    of_tokens = False

    def __init__(self, placement: ExpertPlacement) -> None:
        held = placement.slots_on_rank() > 0  # [L, E, R]
        ranks = placement.ranks
        self._replicated = bool((held.sum(axis=2) > 1).any())
        if self._replicated and ranks > MOST_RANKS:
            raise PlacementError(
                f"replicas by fewest active experts are computed for at most {MOST_RANKS} ranks, not {ranks}"
            )
        of_layers = [_connected(layer) for layer in held]
        # Layers with fewer sets have the first one several times. [L, M, R].
        members = np.repeat(np.eye(1, ranks, dtype=np.bool_)[None], len(held), axis=0)
        members = np.repeat(members, max(map(len, of_layers)), axis=1)
        for layer, sets in enumerate(of_layers):
            members[layer, : len(sets)] = [[bool(one >> rank & 1) for rank in range(ranks)] for one in sets]
        self._size = members.sum(axis=2, dtype=np.float32)[:, None]
        # Whether an expert is held by no rank outside a set: [L, E, M].
        outside = held.astype(np.float32) @ (~members).astype(np.float32).transpose(0, 2, 1)
        self._only_in = (outside == 0).astype(np.float32)

    def reads(self, tokens: NDArray[np.uint8]) -> Floats:
        per_rank = self._per_rank((tokens > 0).astype(np.float32))
        if self._replicated:
            per_rank = np.ceil(per_rank - np.float32(1e-4))
        return _summed(per_rank)

    def expected(self, active: Floats) -> Floats:
        return _summed(self._per_rank(active.astype(np.float32)))

    def _per_rank(self, active: NDArray[np.float32]) -> NDArray[np.float32]:
        """Experts only in each set, per rank of the set, float32 [L, S, M]."""
        return np.asarray(active.transpose(1, 0, 2) @ self._only_in / self._size)


def _connected(held: NDArray[np.bool_]) -> list[int]:
    """Every rank alone, and every set of ranks that replicated experts connect, as bits. held: [E, R]."""
    ranks = held.shape[1]
    of_experts = {int(bits) for bits in held @ (1 << np.arange(ranks))}
    several = [bits for bits in of_experts if bits.bit_count() > 1]
    found = [1 << rank for rank in range(ranks)]
    known = set(found)
    for one in found:  # which grows
        for bits in several:
            more = one | bits
            if one & bits and more not in known:
                known.add(more)
                found.append(more)
    return found


class _Copies:
    """The replicated experts of each layer, K of them at most, with C copies at most. Layers with fewer have dummies.

    alone: float32 [L, E, R], 1 where a rank has the only slot of an expert.
    expert: int64 [L, K].
    copies: int64 [L, K]. 0 for a dummy.
    rank: int64 [L, K, C], where each copy is. 0 for a copy that does not exist.
    on_rank: float32 [L, K, C, R], 1 where a copy is.
    exists: bool [L, K, C].
    """

    def __init__(self, placement: ExpertPlacement) -> None:
        copies = placement.copies()
        several = copies > 1
        layers, ranks = placement.layers, placement.ranks
        most, deepest = int(several.sum(axis=1).max()), int(copies.max())
        self.alone = (placement.slots_on_rank() * ~several[:, :, None]).astype(np.float32)
        self.expert = np.zeros((layers, most), dtype=np.int64)
        self.copies = np.zeros((layers, most), dtype=np.int64)
        self.rank = np.zeros((layers, most, deepest), dtype=np.int64)
        self.on_rank = np.zeros((layers, most, deepest, ranks), dtype=np.float32)
        self.exists = np.zeros((layers, most, deepest), dtype=np.bool_)
        for layer in range(layers):
            for at, expert in enumerate(np.flatnonzero(several[layer]).tolist()):
                where = placement.rank_of_slot[placement.expert_of_slot[layer] == expert]
                self.expert[layer, at], self.copies[layer, at] = expert, len(where)
                self.rank[layer, at, : len(where)] = where
                self.on_rank[layer, at, np.arange(len(where)), where] = 1
                self.exists[layer, at, : len(where)] = True

    def of_replicated(self, tokens: NDArray[np.generic]) -> NDArray[np.float32]:
        """[L, S, E] -> float32 [L, S, K], 0 for dummies."""
        taken = np.take_along_axis(tokens, self.expert[:, None, :], axis=2)
        return np.asarray(taken * (self.copies > 0)[:, None, :], dtype=np.float32)

    def pairs(self) -> NDArray[np.int64]:
        """Two copies of one expert on different ranks, in every layer at once, int64 [pairs, 3, L].

        The three are the expert's place among the replicated ones, and the two copies. Layers with fewer pairs have
        pairs of a copy with itself.
        """
        of_layers = [
            [
                (expert, one, two)
                for expert, count in enumerate(counts)
                for two in range(count)
                for one in range(two)
                if self.rank[layer, expert, one] != self.rank[layer, expert, two]
            ]
            for layer, counts in enumerate(self.copies.tolist())
        ]
        found = np.zeros((max(map(len, of_layers)), 3, len(of_layers)), dtype=np.int64)
        for layer, pairs in enumerate(of_layers):
            found[: len(pairs), :, layer] = np.array(pairs).reshape(-1, 3)
        return found

    def busiest(self, active: NDArray[np.float32], of_copies: NDArray[np.float32]) -> Floats:
        """Sum over layers of the most active copies on one rank, float64 [S].

        active: [L, S, E], whether experts are active, or how probable it is.
        of_copies: [L, S, K, C], the same for the copies of the replicated ones.
        """
        layers, steps = of_copies.shape[:2]
        several = of_copies.reshape(layers, steps, -1) @ self.on_rank.reshape(layers, -1, self.on_rank.shape[-1])
        return _summed(active @ self.alone + several)


class RandomReplica(ReplicaChoice):
    """Every token takes one of the copies at random. A copy is read if it gets a token.

    vLLM 0.32 takes a hash of the token's place in the batch (`_eplb_map_and_record_i32_kernel` in
    `fused_moe/router/base_router.py`), which is as good as random.
    """

    of_tokens = True

    def __init__(self, placement: ExpertPlacement, seed: int) -> None:
        self._copies = _Copies(placement)
        self._rng = np.random.default_rng(seed)

    def reads(self, tokens: NDArray[np.uint8]) -> Floats:
        by_layer = tokens.transpose(1, 0, 2)
        left = self._copies.of_replicated(by_layer).astype(np.int64)
        copies = self._copies.copies[:, None, :]
        active = np.zeros((*left.shape, self._copies.rank.shape[2]), dtype=np.float32)
        for copy in range(active.shape[3]):
            # What is left goes to the copies that are left, each alike.
            drawn = self._rng.binomial(left, 1 / np.maximum(copies - copy, 1))
            active[..., copy] = drawn > 0
            left -= drawn
        return self._copies.busiest((by_layer > 0).astype(np.float32), active)

    def expected(self, active: Floats) -> Floats:
        by_layer = active.transpose(1, 0, 2).astype(np.float32)
        copies = np.maximum(self._copies.copies, 1)[:, None, :]
        each = 1 - (1 - self._copies.of_replicated(by_layer)) ** (1 / copies)
        exists = self._copies.exists[:, None]
        return self._copies.busiest(by_layer, (each[..., None] * exists).astype(np.float32))


class BalancedTokens(ReplicaChoice):
    """The tokens of an expert are divided over its copies so that no rank has more tokens than it must.

    This is the linear programme of LPLB (deepseek-ai/LPLB), which solves it in each layer of each step. Here all steps
    are solved at once, by balancing the ranks of two copies of one expert after the other, in ROUNDS rounds. That
    converges to the division with the least sum of squares, which also has the least maximum. Tokens are then divided
    by these shares and rounded in their order, as LPLB does.
    """

    of_tokens = True

    def __init__(self, placement: ExpertPlacement) -> None:
        self._copies = _Copies(placement)
        self._pairs = self._copies.pairs()

    def reads(self, tokens: NDArray[np.uint8]) -> Floats:
        by_layer = tokens.transpose(1, 0, 2).astype(np.float32)
        upto = np.floor(np.cumsum(self.divided(by_layer), axis=3) + np.float32(0.5))
        whole = np.diff(upto, axis=3, prepend=np.float32(0))
        return self._copies.busiest((by_layer > 0).astype(np.float32), (whole > 0).astype(np.float32))

    def expected(self, active: Floats) -> Floats:
        by_layer = active.transpose(1, 0, 2)
        tokens = -np.log1p(-np.minimum(by_layer, 1 - 1e-6))
        each = 1 - np.exp(-self.divided(tokens.astype(np.float32)))
        return self._copies.busiest(by_layer.astype(np.float32), each)

    def divided(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """The tokens of each copy, float32 [L, S, K, C], given those of the experts, float32 [L, S, E]."""
        copies = self._copies
        share = copies.exists / np.maximum(copies.copies, 1)[:, :, None]
        # One row of steps for each copy, and for each rank: [L, K, C, S] and [L, R, S].
        replicated = copies.of_replicated(tokens).transpose(0, 2, 1)
        divided = (replicated[:, :, None] * share[..., None]).astype(np.float32)
        ranks = copies.on_rank.shape[3]
        of_several = copies.on_rank.reshape(len(tokens), -1, ranks).transpose(0, 2, 1)
        load = copies.alone.transpose(0, 2, 1) @ tokens.transpose(0, 2, 1)
        load += of_several @ divided.reshape(len(tokens), -1, divided.shape[3])
        layer = np.arange(len(tokens))
        for _ in range(ROUNDS):
            for expert, one, two in self._pairs:
                rank_one, rank_two = copies.rank[layer, expert, one], copies.rank[layer, expert, two]
                of_one, of_two = divided[layer, expert, one], divided[layer, expert, two]
                moved = (load[layer, rank_one] - load[layer, rank_two]) / 2
                moved = np.minimum(np.maximum(moved, -of_two), of_one)
                divided[layer, expert, one] -= moved
                divided[layer, expert, two] += moved
                load[layer, rank_one] -= moved
                load[layer, rank_two] += moved
        return divided.transpose(0, 3, 1, 2)


def _summed(of_ranks: NDArray[np.float32]) -> Floats:
    """Sum over layers of the maximum over ranks, [L, S, R] -> float64 [S]."""
    return np.asarray(of_ranks.max(axis=2).sum(axis=0, dtype=np.float64))
