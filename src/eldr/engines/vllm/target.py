"""Tells the MoE layers of the served model from those of a drafter (speculative decoding).

vLLM keeps the layers of both in one table, in the order in which it makes them, and makes the served model first. A
drafter's layers bear one of two marks: their number is not one of the model's, as in most MTP heads and in EAGLE and
DFlash drafters, or their name begins differently: `draft_model.model.layers.0`, `mtp.layers.0`. vLLM 0.33 itself goes
by both (`_get_head_sharded_draft_regions` in its nixl/base_worker.py, for drafters without MTP heads).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile


def of_target(names: Iterable[str], hidden_layers: int) -> list[str]:
    """Return those of the MoE layers `names` that belong to the served model, in the same order.

    names: full names in the order in which vLLM made the layers. hidden_layers: how many the served model has.
    """
    found: list[str] = []
    root = None
    for name in names:
        start, number = _root_and_number(name)
        root = start if root is None else root
        if start == root and number < hidden_layers:
            found.append(name)
    return found


def _root_and_number(name: str) -> tuple[str, int]:
    """Split `model.layers.3.mlp.experts` into `model.layers` and 3."""
    parts = name.split(".")
    start = list(takewhile(lambda part: not part.isdecimal(), parts))
    if len(start) == len(parts):
        raise ValueError(f"the name of the layer {name!r} has no number")
    return ".".join(start), int(parts[len(start)])
