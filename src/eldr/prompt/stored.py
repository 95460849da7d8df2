"""A prompt model in a file: within a calibration, or with what a router has learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.fileio import ArraySpec, NpzError
from eldr.kernels import WORD_BUCKETS
from eldr.prompt.model import ProfileMap, PromptModel, WordTable

OF_WORDS = ("weight", "table", "scale", "offset")
OF_PROFILES = ("mean", "up")
PREFIX = "prompt_"
SPECS: Mapping[str, ArraySpec] = {
    "prompt_weight": ArraySpec(("f4",), 1, optional=True),
    "prompt_table": ArraySpec(("i1",), 2, optional=True),
    "prompt_scale": ArraySpec(("f4",), 1, optional=True),
    "prompt_offset": ArraySpec(("f4",), 1, optional=True),
    "prompt_mean": ArraySpec(("f4",), 1, optional=True),
    "prompt_up": ArraySpec(("f4",), 2, optional=True),
}
NUMBERS = ("strength", "r2")
# Fitted models hold no number that is anywhere near. Sums of larger ones would overflow.
LARGEST = 1e6


def stored(model: PromptModel) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of a model, and what its `meta` says of it."""
    arrays = {PREFIX + name: getattr(model.words, name) for name in OF_WORDS}
    arrays |= {PREFIX + name: getattr(model.profiles, name) for name in OF_PROFILES}
    return arrays, {name: getattr(model, name) for name in (*NUMBERS, "idf", "requests")}


def check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise NpzError unless the arrays of a model fit each other. There may be none of them."""
    found = {name: shapes[name] for name in SPECS if name in shapes}
    if not found:
        return
    if len(found) < len(SPECS):
        raise NpzError("the prompt model is incomplete")
    (rank,), (dimension,) = found["prompt_scale"], found["prompt_mean"]
    expected = ((WORD_BUCKETS,), (WORD_BUCKETS, rank), (rank,), (rank,), (dimension,), (rank, dimension))
    for name, shape in zip(SPECS, expected, strict=True):
        if found[name] != shape:
            raise NpzError(f"array {name} has shape {found[name]}, expected {shape}")


def read_stored(
    arrays: Mapping[str, NDArray[Any]], meta: object, layers: int, experts: int, top_k: int
) -> PromptModel | None:
    """The model in a file of this geometry. None if there is none. Raises NpzError if it is not valid.

    arrays: those of the file, after `check_shapes`. meta: what `stored` returned with them.
    """
    if meta is None and not any(name in arrays for name in SPECS):
        return None
    if not any(name in arrays for name in SPECS) or not isinstance(meta, dict):
        raise NpzError("the prompt model is incomplete")
    if not all(type(meta.get(name)) is float and np.isfinite(meta[name]) for name in NUMBERS):
        raise NpzError(f"meta: the prompt model's {' or '.join(NUMBERS)} is not a number")
    if type(meta.get("idf")) is not bool or type(meta.get("requests")) is not int:
        raise NpzError("meta: the prompt model's idf or requests is missing")
    if len(arrays["prompt_mean"]) != layers * experts:
        raise NpzError(f"the prompt model is of {len(arrays['prompt_mean'])} experts, expected {layers * experts}")
    for name in SPECS:
        if not (np.abs(arrays[name].astype(np.float32)) <= LARGEST).all():
            raise NpzError(f"array {name} holds a number beyond {LARGEST:g}, NaN or infinity")
    if (arrays["prompt_weight"] < 0).any():
        raise NpzError("array prompt_weight holds negative weights")
    words = WordTable(**{name: arrays[PREFIX + name] for name in OF_WORDS})
    profiles = ProfileMap(arrays["prompt_mean"], arrays["prompt_up"], layers, top_k)
    return PromptModel(words, profiles, **{name: meta[name] for name in (*NUMBERS, "idf", "requests")})
