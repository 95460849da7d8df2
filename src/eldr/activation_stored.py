"""An activation model in a file: within a calibration, or with what a router has learned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.activation import ActivationModel
from eldr.fileio import ArraySpec, NpzError

ARRAYS = ("mean_frequency", "mean_profile", "slope", "down", "up")
NUMBERS = ("strength", "r2", "spread", "trust", "gain")
PREFIX = "activation_"
SPECS: Mapping[str, ArraySpec] = {
    f"{PREFIX}{name}": ArraySpec(("f4",), 2 if name in ("down", "up") else 1, optional=True) for name in ARRAYS
}


def stored(model: ActivationModel) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of a model, and what its `meta` says of it."""
    numbers = {name: getattr(model, name) for name in NUMBERS}
    # JSON has no infinity: the spread that 0.1.0 did not write stays out.
    meta = {name: value for name, value in numbers.items() if math.isfinite(value)}
    return {PREFIX + name: getattr(model, name) for name in ARRAYS}, meta


def check_shapes(shapes: Mapping[str, tuple[int, ...]], layers: int, experts: int) -> None:
    """Raise NpzError unless the arrays of a model fit this geometry and each other. There may be none of them."""
    found = {name: shapes[name] for name in SPECS if name in shapes}
    if not found:
        return
    if len(found) < len(SPECS):
        raise NpzError("the predictor is incomplete")
    dimension, rank = layers * experts, found["activation_down"][0]
    for name, shape in found.items():
        expected = (rank, dimension) if len(shape) == 2 else (dimension,)
        if shape != expected:
            raise NpzError(f"array {name} has shape {shape}, expected {expected}")


def read_stored(arrays: Mapping[str, NDArray[Any]], meta: object, layers: int, top_k: int) -> ActivationModel | None:
    """The model in a file of this geometry. None if there is none. Raises NpzError if it is not valid.

    arrays: those of the file, after `check_shapes`. meta: what `stored` returned with them.
    """
    there = [name for name in SPECS if name in arrays]
    if meta is None and not there:
        return None
    if meta is None or not there:
        raise NpzError("the predictor is incomplete")
    if not (isinstance(meta, dict) and all(_is_finite(meta.get(name)) for name in ("strength", "r2"))):
        raise NpzError("meta: the predictor's strength or r2 is missing")
    for name, most in (("spread", math.inf), ("trust", 1.0), ("gain", 2.0)):
        value = meta.get(name, 0.0)  # 0.1.0 wrote none of them
        if not (_is_finite(value) and 0 <= value <= most):
            raise NpzError(f"meta: the predictor's {name} is {value!r}")
    for name in there:
        if not np.isfinite(arrays[name]).all():
            raise NpzError(f"array {name} holds NaN or infinity")
    fitted: dict[str, Any] = {name: arrays[PREFIX + name] for name in ARRAYS}
    numbers = {name: meta[name] for name in NUMBERS if name in meta}
    return ActivationModel(**fitted, **numbers, layers=layers, top_k=top_k)


def _is_finite(value: object) -> bool:
    return type(value) is float and math.isfinite(value)
