"""The inner loops of expert counts and expected-union: in C where the installation could compile them, else in numpy.

A request's 6,144 probabilities (48 x 128) pass through some thirty numpy calls, each a walk over memory and an
allocation; in C they take a fourth of the time. Both give the same integers; floats agree to a few units in the last
place. Every array is C-contiguous. `COMPILED` says which are in use.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.uint32]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

try:
    import eldr._kernels as _kernels
except ImportError:
    _kernels = None  # type: ignore[assignment]

COMPILED = _kernels is not None


def unpack_counts(
    data: bytes, low_bits: int, high_bits: int, layers: int, experts: int, total: int, most: int, out: Counts
) -> int:
    """The numbers that `counts.pack` made `data` of, into `out`, uint32 [L, E].

    1 if every layer sums to `total` and no number exceeds `most`, 0 if not, -1 for data of another length than such
    numbers take.
    """
    size = layers * experts
    stream = np.frombuffer(data, dtype=np.uint8)
    low_bytes, mark_bytes = -(-size * low_bits // 8), -(-size // 8) if high_bits else 0
    marked = np.unpackbits(stream[low_bytes : low_bytes + mark_bytes], bitorder="little")
    marks = int(marked.sum())
    if len(data) != low_bytes + mark_bytes + -(-marks * high_bits // 8):
        return -1
    numbers = _of_bits(stream[:low_bytes], low_bits, size)
    if high_bits:
        where = np.flatnonzero(marked[:size])
        numbers[where] |= _of_bits(stream[low_bytes + mark_bytes :], high_bits, len(where)) << np.uint64(low_bits)
    out[:] = numbers.reshape(layers, experts)
    return int((out.sum(axis=1, dtype=np.uint64) == total).all() and int(out.max()) <= most)


def _of_bits(stream: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint64]:
    """uint64 [count]: whole numbers of so many bits each, lowest bit first."""
    each = np.unpackbits(stream, bitorder="little")[: count * bits].reshape(count, bits)
    return each @ (np.uint64(1) << np.arange(bits, dtype=np.uint64))


def own_frequencies(counts: Counts, mean: Floats, prior: float, scale: float, out: Floats) -> None:
    """(counts + prior * mean) * scale into `out`; all [D]. counts: below 2^31."""
    out[:] = counts.reshape(-1)
    out += np.float32(prior) * mean
    out *= np.float32(scale)


def scale_to_probabilities(scores: Floats, layers: int, least: float, most: float, target: float) -> None:
    """Clip `scores` [layers * E] to least..most, scale every layer to the sum `target`, clip again; in place."""
    rows = scores.reshape(layers, -1)
    np.clip(rows, np.float32(least), np.float32(most), out=rows)
    rows *= np.float32(target) / rows.sum(axis=-1, keepdims=True)
    np.clip(rows, np.float32(least), np.float32(most), out=rows)


def encode_profile(profile: Floats, out: NDArray[np.uint8]) -> None:
    """Probabilities 0..1 as codes, p = (code / 255)^2, into `out`; both [D]."""
    out[:] = np.sqrt(profile) * np.float32(255) + np.float32(0.5)


def shift_survival(
    table: NDArray[np.int64],
    codes: NDArray[np.uint8],
    sign: int,
    unit: float,
    log_survival: NDArray[np.int64],
    survival: Floats,
) -> float:
    """Add (sign 1) or subtract (sign -1) table[codes] to `log_survival`, and set `survival` = exp(log_survival * unit).

    table: [256], the others [D]. Returns D - sum(survival).
    """
    log_survival += sign * table[codes]
    np.multiply(log_survival, unit, out=survival, casting="same_kind")
    np.exp(survival, out=survival)
    return len(survival) - float(survival.sum(dtype=np.float64))


def move_towards(own: Floats, target: Floats, share: float) -> None:
    """own += (target - own) * share; both [D]."""
    own += (target - own) * np.float32(share)


def row_products(rows: Floats, vector: Floats, out: NDArray[np.float64]) -> None:
    """Scalar product of each row [W, D] with the vector [D] into `out`, [W].

    As W products of 1 x D and D x 1 numpy calls BLAS for each row alone, which it does not spread over threads: on
    busy cores threads take milliseconds to meet for a product this small.
    """
    out[:] = np.matmul(rows[:, None, :], vector[:, None]).reshape(len(rows))


def placement_cost(
    columns: Doubles,
    union: Doubles,
    added: Doubles,
    context: Doubles,
    similarity: Doubles,
    at_random: Doubles,
    load: Doubles,
    context_tokens: float,
    others_weight: float,
    anchor: float,
    tail_guard: float,
    guard_share: float,
    out: Doubles,
) -> None:
    """What expected-union minimises, into `out`, [W]: seconds per step, infinity behind the tail guard.

    columns: [4, W], a step's base, per expert, per token and per context token, seconds. The others: [W].
    """
    base_s, expert_s, token_s, context_s = columns
    workers = len(load)
    added_s = expert_s * added + token_s + context_s * context_tokens
    longer_s = base_s + expert_s * union + token_s * load + context_s * context + added_s
    expert_time_s = float((expert_s * (union + added)).sum()) / workers
    distance = similarity.max() - similarity
    out[:] = longer_s + others_weight * load * added_s
    out += anchor * (float(load.sum()) / workers + 1) * expert_time_s * distance
    saved_s = max(float((expert_s * (at_random - union - added)).sum()) / workers, 0.0)
    margin_s = tail_guard * (saved_s + guard_share * expert_time_s) + 1e-12
    out[longer_s > float(longer_s.sum()) / workers + margin_s] = np.inf


if _kernels is not None:
    row_products = _kernels.row_products
    placement_cost = _kernels.placement_cost
    unpack_counts = _kernels.unpack_counts
    own_frequencies = _kernels.own_frequencies
    scale_to_probabilities = _kernels.scale_to_probabilities
    encode_profile = _kernels.encode_profile
    shift_survival = _kernels.shift_survival
    move_towards = _kernels.move_towards
