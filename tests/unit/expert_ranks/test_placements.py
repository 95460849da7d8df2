"""Placements: EPLB against vLLM's own results, the union-aware one against all placements of small cases."""

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from eldr.expert_ranks.eplb import eplb
from eldr.expert_ranks.placement import ExpertPlacement, PlacementError, contiguous
from eldr.expert_ranks.union_aware import union_aware

# The example of deepseek-ai/EPLB's README but for a tie (171 was 172), and what
# `DefaultEplbPolicy.rebalance_experts(LOAD, slots, 1, 1, ranks)` of vLLM 0.32 makes of it.
LOAD = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 171, 86, 16, 27]]
OF_VLLM = {
    (12, 4): [
        [10, 3, 7, 5, 8, 6, 1, 11, 2, 4, 0, 9],
        [5, 3, 11, 6, 9, 4, 8, 2, 10, 7, 1, 0],
    ],
    (16, 4): [
        [10, 8, 3, 7, 10, 1, 1, 4, 0, 5, 4, 2, 11, 5, 9, 6],
        [1, 8, 3, 11, 2, 9, 8, 10, 5, 6, 7, 0, 5, 6, 7, 4],
    ],
    (16, 8): [
        [10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1],
        [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 9, 7, 8, 8],
    ],
    (15, 3): [
        [4, 5, 1, 1, 7, 10, 0, 8, 3, 2, 10, 11, 5, 9, 6],
        [7, 6, 8, 11, 4, 1, 5, 9, 8, 10, 2, 5, 6, 3, 0],
    ],
}


def on_ranks(row: list[int], ranks: int) -> list[list[int]]:
    """The experts of every rank, sorted, and the ranks as well: which rank is which does not matter."""
    room = len(row) // ranks
    return sorted(sorted(row[at : at + room]) for at in range(0, len(row), room))


@pytest.mark.parametrize(("slots", "ranks"), OF_VLLM)
def test_eplb_places_as_vllm_does(slots: int, ranks: int) -> None:
    found = eplb(np.array(LOAD, dtype=np.float64), ranks, slots - 12)
    for row, expected in zip(found.expert_of_slot.tolist(), OF_VLLM[slots, ranks], strict=True):
        assert on_ranks(row, ranks) == on_ranks(expected, ranks)


def test_contiguous_experts_and_their_copies() -> None:
    placement = contiguous(2, 6, 4, 2)
    assert placement.expert_of_slot.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]] * 2
    assert placement.rank_of_slot.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert placement.copies().tolist() == [[2, 2, 1, 1, 1, 1]] * 2
    assert placement.slots_on_rank()[0].tolist() == [
        [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0],
    ]  # fmt: skip


def test_experts_that_do_not_fill_the_ranks_are_refused() -> None:
    message = "40 experts and 1 redundant ones cannot be divided over 3 ranks; --redundant 2 would fill them"
    with pytest.raises(PlacementError, match=message):
        eplb(np.ones((2, 40)), 3, 1)
    with pytest.raises(PlacementError, match="40 experts cannot be divided over 3 ranks; --redundant 2"):
        union_aware(np.ones((5, 2, 40), dtype=np.uint8), 3)


def busiest(active: NDArray[np.uint8], ranks: list[set[int]]) -> float:
    """The mean over steps of the most active experts on one rank. active: [S, E]."""
    return float(np.mean([max(sum(int(step[e]) for e in rank) for rank in ranks) for step in active]))


def all_placements(experts: frozenset[int], room: int) -> list[list[set[int]]]:
    if not experts:
        return [[]]
    first = min(experts)
    found = []
    for others in combinations(sorted(experts - {first}), room - 1):
        rank = {first, *others}
        found += [[rank, *rest] for rest in all_placements(experts - rank, room)]
    return found


def correlated(seed: int, experts: int, steps: int = 60) -> NDArray[np.uint8]:
    """Steps of one layer in which groups of experts tend to be active together, uint8 [S, 1, E]."""
    rng = np.random.default_rng(seed)
    themes = rng.random((3, experts)) ** 2
    return (rng.random((steps, experts)) < themes[rng.integers(3, size=steps)]).astype(np.uint8)[:, None]


def ranks_of(placement: ExpertPlacement) -> list[set[int]]:
    rows = placement.expert_of_slot[0].reshape(placement.ranks, -1)
    return [set(row.tolist()) for row in rows]


@pytest.mark.parametrize(("experts", "ranks"), [(8, 2), (9, 3), (8, 4)])
def test_the_union_aware_placement_is_near_the_best_of_all(experts: int, ranks: int) -> None:
    placements = all_placements(frozenset(range(experts)), experts // ranks)
    assert len(placements) == {(8, 2): 35, (9, 3): 280, (8, 4): 105}[experts, ranks]
    ratios = []
    for seed in range(12):
        active = correlated(seed, experts)
        found = busiest(active[:, 0], ranks_of(union_aware(active, ranks)))
        best = min(busiest(active[:, 0], placement) for placement in placements)
        ratios.append(found / best)
    assert min(ratios) >= 1 - 1e-9
    assert np.mean(ratios) < 1.01
    assert max(ratios) < 1.05


def test_no_swap_makes_the_union_aware_placement_better() -> None:
    active = correlated(3, 24, 200)
    ranks = ranks_of(union_aware(active, 4))
    found = busiest(active[:, 0], ranks)
    for one, two in combinations(range(4), 2):
        for e in ranks[one]:
            for f in ranks[two]:
                swapped = [set(rank) for rank in ranks]
                swapped[one] ^= {e, f}
                swapped[two] ^= {e, f}
                assert busiest(active[:, 0], swapped) >= found - 1e-6


def test_experts_that_are_active_together_are_put_apart() -> None:
    """EPLB sees no difference between them: all experts have the same load."""
    pairs = np.eye(4, dtype=np.uint8).repeat(2, axis=1)  # experts 0 and 1 together, 2 and 3, ...
    active = np.tile(pairs, (5, 1))[:, None]
    for rank in ranks_of(union_aware(active, 2)):
        assert {expert // 2 for expert in rank} == {0, 1, 2, 3}


def test_redundant_copies_go_to_the_experts_that_are_active_most() -> None:
    active = (np.random.default_rng(1).random((300, 2, 6)) < [0.9, 0.1, 0.2, 0.8, 0.1, 0.1]).astype(np.uint8)
    placement = union_aware(active, 4, 2)
    assert placement.copies().tolist() == [[2, 1, 1, 2, 1, 1]] * 2
    held = placement.slots_on_rank()
    assert (held[:, [0, 3]].max(axis=2) == 1).all(), "two copies on one rank would be of no use"
