"""The inner loops of expert counts, expected-union, caches of experts, JSON and prompts.

They are in C if the installation could compile them, otherwise in numpy and Python.

A request's 6,144 probabilities (48 x 128) go through some thirty numpy calls, each of which walks memory and allocates.
C takes a quarter of the time. Both give the same integers; floats agree to a few units in the last place. Every array
is C-contiguous. `COMPILED` tells which kernels are in use. Set ELDR_NO_EXTENSIONS=1 in the environment to use numpy.
The docstrings are in `_numpy`, for JSON in `_json`, and for the words of prompts in `_words`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from eldr.kernels._numpy import from_fractions
from eldr.kernels._types import (
    CERTAIN,
    NO_OBJECT,
    WORD_BUCKETS,
    FleetState,
    JsonMember,
    JsonTextError,
    JsonValue,
    PlacementWeights,
    PrefillTerms,
)

# The compiled kernels carry no type annotations. Their signatures are those of the numpy kernels.
if TYPE_CHECKING or os.environ.get("ELDR_NO_EXTENSIONS"):
    from eldr.kernels import _json as _reader
    from eldr.kernels import _numpy as _chosen
    from eldr.kernels import _words as _counter
else:
    try:
        from eldr.kernels import _compiled as _chosen

        _counter = _reader = _chosen
    except ImportError:
        from eldr.kernels import _json as _reader
        from eldr.kernels import _numpy as _chosen
        from eldr.kernels import _words as _counter

__all__ = [
    "CERTAIN",
    "COMPILED",
    "NO_OBJECT",
    "WORD_BUCKETS",
    "FleetState",
    "JsonMember",
    "JsonNames",
    "JsonObject",
    "JsonTextError",
    "JsonValue",
    "PlacementWeights",
    "PrefillTerms",
    "add_prefill",
    "cache_experts",
    "encode_exposure",
    "encode_signature",
    "from_fractions",
    "json_chat_start",
    "json_elements",
    "json_known_parts",
    "json_start",
    "json_texts",
    "latent_to_scores",
    "move_towards",
    "own_frequencies",
    "placement_cost",
    "row_products",
    "shift_exposure",
    "text_words",
    "to_probabilities",
    "token_words",
    "unit_direction",
    "unpack_counts",
    "words_to_latent",
]

COMPILED = _chosen.__name__.endswith("._compiled")

JsonNames = _reader.JsonNames
JsonObject = _reader.JsonObject
add_prefill = _chosen.add_prefill
cache_experts = _chosen.cache_experts
encode_exposure = _chosen.encode_exposure
encode_signature = _chosen.encode_signature
json_chat_start = _reader.json_chat_start
json_elements = _reader.json_elements
json_known_parts = _reader.json_known_parts
json_start = _reader.json_start
json_texts = _counter.json_texts
latent_to_scores = _counter.latent_to_scores
move_towards = _chosen.move_towards
own_frequencies = _chosen.own_frequencies
placement_cost = _chosen.placement_cost
row_products = _chosen.row_products
shift_exposure = _chosen.shift_exposure
text_words = _counter.text_words
to_probabilities = _chosen.to_probabilities
token_words = _counter.token_words
unit_direction = _chosen.unit_direction
unpack_counts = _chosen.unpack_counts
words_to_latent = _counter.words_to_latent
