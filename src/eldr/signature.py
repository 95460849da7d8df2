"""Expert signatures: turn the expert counts of a prompt into a unit vector that predicts the experts of its decode.

This is the method of ELDR (arXiv 2607.00466). Counts are weighted by inverse document frequency (IDF), restricted to
the layers that predict best, and scaled to unit length. rho measures how well signatures predict: it is the rank
correlation between the distance of two requests' signatures and the distance of their decode activation profiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.errors import EldrError

Floats = NDArray[np.floating[Any]]

DEFAULT_TRANSFORM = "count_idf"
PAIRS = 30_000
# Pair products are computed this many pairs at a time, to bound the working memory.
PAIRS_AT_ONCE = 4096


class SignatureError(EldrError):
    """Raised when signatures cannot be fitted or used. The message gives the reason."""


def _as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32)


def _sqrt(values: NDArray[Any]) -> NDArray[np.float32]:
    return np.sqrt(_as_float32(values))


def _binary(values: NDArray[Any]) -> NDArray[np.float32]:
    return (values > 0).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Transform:
    """A way to turn what is known about a prompt into the entries of its signature.

    source: the array that the transform reads: "counts", "prefill_gate_prob" or "prefill_gate_logit".
    entries: the function applied elementwise to the source.
    uses_idf: whether the result is multiplied by the IDF weights.
    """

    source: str
    entries: Callable[[NDArray[Any]], NDArray[np.float32]]
    uses_idf: bool = False


TRANSFORMS: dict[str, Transform] = {
    "count_idf": Transform("counts", _as_float32, uses_idf=True),
    "count": Transform("counts", _as_float32),
    "sqrt_count": Transform("counts", _sqrt),
    "gate_prob": Transform("prefill_gate_prob", _as_float32),
    "gate_logit": Transform("prefill_gate_logit", _as_float32),
    "binary": Transform("counts", _binary),
}


@dataclass(frozen=True, slots=True, eq=False)
class SignatureModel:
    """Turns the expert counts of a prompt into its signature.

    transform_name: a key of TRANSFORMS.
    idf: float32 [L, E], the weight of each expert. All ones if the transform uses no IDF.
    layer_mask: bool [L], the layers that the signature includes.
    rho: the Spearman correlation, -1..1, on the requests that the model was fitted on (in-sample).
    """

    transform_name: str
    idf: NDArray[np.float32]
    layer_mask: NDArray[np.bool_]
    rho: float

    @property
    def dimension(self) -> int:
        """D, the number of entries in a signature: selected layers x experts."""
        return int(self.layer_mask.sum()) * int(self.idf.shape[1])

    @classmethod
    def fit(
        cls,
        source: NDArray[Any],
        decode_profiles: Floats,
        *,
        transform: str = DEFAULT_TRANSFORM,
        seed: int = 0,
        pairs: int = PAIRS,
    ) -> SignatureModel:
        """Fit the IDF weights and the layer mask.

        source: [N, L, E]. uint32 counts, or float32 gate scores summed over the prompt for the gate transforms.
        decode_profiles: [N, L, E], the share of decode steps that activate each expert. A request with an all-zero
            profile (no decode step was recorded) counts towards the IDF but is left out of rho.
        transform: a key of TRANSFORMS.
        seed: the seed that pairs of requests are sampled with.
        pairs: how many pairs are sampled. All pairs are used if there are fewer.
        Raises SignatureError for an unknown transform, for mismatched shapes, or if rho is undefined on this data.
        """
        chosen = TRANSFORMS.get(transform)
        if chosen is None:
            raise SignatureError(f"unknown transform {transform!r}; choose from {', '.join(TRANSFORMS)}")
        if source.ndim != 3 or source.shape != decode_profiles.shape:
            raise SignatureError(
                f"counts {source.shape} and decode profiles {decode_profiles.shape} are not both [N, L, E]"
            )
        if not np.isfinite(source).all():
            raise SignatureError("the counts or gate scores hold NaN or infinity")
        layers, experts = source.shape[1:]
        idf = _idf(source) if chosen.uses_idf else np.ones((layers, experts), dtype=np.float32)
        recorded = decode_profiles.any(axis=(1, 2))
        entries = chosen.entries(source[recorded]) * idf
        first, second = sample_pairs(len(entries), pairs, seed)
        target = _profile_distance(decode_profiles[recorded], first, second)
        mask, rho = _select_layers(entries, target, first, second)
        return cls(transform, idf, mask, rho)

    def transform(self, source: NDArray[Any]) -> NDArray[np.float32]:
        """Compute signatures, float32 [..., D], from source [..., L, E].

        Each signature is a unit vector, or all zero if no entry is left after weighting.
        """
        entries = TRANSFORMS[self.transform_name].entries(source[..., self.layer_mask, :])
        entries = entries * self.idf[self.layer_mask]
        flat = entries.reshape(*entries.shape[:-2], -1)
        norm = np.linalg.norm(flat, axis=-1, keepdims=True)
        return _as_float32(flat / np.where(norm > 0, norm, 1))


def rho(signatures: Floats, decode_profiles: Floats, *, seed: int = 0, pairs: int = PAIRS) -> float:
    """Spearman correlation between the distances of signatures and the distances of decode profiles.

    Both are cosine distances over the same seeded sample of request pairs. Ties get average ranks.

    signatures: [N, D].
    decode_profiles: [N, L, E].
    seed: the seed that pairs are sampled with.
    pairs: how many pairs are sampled. All pairs are used if there are fewer.
    Raises SignatureError for fewer than three requests, or if all distances are equal.
    """
    first, second = sample_pairs(len(signatures), pairs, seed)
    target = _centred_ranks(_profile_distance(decode_profiles, first, second))
    entries = signatures[:, None, :]
    dots = _pair_dots(entries, first, second)[0]
    squares = _squares(entries)[0]
    value = _inner(_centred_ranks(_distance(dots, squares[first], squares[second])), target)
    if np.isnan(value):
        raise SignatureError("rho is not defined: all signatures, or all decode profiles, are equally far apart")
    return value


def sample_pairs(requests: int, pairs: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sample distinct pairs of requests, i < j, as two arrays: int64 [P] and int64 [P].

    requests: the number of requests. Indices run from 0 to requests - 1.
    pairs: how many pairs to sample. All pairs are returned if there are fewer.
    seed: the same seed gives the same pairs.
    Raises SignatureError if there are fewer than three pairs.
    """
    total = requests * (requests - 1) // 2
    if total < 3:
        raise SignatureError(f"{requests} requests with decode steps are too few to compare pairs")
    if total <= pairs:
        flat = np.arange(total)
    else:
        flat = np.random.default_rng(seed).choice(total, pairs, replace=False, shuffle=False)
    row = np.arange(requests, dtype=np.int64)
    row_start = row * (2 * requests - row - 1) // 2  # pairs are numbered row by row of the upper triangle
    first = np.searchsorted(row_start[:-1], flat, side="right") - 1
    return first, flat - row_start[first] + first + 1


