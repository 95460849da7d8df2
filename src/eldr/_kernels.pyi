# What kernels.py defines, compiled.
from typing import Any

def unpack_counts(
    data: bytes, low_bits: int, high_bits: int, layers: int, experts: int, total: int, most: int, out: Any
) -> int: ...
def own_frequencies(counts: Any, mean: Any, prior: float, scale: float, out: Any) -> None: ...
def scale_to_probabilities(scores: Any, layers: int, least: float, most: float, target: float) -> None: ...
def encode_profile(profile: Any, out: Any) -> None: ...
def shift_exposure(table: Any, codes: Any, sign: int, unit: float, exposure: Any, survival: Any) -> float: ...
def move_towards(own: Any, target: Any, share: float) -> float: ...
def unit_direction(own: Any, mean: Any, layers: int, every: int, out: Any) -> bool: ...
def row_products(rows: Any, vector: Any, out: Any) -> None: ...
def placement_cost(
    columns: Any,
    union: Any,
    added: Any,
    context: Any,
    products: Any,
    length: Any,
    at_random: Any,
    rows: Any,
    load: Any,
    context_tokens: float,
    others_weight: float,
    anchor: float,
    tail_guard: float,
    guard_share: float,
    out: Any,
) -> int: ...
