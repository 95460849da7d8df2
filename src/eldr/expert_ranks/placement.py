"""Where the experts of a worker are: every rank has the same number of slots, and every slot holds one expert."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr.errors import EldrError


class PlacementError(EldrError):
    """Raised when experts cannot be placed as asked. The message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPlacement:
    """The experts of every slot, layer by layer. An expert with several slots has redundant copies.

    experts: E, the experts of a layer.
    ranks: R. Rank r holds the slots r * P / R up to (r + 1) * P / R.
    expert_of_slot: int64 [L, P]. Every expert has a slot. vLLM (`distributed/eplb/eplb_state.py`) and SGLang
        (`srt/eplb/expert_location.py`) call it the map from physical to logical experts.
    """

    experts: int
    ranks: int
    expert_of_slot: NDArray[np.int64]

    @property
    def layers(self) -> int:
        return len(self.expert_of_slot)

    @property
    def rank_of_slot(self) -> NDArray[np.int64]:
        """int64 [P]."""
        slots = self.expert_of_slot.shape[1]
        return np.asarray(np.arange(slots) // (slots // self.ranks))

    def copies(self) -> NDArray[np.int64]:
        """The slots of every expert, int64 [L, E]."""
        counts = [np.bincount(row, minlength=self.experts) for row in self.expert_of_slot]
        return np.array(counts, dtype=np.int64)

    def slots_on_rank(self) -> NDArray[np.int64]:
        """The slots that every rank has for every expert, int64 [L, E, R]."""
        found = np.zeros((self.layers, self.experts, self.ranks), dtype=np.int64)
        np.add.at(found, (np.arange(self.layers)[:, None], self.expert_of_slot, self.rank_of_slot[None, :]), 1)
        return found


def contiguous(layers: int, experts: int, ranks: int, redundant: int = 0) -> ExpertPlacement:
    """The experts in their order, then copies of the first ones. vLLM and SGLang begin with it.

    See `build_initial_global_physical_to_logical_map` in vLLM and `ExpertLocationMetadata.init_trivial` in SGLang.

    Raises PlacementError as `check_slots` does.
    """
    check_slots(experts, ranks, redundant)
    row = np.arange(experts + redundant) % experts
    return ExpertPlacement(experts, ranks, np.tile(row, (layers, 1)))


def check_slots(experts: int, ranks: int, redundant: int) -> None:
    """Raise PlacementError unless the experts and their redundant copies fill all ranks alike."""
    if (experts + redundant) % ranks:
        copies = f" and {redundant} redundant ones" if redundant else ""
        raise PlacementError(
            f"{experts} experts{copies} cannot be divided over {ranks} ranks; --redundant "
            f"{redundant + -(experts + redundant) % ranks} would fill them"
        )
