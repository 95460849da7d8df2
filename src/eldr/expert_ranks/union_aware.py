"""The placement whose busiest rank is expected to read the fewest experts.

EPLB balances the sum of tokens over a long time. What a step of a small batch waits for is another thing: the most
experts that its tokens activate on one rank. Two experts that the same requests use should therefore be apart, however
many tokens they have. This is known from the steps of past traffic, and from nothing less: co-activation decides.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from eldr.expert_ranks.eplb import packed, replicated
from eldr.expert_ranks.placement import ExpertPlacement, check_slots

# Passes over all slots, at most. The search nearly always ends before.
PASSES = 6


def union_aware(
    active: NDArray[np.uint8],
    ranks: int,
    redundant: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ExpertPlacement:
    """Place experts so that the mean over steps of the most active experts on one rank is small.

    A local search. It begins with EPLB of how often an expert is active, and swaps two experts of different ranks as
    long as one pass finds a swap that is better. Every slot in turn takes the best of its swaps. All layers are
    searched at once, so the time grows with L * E^2 * S. The result is a local minimum.

    Each copy of a replicated expert counts as its share of it, because which copy computes is only known in the step.

    active: [S, L, E], 1 if a step activates an expert, otherwise 0.
    redundant: the copies that each layer may have on top of its experts.
    progress: called now and then with the slots that were looked at, and with the number of all in all passes.

    Raises PlacementError as `check_slots` does.
    """
    steps, layers, experts = active.shape
    check_slots(experts, ranks, redundant)
    rows, shares = [], []
    for layer in range(layers):
        often = active[:, layer].mean(axis=0, dtype=np.float64)
        expert, share = replicated(often, redundant)
        order = packed(share, ranks)
        rows.append(expert[order])
        copies = np.bincount(expert, minlength=experts)
        shares.append(1 / copies[expert[order]])
    expert_of_slot = np.array(rows)
    room = expert_of_slot.shape[1] // ranks
    # What each slot reads in each step. [L, R, slots of a rank, S]: steps last, because every sum runs over them.
    by_layer = np.ascontiguousarray(active.transpose(1, 2, 0))
    reads = np.take_along_axis(by_layer, expert_of_slot[:, :, None], axis=1) * np.array(shares, np.float32)[:, :, None]
    search = _Search(reads.reshape(layers, ranks, room, steps), expert_of_slot.reshape(layers, ranks, room))
    slots = ranks * room
    for done in range(PASSES):
        better = False
        for slot in range(slots):
            better |= search.swap(*divmod(slot, room))
            if progress is not None:
                progress(done * slots + slot + 1, PASSES * slots)
        if not better:
            break
    return ExpertPlacement(experts, ranks, search.expert.reshape(layers, -1))


class _Search:
    """The state of the local search.

    reads: float32 [L, R, K, S], what the K slots of every rank read in every step.
    expert: int64 [L, R, K].
    """

    def __init__(self, reads: NDArray[np.float32], expert: NDArray[np.int64]) -> None:
        self.expert = expert
        self._reads = reads
        self._of_rank = reads.sum(axis=2)  # [L, R, S]

    def swap(self, rank: int, slot: int) -> bool:
        """Swap this slot of each layer with the one where the busiest rank then reads least, if that is less.

        Returns whether any layer has swapped.
        """
        reads, of_rank = self._reads, self._of_rank
        layers, ranks, room, _ = reads.shape
        mine = reads[:, rank, slot]  # [L, S]
        least = of_rank.max(axis=1).sum(axis=1)  # [L]
        best = np.full(layers, -1)
        without = of_rank[:, rank] - mine
        for other in range(ranks):
            if other == rank:
                continue
            rest = [of_rank[:, third] for third in range(ranks) if third not in (rank, other)]
            busiest = np.maximum.reduce(rest)[:, None] if rest else np.float32(0)
            theirs = reads[:, other]  # [L, K, S]
            here = without[:, None] + theirs
            there = (of_rank[:, other] + mine)[:, None] - theirs
            total = np.maximum(np.maximum(here, there), busiest).sum(axis=2)  # [L, K]
            at = total.argmin(axis=1)
            value = total[np.arange(layers), at]
            better = value < least - 1e-3
            least = np.where(better, value, least)
            best = np.where(better, other * room + at, best)
        for layer in np.flatnonzero(best >= 0).tolist():
            other, at = divmod(int(best[layer]), room)
            moved = reads[layer, rank, slot] - reads[layer, other, at]
            of_rank[layer, rank] -= moved
            of_rank[layer, other] += moved
            for array in (reads, self.expert):
                kept = array[layer, rank, slot].copy()
                array[layer, rank, slot] = array[layer, other, at]
                array[layer, other, at] = kept
        return bool((best >= 0).any())
