"""Expert counts per KV-cache block, indexed like the cache (the signature cache of ELDR, arXiv 2607.00466).

A row lives exactly as long as its block's content. It is emptied when the block is taken from the pool, and grows with
every token whose KV is computed into the block. Prefix hits therefore find the counts of their tokens, and eviction
needs no code. A row is trusted only if it has counted exactly as many tokens as the block holds. A KV load or a copy
fills a block without computing it here, which leaves the row short, and the sum reports it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

# So few tokens that a block never comes to hold as many as it should.
_NEVER = -(2**30)


def row_dtype(block_size: int) -> torch.dtype:
    """The smallest dtype for a row. A token picks an expert at most once, so no count exceeds the block size."""
    for dtype in (torch.uint8, torch.int16):
        if block_size <= torch.iinfo(dtype).max:
            return dtype
    return torch.int32


class BlockTable:
    """Counts for `blocks` KV-cache blocks of `block_size` tokens, with L layers of E experts each.

    Every operation is queued on the device without waiting for it.
    """

    def __init__(self, blocks: int, block_size: int, layers: int, experts: int, *, device: torch.device | str) -> None:
        self.block_size = block_size
        self._shape = (layers, experts)
        # One extra row takes the tokens that pad a batch.
        self._rows = torch.zeros((blocks + 1, layers, experts), dtype=row_dtype(block_size), device=device)
        self._tokens = torch.zeros(blocks + 1, dtype=torch.int32, device=device)
        self._loaded = torch.zeros(blocks + 1, dtype=torch.bool, device=device)
        self._first_cell = torch.arange(layers, device=device).view(1, -1, 1) * experts
        self._one = torch.ones(1, dtype=self._rows.dtype, device=device)

    @property
    def nbytes(self) -> int:
        return int(self._rows.nbytes + self._tokens.nbytes + self._loaded.nbytes)

    def take(self, blocks: Sequence[int], *, loaded: bool) -> None:
        """Empty the rows of `blocks`, whose content is about to change. `loaded`: whether a KV load changes it."""
        if not blocks:
            return
        index = torch.tensor(blocks, dtype=torch.int64).to(self._rows.device, non_blocking=True)
        self._rows.index_fill_(0, index, 0)
        self._tokens.index_fill_(0, index, 0)
        self._loaded.index_fill_(0, index, loaded)

    def add(self, slots: torch.Tensor, experts: torch.Tensor) -> None:
        """Count the tokens of one step.

        slots: int64 [T], where each token's KV went: block * block_size + offset. Negative for padding.
        experts: integer [T, L, k], the experts that each token chose.
        """
        block = torch.where(slots < 0, self._rows.shape[0] - 1, slots // self.block_size)
        layers, per_layer = self._shape
        cells = block.view(-1, 1, 1) * (layers * per_layer) + self._first_cell + experts
        cells = cells.reshape(-1)
        self._rows.view(-1).index_add_(0, cells, self._one.expand(cells.numel()))
        self._tokens.index_add_(0, block, torch.ones_like(block, dtype=torch.int32))

    def distrust(self, blocks: Sequence[int]) -> None:
        """Report sums with `blocks` as incomplete until the blocks are taken again."""
        if blocks:
            index = torch.tensor(blocks, dtype=torch.int64).to(self._rows.device, non_blocking=True)
            self._tokens.index_fill_(0, index, _NEVER)

    def sum(self, blocks: Sequence[int], tokens: int) -> torch.Tensor:
        """Sum the counts of the first `tokens` tokens of the sequence in `blocks`, packed for `unpack_sum`.

        Returns int32 [L * E + 2] on the table's device.
        """
        used = -(-tokens // self.block_size)
        holds = torch.full((used,), self.block_size, dtype=torch.int32)
        holds[-1] = tokens - (used - 1) * self.block_size
        device = self._rows.device
        index = torch.tensor(blocks[:used], dtype=torch.int64).to(device, non_blocking=True)
        wrong = (self._tokens[index] != holds.to(device, non_blocking=True)).sum(dtype=torch.int32)
        loaded = self._loaded[index].sum(dtype=torch.int32)
        counts = self._rows[index].sum(0, dtype=torch.int32)
        return torch.cat((counts.view(-1), wrong.view(1), loaded.view(1)))


def unpack_sum(packed: NDArray[np.int32], layers: int, experts: int) -> NDArray[np.uint32] | str:
    """Unpack the output of BlockTable.sum: counts uint32 [L, E], or the snake_case reason why they are not exact."""
    wrong, loaded = packed[-2:]
    if loaded:
        return "kv_load"
    if wrong:
        return "incomplete"
    return packed[:-2].astype(np.uint32).reshape(layers, experts)
