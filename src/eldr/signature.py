"""Expert signatures: expert counts of a prompt as a unit vector that predicts the experts of its decode.

Method of ELDR (arXiv 2607.00466): counts, weighted by inverse document frequency, over the layers that predict
best, scaled to unit length. rho is how well signatures predict: the rank correlation between the distance of two
requests' signatures and the distance of their decode activation profiles.
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
# Gathered rows held at once while pair products are computed: bounds the working memory.
PAIRS_AT_ONCE = 4096


class SignatureError(EldrError):
    """Signatures that cannot be fitted or used; says why."""


def _as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32)


def _sqrt(values: NDArray[Any]) -> NDArray[np.float32]:
    return np.sqrt(_as_float32(values))


def _binary(values: NDArray[Any]) -> NDArray[np.float32]:
    return (values > 0).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Transform:
    """One way from what is known of a prompt to signature entries.

    source: "counts", or the gate scores it needs instead: "prefill_gate_prob" or "prefill_gate_logit".
    entries: applied elementwise to the source. uses_idf: whether the IDF weight multiplies the result.
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
    idf: float32 [L, E], weight of each expert; ones where the transform uses none.
    layer_mask: bool [L], the layers that are part of the signature.
    rho: Spearman correlation reached on the requests it was fitted on (in-sample), -1..1.
    """

    transform_name: str
    idf: NDArray[np.float32]
    layer_mask: NDArray[np.bool_]
    rho: float

    @property
    def dimension(self) -> int:
        """D, entries of a signature: selected layers x experts."""
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
        """Fit IDF and layer mask.

        source: [N, L, E], counts uint32 or, for the gate transforms, summed gate scores float32.
        decode_profiles: [N, L, E], share of decode steps that activate each expert; requests whose profile is all
            zero (no decode step was recorded) count for the IDF and are left out of rho.
        seed: of the sampled pairs. pairs: how many are sampled; all are used where there are fewer.
        Raises SignatureError for an unknown transform, bad shapes, or data in which rho is not defined.
        """
        chosen = TRANSFORMS.get(transform)
        if chosen is None:
            raise SignatureError(f"unknown transform {transform!r}; there are {', '.join(TRANSFORMS)}")
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
        """Signatures float32 [..., D] of source [..., L, E]: unit vectors, or zero where nothing is left to weigh."""
        entries = TRANSFORMS[self.transform_name].entries(source[..., self.layer_mask, :])
        entries = entries * self.idf[self.layer_mask]
        flat = entries.reshape(*entries.shape[:-2], -1)
        norm = np.linalg.norm(flat, axis=-1, keepdims=True)
        return _as_float32(flat / np.where(norm > 0, norm, 1))


def rho(signatures: Floats, decode_profiles: Floats, *, seed: int = 0, pairs: int = PAIRS) -> float:
    """Spearman correlation, over seeded pairs of requests, of signature distance and decode-profile distance.

    signatures: [N, D]; decode_profiles: [N, L, E]. Both distances are cosine distances; ties get average ranks.
    Raises SignatureError for fewer than three requests or where all distances are equal.
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
    """`pairs` distinct pairs i < j of 0..requests-1, or all if there are fewer: int64 [P] and int64 [P]."""
    total = requests * (requests - 1) // 2
    if total < 3:
        raise SignatureError(f"{requests} requests with decode steps are too few to compare pairs of them")
    if total <= pairs:
        flat = np.arange(total)
    else:
        flat = np.random.default_rng(seed).choice(total, pairs, replace=False, shuffle=False)
    row = np.arange(requests, dtype=np.int64)
    row_start = row * (2 * requests - row - 1) // 2  # pairs are numbered row by row of the upper triangle
    first = np.searchsorted(row_start[:-1], flat, side="right") - 1
    return first, flat - row_start[first] + first + 1


def _idf(counts: NDArray[Any]) -> NDArray[np.float32]:
    """float32 [L, E]: ln((N + 1) / (df + 1)), df = requests that used the expert at all."""
    used_by = (counts > 0).sum(axis=0)
    return _as_float32(np.log((len(counts) + 1) / (used_by + 1)))


def _pair_dots(entries: Floats, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [L, P]: scalar product of each pair in each layer, from entries [N, L, E]."""
    dots = np.empty((entries.shape[1], len(first)))
    for start in range(0, len(first), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        dots[:, part] = np.einsum("ple,ple->lp", entries[first[part]], entries[second[part]])
    return dots


def _squares(entries: Floats) -> NDArray[np.float64]:
    """float64 [L, N]: squared length of each request in each layer."""
    return np.asarray(np.einsum("nle,nle->ln", entries, entries), dtype=np.float64)


def _distance(
    dots: NDArray[np.float64], first: NDArray[np.float64], second: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Cosine distance from scalar products and squared lengths; 1 where a vector is zero."""
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
    """Greedy layer mask: add the layer that raises rho most until none raises it. Returns (mask [L], rho).

    The distance of any subset of layers follows from sums of per-layer scalar products and squared lengths, so a
    candidate costs one addition and one sort of P values, whatever E is.
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
            "happens where every request uses every expert; try the transform count"
        )
    return mask, best


def _centred_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks (ties share their mean rank) minus their mean, scaled to unit length; NaN if all values are equal.

    Layer selection spends its time here. The unstable sort is several times faster than the stable one of
    scipy.stats.rankdata, and ties are averaged, so that their order does not matter.
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
    """Scalar product without BLAS, whose threads take milliseconds to meet for it where the cores are busy."""
    return float(np.einsum("p,p->", first, second))
