"""Reads the routing of one step: its distinct experts, and the experts of single tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def distinct_experts(experts: torch.Tensor, per_layer: int, chosen: torch.Tensor | None = None) -> torch.Tensor:
    """Count the distinct experts that the tokens of a step activate in each layer.

    Returns int32 [L] on the same device, without waiting for it.

    experts: integer [T, L, k].
    per_layer: E.
    chosen: bool [T], the tokens that count. None for all.
    """
    layers = experts.shape[1]
    active = torch.zeros((layers, per_layer + 1), dtype=torch.bool, device=experts.device)
    ids = experts.long()
    if chosen is not None:
        ids = torch.where(chosen.view(-1, 1, 1), ids, per_layer)  # the last column is discarded
    active.scatter_(1, ids.transpose(0, 1).reshape(layers, -1), True)
    return active[:, :per_layer].sum(1, dtype=torch.int32)


def tokens_at(slots: torch.Tensor, wanted: Sequence[int]) -> torch.Tensor:
    """Mark the tokens of a step that were written to the `wanted` slots: bool [T] for slots int64 [T]."""
    return _matches(slots, wanted).any(0)


def experts_at(slots: torch.Tensor, experts: torch.Tensor, wanted: Sequence[int]) -> torch.Tensor:
    """Experts [W, L, k] of the tokens written to the W `wanted` slots. -1 where the step wrote no token to a slot."""
    matches = _matches(slots, wanted)
    rows = experts[matches.to(torch.uint8).argmax(1)]
    return torch.where(matches.any(1).view(-1, 1, 1), rows, -1)


def _matches(slots: torch.Tensor, wanted: Sequence[int]) -> torch.Tensor:
    # [W, T]. torch.isin would sort and find unique values, and wait for the device to learn how many there are.
    asked = torch.tensor(wanted, dtype=slots.dtype).to(slots.device, non_blocking=True)
    return slots.view(1, -1) == asked.view(-1, 1)
