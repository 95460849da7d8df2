"""The inner loops of expert counts, expected-union and JSON: in C if the installation could compile them, otherwise in
numpy and Python.

A request's 6,144 probabilities (48 x 128) go through some thirty numpy calls, each of which walks memory and allocates.
C takes a quarter of the time. Both give the same integers; floats agree to a few units in the last place. Every array
is C-contiguous. `COMPILED` tells which kernels are in use. Set ELDR_NO_EXTENSIONS=1 in the environment to use numpy.
The docstrings are in `_numpy`, and for JSON in `_json`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from eldr.kernels._numpy import from_fractions
from eldr.kernels._types import CERTAIN, NO_OBJECT, FleetState, JsonMember, JsonTextError, JsonValue, PlacementWeights

# The compiled kernels carry no type annotations. Their signatures are those of the numpy kernels.
if TYPE_CHECKING or os.environ.get("ELDR_NO_EXTENSIONS"):
    from eldr.kernels import _json as _reader
    from eldr.kernels import _numpy as _chosen
else:
    try:
        from eldr.kernels import _compiled as _chosen

        _reader = _chosen
    except ImportError:
        from eldr.kernels import _json as _reader
        from eldr.kernels import _numpy as _chosen

__all__ = [
    "CERTAIN",
    "COMPILED",
    "NO_OBJECT",
    "FleetState",
    "JsonMember",
    "JsonNames",
    "JsonObject",
    "JsonTextError",
    "JsonValue",
    "PlacementWeights",
    "encode_exposure",
    "encode_signature",
    "from_fractions",
    "json_chat_start",
    "json_elements",
    "json_known_parts",
    "json_start",
    "move_towards",
    "own_frequencies",
    "placement_cost",
    "row_products",
    "shift_exposure",
    "to_probabilities",
    "unit_direction",
    "unpack_counts",
]

COMPILED = _chosen.__name__.endswith("._compiled")

JsonNames = _reader.JsonNames
JsonObject = _reader.JsonObject
encode_exposure = _chosen.encode_exposure
encode_signature = _chosen.encode_signature
json_chat_start = _reader.json_chat_start
json_elements = _reader.json_elements
json_known_parts = _reader.json_known_parts
json_start = _reader.json_start
move_towards = _chosen.move_towards
own_frequencies = _chosen.own_frequencies
placement_cost = _chosen.placement_cost
row_products = _chosen.row_products
shift_exposure = _chosen.shift_exposure
to_probabilities = _chosen.to_probabilities
unit_direction = _chosen.unit_direction
unpack_counts = _chosen.unpack_counts