def _idf(counts: NDArray[Any]) -> NDArray[np.float32]:
    """IDF weights, float32 [L, E]: ln((N + 1) / (df + 1)), where df is the number of requests that used the expert."""
    used_by = (counts > 0).sum(axis=0)
    return _as_float32(np.log((len(counts) + 1) / (used_by + 1)))


def _pair_dots(entries: Floats, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
    """Scalar product of each pair in each layer, float64 [L, P], from entries [N, L, E]."""
    dots = np.empty((entries.shape[1], len(first)))
    for start in range(0, len(first), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        dots[:, part] = np.einsum("ple,ple->lp", entries[first[part]], entries[second[part]])
    return dots


def _squares(entries: Floats) -> NDArray[np.float64]:
    """Squared length of each request in each layer, float64 [L, N]."""
    return np.asarray(np.einsum("nle,nle->ln", entries, entries), dtype=np.float64)


def _distance(
    dots: NDArray[np.float64], first: NDArray[np.float64], second: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Cosine distance from scalar products and squared lengths. It is 1 if either vector is zero."""
    scale = np.sqrt(first * second)
    cosine: NDArray[np.float64] = np.divide(dots, scale, out=np.zeros_like(dots), where=scale > 0)
    return 1 - cosine


def _profile_distance(profiles: Floats, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
    dots = _pair_dots(profiles, first, second).sum(axis=0)
    squares = _squares(profiles).sum(axis=0)
    return _distance(dots, squares[first], squares[second])


def _select_layers(
    entries: NDArray[np.float32],
    target_distance: NDArray[np.float64],
    first: NDArray[np.int64],
    second: NDArray[np.int64],
) -> tuple[NDArray[np.bool_], float]:
    """Select layers greedily: add the layer that raises rho most until none does. Returns (mask [L], rho).

    The distance over any subset of layers follows from sums of per-layer scalar products and squared lengths. A
    candidate layer therefore costs one addition and one sort of P values, whatever E is.
    """
    target = _centred_ranks(target_distance)
    dots = _pair_dots(entries, first, second)
    squares = _squares(entries)
    layers = len(dots)
    mask = np.zeros(layers, dtype=bool)
    best = -np.inf
    subset_dots = np.zeros(dots.shape[1])
    subset_squares = np.zeros(squares.shape[1])
    while not mask.all():
        reached = np.full(layers, -np.inf)
        for candidate in np.flatnonzero(~mask):
            square = subset_squares + squares[candidate]
            distance = _distance(subset_dots + dots[candidate], square[first], square[second])
            reached[candidate] = np.nan_to_num(_inner(_centred_ranks(distance), target), nan=-np.inf)
        layer = int(reached.argmax())
        if reached[layer] <= best:
            break
        best = float(reached[layer])
        mask[layer] = True
        subset_dots += dots[layer]
        subset_squares += squares[layer]
    if not mask.any():
        raise SignatureError(
            "rho is not defined: all signatures, or all decode profiles, are equally far apart. With count_idf this "
            "happens when every request uses every expert; try the transform count"
        )
    return mask, best


def _centred_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks minus their mean, scaled to unit length. Ties share their mean rank. NaN if all values are equal.

    Layer selection spends most of its time here. An unstable sort is several times faster than the stable one of
    scipy.stats.rankdata. Ties are averaged, so their order does not matter.
    """
    order = np.argsort(values)
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1], [True])))
    mean_rank = (starts[:-1] + starts[1:] - values.size) / 2
    ranks = np.empty(values.size)
    ranks[order] = np.repeat(mean_rank, np.diff(starts))
    length = np.sqrt(_inner(ranks, ranks))
    return ranks / length if length > 0 else np.full(values.size, np.nan)


def _inner(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Scalar product without BLAS, whose threads take milliseconds to synchronise when the cores are busy."""
    return float(np.einsum("p,p->", first, second))
