"""EPLB: redundant experts and ranks so that every rank computes about as many tokens (deepseek-ai/EPLB, `eplb.py`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eldr.expert_ranks.placement import ExpertPlacement, check_slots


def eplb(load: NDArray[np.float64], ranks: int, redundant: int = 0) -> ExpertPlacement:
    """Place experts as EPLB's global policy does.

    It is what vLLM runs where all ranks are on one node (`DefaultEplbPolicy.rebalance_experts` in
    `distributed/eplb/policy/default.py`).

    load: [L, E], the tokens of every expert.
    redundant: the copies that each layer may have on top of its experts.

    Raises PlacementError as `check_slots` does.
    """
    experts = load.shape[1]
    check_slots(experts, ranks, redundant)
    rows = []
    for of_layer in load.astype(np.float64):
        expert, weight = replicated(of_layer, redundant)
        rows.append(expert[packed(weight, ranks)])
    return ExpertPlacement(experts, ranks, np.array(rows))


def replicated(load: NDArray[np.float64], redundant: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Give each copy to the expert whose copies have most to do.

    load: [E].

    Returns the expert of every slot, int64 [P], and its share of the load, float64 [P].
    """
    experts = list(range(len(load)))
    copies = np.ones(len(load))
    for _ in range(redundant):
        heaviest = int(np.argmax(load / copies))
        experts.append(heaviest)
        copies[heaviest] += 1
    expert = np.array(experts)
    return expert, (load / copies)[expert]


def packed(weight: NDArray[np.float64], ranks: int) -> NDArray[np.int64]:
    """Pack items, the heaviest first, each to the lightest rank that has room.

    weight: [P].

    Returns the item of every slot, int64 [P].
    """
    room = len(weight) // ranks
    of_ranks: list[list[int]] = [[] for _ in range(ranks)]
    total = np.zeros(ranks)
    for item in np.argsort(-weight, kind="stable").tolist():
        rank = int(np.argmin(total))
        of_ranks[rank].append(item)
        total[rank] = np.inf if len(of_ranks[rank]) == room else total[rank] + weight[item]
    return np.array(of_ranks).reshape(-1)
