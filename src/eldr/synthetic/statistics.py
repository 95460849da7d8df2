"""What is measured of a trace, recorded or synthetic, to say whether one is like the other.

Overlaps are shares of a token's top-k in a layer: 1 if two tokens chose the same experts, top-k / E if both chose at
random. Everything is a mean over layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.trace import Trace

LAGS = (1, 4, 16, 64)
BATCHES = (2, 4, 7, 16, 32)
DRAWS = 200
# How many most similar requests are looked at.
NEAREST = 4
# Pairs of steps of one request, to see whether layers vary together.
STEP_PAIRS = 64
# The main axes along which requests differ.
AXES = 16

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Statistic:
    """One number about a trace, and what it is in words."""

    name: str
    meaning: str
    value: float


@dataclass(frozen=True, slots=True, eq=False)
class Profiles:
    """How often requests use experts, as shares of their tokens. Requests with fewer than two decode rows are left out.

    first, second: float32 [n, L, E], in the halves of the decode.
    whole: float32 [n, L, E].
    prompt: float32 [n, L, E].
    request: int64 [n], their numbers in the trace.
    label: str [n].
    """

    first: Floats
    second: Floats
    whole: Floats
    prompt: Floats
    request: NDArray[np.int64]
    label: NDArray[np.str_]


def profiles_of(trace: Trace, request: NDArray[np.int64]) -> Profiles:
    """The profiles of these requests of a trace."""
    lengths = np.diff(trace.decode_offsets)[request]
    request = request[lengths >= 2]
    shape = (len(request), trace.meta.layers, trace.meta.experts)
    first, second, whole = (np.zeros(shape, dtype=np.float32) for _ in range(3))
    for at, one in enumerate(request.tolist()):
        rows = rows_of(trace, one)
        half = len(rows) // 2
        first[at], second[at] = _shares(rows[:half], shape[2]), _shares(rows[half:], shape[2])
        whole[at] = (half * first[at] + (len(rows) - half) * second[at]) / len(rows)
    prompt = (trace.prefill_counts[request] / trace.prompt_tokens[request, None, None]).astype(np.float32)
    return Profiles(first, second, whole, prompt, request, trace.label[request])


def rows_of(trace: Trace, request: int) -> NDArray[np.unsignedinteger[Any]]:
    """The decode rows of one request, [T, L, k]."""
    return trace.decode_experts[trace.decode_offsets[request] : trace.decode_offsets[request + 1]]


def _shares(rows: NDArray[np.unsignedinteger[Any]], experts: int) -> Floats:
    layers = rows.shape[1]
    index = rows.astype(np.int64) + np.arange(layers)[:, None] * experts
    counts = np.bincount(index.reshape(-1), minlength=layers * experts).reshape(layers, experts)
    return (counts / len(rows)).astype(np.float32)


def cross_overlap(left: Floats, right: Floats, top_k: int, same: NDArray[np.bool_] | None = None) -> float:
    """Mean overlap of different requests, one from each side. same: bool [n, n], the pairs that count. None for all."""
    n, layers = left.shape[:2]
    products = left.reshape(n, -1) @ right.reshape(n, -1).T
    pairs = np.ones((n, n), dtype=bool) if same is None else same.copy()
    np.fill_diagonal(pairs, False)
    return float(products[pairs].mean()) / (layers * top_k) if pairs.any() else float("nan")


def own_overlap(left: Floats, right: Floats, top_k: int) -> float:
    """Mean overlap of a request with itself, one side from each."""
    return float(np.einsum("nle,nle->", left, right) / (len(left) * left.shape[1] * top_k))


def nearest_overlap(profiles: Profiles, top_k: int) -> float:
    """Mean overlap of each request with the NEAREST most like it. They are found in one half of the decodes.

    The overlap is that of the other half, so that what looks alike by chance does not count.
    """
    n = len(profiles.first)
    alike = _likeness(profiles.first)
    np.fill_diagonal(alike, -np.inf)
    nearest = np.argsort(-alike, axis=1)[:, :NEAREST]
    second = profiles.second.reshape(n, -1)
    products = np.take_along_axis(second @ second.T, nearest, axis=1)
    return float(products.mean() / (profiles.first.shape[1] * top_k))


def _likeness(shares: Floats) -> Floats:
    """Cosine of how any two requests differ from the mean, float32 [n, n]. shares: float32 [n, L, E]."""
    flat = shares.reshape(len(shares), -1)
    flat = flat - flat.mean(axis=0)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)
    return np.asarray(flat @ flat.T)


def lag_overlap(trace: Trace, request: NDArray[np.int64], lag: int) -> float:
    """Mean overlap of two steps of a request that are `lag` apart. NaN if no request has so many."""
    shared = pairs = 0
    for one in request.tolist():
        rows = rows_of(trace, one)
        if len(rows) > lag:
            shared += int(_shared(rows[:-lag], rows[lag:]).sum())
            pairs += len(rows) - lag
    return shared / (pairs * trace.meta.layers * trace.meta.top_k) if pairs else float("nan")


def _shared(left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.int64]:
    """How many experts two steps share in each layer, int64 [T, L]."""
    shared = np.zeros(left.shape[:2], dtype=np.int64)
    for at in range(left.shape[2]):
        shared += (left[..., at : at + 1] == right).any(axis=-1)
    return shared


def layers_together(trace: Trace, request: NDArray[np.int64], rng: np.random.Generator) -> float:
    """How much more the overlap of two steps of a request varies than if layers chose on their own.

    It is the variance of the overlap summed over layers, by the sum of its variances in each layer: 1 if layers are
    independent, the number of layers if one tells all.
    """
    of_sum, sum_of = [], []
    for one in request.tolist():
        rows = rows_of(trace, one)
        if len(rows) < 32:
            continue
        left, right = (rows[rng.integers(0, len(rows), STEP_PAIRS)] for _ in range(2))
        shared = _shared(left, right)
        of_sum.append(float(shared.sum(axis=1).var()))
        sum_of.append(float(shared.var(axis=0).sum()))
    return float(np.sum(of_sum) / np.sum(sum_of)) if sum_of else float("nan")


def spectrum(profiles: Profiles, top_k: int) -> NDArray[np.float64]:
    """What distinguishes requests, along each axis from the largest on, as overlaps: float64 [n].

    Their sum is the overlap of a request with itself beyond that of all. The axes come from the scalar products of the
    first half of each decode with the second half of others, so that the noise of a half does not count.
    """
    n, layers = profiles.first.shape[:2]
    return np.asarray(_eigen(profiles)[0] / (n * layers * top_k))


def _eigen(profiles: Profiles) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues, descending, and eigenvectors of the requests' scalar products."""
    n = len(profiles.first)
    first, second = (
        half.reshape(n, -1) - half.reshape(n, -1).mean(axis=0) for half in (profiles.first, profiles.second)
    )
    products = (first @ second.T).astype(np.float64)
    values, vectors = np.linalg.eigh((products + products.T) / 2)
    return values[::-1], vectors[:, ::-1]


def coordinates(profiles: Profiles, axes: int = AXES) -> NDArray[np.float64]:
    """The requests along their main axes, float64 [n, axes]. Axes that only noise spans are zero."""
    values, vectors = _eigen(profiles)
    found = vectors[:, :axes] * np.sqrt(np.maximum(values[:axes], 0))
    return np.pad(found, ((0, 0), (0, axes - found.shape[1])))


def popular_share(profiles: Profiles, top_k: int) -> float:
    """The share of all choices that goes to the most popular quarter of a layer's experts."""
    mean = np.sort(profiles.whole.mean(axis=0), axis=1)[:, ::-1]
    return float(mean[:, : max(1, mean.shape[1] // 4)].sum()) / (len(mean) * top_k)


def prompt_correlation(profiles: Profiles) -> float:
    """Median over experts of Pearson's r, over requests, of an expert's share of the prompt and of the decode."""
    x, y = (part - part.mean(axis=0) for part in (profiles.prompt, profiles.whole))
    scale = np.sqrt((x * x).sum(axis=0) * (y * y).sum(axis=0))
    varies = scale > 1e-9
    return float(np.median((x * y).sum(axis=0)[varies] / scale[varies])) if varies.any() else float("nan")


def union_of_steps(trace: Trace, request: NDArray[np.int64], steps: int, rng: np.random.Generator) -> float:
    """Distinct experts of so many successive steps of one request, per layer."""
    long = request[np.diff(trace.decode_offsets)[request] >= steps]
    if not len(long):
        return float("nan")
    sizes = []
    for one in rng.choice(long, DRAWS).tolist():
        rows = rows_of(trace, one)
        at = int(rng.integers(0, len(rows) - steps + 1))
        sizes.append(_distinct(rows[at : at + steps], trace.meta.experts))
    return float(np.mean(sizes))


def union_of_batches(trace: Trace, batches: Sequence[NDArray[np.int64]], rng: np.random.Generator) -> float:
    """Distinct experts, per layer, of a step of these batches, in which each request is somewhere in its decode."""
    sizes = []
    for batch in batches:
        rows = [trace.decode_experts[rng.integers(*trace.decode_offsets[[one, one + 1]])] for one in batch.tolist()]
        sizes.append(_distinct(np.stack(rows), trace.meta.experts))
    return float(np.mean(sizes))


def _distinct(rows: NDArray[np.unsignedinteger[Any]], experts: int) -> float:
    layers = rows.shape[1]
    active = np.zeros((layers, experts), dtype=bool)
    np.put_along_axis(active, rows.transpose(1, 0, 2).reshape(layers, -1).astype(np.int64), True, axis=1)
    return float(active.sum() / layers)


def measure(trace: Trace, seed: int = 0, requests: int = 400) -> list[Statistic]:
    """Measure a trace. Of more requests than `requests`, so many are chosen at random."""
    rng = np.random.default_rng(seed)
    chosen = np.arange(trace.requests)
    if len(chosen) > requests:
        chosen = np.sort(rng.choice(chosen, requests, replace=False))
    profiles = profiles_of(trace, chosen)
    top_k, request = trace.meta.top_k, profiles.request
    same = profiles.label[:, None] == profiles.label
    found = [
        Statistic("popular quarter", "share of choices of the most popular quarter of experts",
                  popular_share(profiles, top_k)),
        Statistic("overlap random", "experts shared by steps of two requests",
                  cross_overlap(profiles.whole, profiles.whole, top_k)),
        Statistic("overlap kind", "by steps of two requests of one kind",
                  cross_overlap(profiles.whole, profiles.whole, top_k, same)),
        Statistic("overlap nearest", f"by steps of a request and the {NEAREST} most like it",
                  nearest_overlap(profiles, top_k)),
        Statistic("overlap own", "by steps of one request, far apart",
                  own_overlap(profiles.first, profiles.second, top_k)),
    ]  # fmt: skip
    found += [
        Statistic(f"overlap lag {lag}", f"by steps of one request, {lag} apart", lag_overlap(trace, request, lag))
        for lag in LAGS
    ]
    found += [
        Statistic("layers together", "how much overlaps of steps vary in common over layers (1: not at all)",
                  layers_together(trace, request, rng)),
        *_axes(profiles, top_k),
        Statistic("overlap prompt own", "experts shared by a prompt and its own decode",
                  own_overlap(profiles.prompt, profiles.whole, top_k)),
        Statistic("overlap prompt other", "by a prompt and another decode",
                  cross_overlap(profiles.prompt, profiles.whole, top_k)),
        Statistic("prompt-decode r", "correlation of an expert's share of prompt and decode, median",
                  prompt_correlation(profiles)),
    ]  # fmt: skip
    for steps in LAGS[1:]:
        value = union_of_steps(trace, request, steps, rng)
        found.append(Statistic(f"union of {steps} steps", f"distinct experts of {steps} successive steps", value))
    for name, meaning, batches in _batches(profiles, rng):
        found.append(Statistic(name, meaning, union_of_batches(trace, batches, rng)))
    steps_made = np.diff(trace.decode_offsets)
    for share in (50, 90):
        for what, lengths in (("prompt tokens", trace.prompt_tokens), ("decode steps", steps_made)):
            value = float(np.percentile(lengths, share))
            found.append(Statistic(f"{what} p{share}", f"{what}, percentile {share}", value))
    return found


def _axes(profiles: Profiles, top_k: int) -> list[Statistic]:
    values = spectrum(profiles, top_k)
    total = max(float(values.sum()), 1e-12)
    return [
        Statistic(f"first {n} axes", f"share of what distinguishes requests along {n} axes", values[:n].sum() / total)
        for n in (1, 4, AXES)
    ]


def _batches(profiles: Profiles, rng: np.random.Generator) -> list[tuple[str, str, list[NDArray[np.int64]]]]:
    """Batches drawn at random, of one kind, and of the requests most alike in their decode: name, meaning, requests."""
    request, n = profiles.request, len(profiles.request)
    nearest = np.argsort(-_likeness(profiles.whole), axis=1)
    kinds = [request[profiles.label == kind] for kind in np.unique(profiles.label).tolist()]
    found = []
    for size in (size for size in BATCHES if size <= n // 2):
        of_random = [rng.choice(request, size, replace=False) for _ in range(DRAWS)]
        found.append((f"union random {size}", f"distinct experts of {size} random requests", of_random))
        large = [kind for kind in kinds if len(kind) >= 2 * size]
        if len(kinds) > 1 and large:
            weights = np.array([len(kind) for kind in large], dtype=float)
            picked = rng.choice(len(large), DRAWS, p=weights / weights.sum()).tolist()
            of_kind = [rng.choice(large[at], size, replace=False) for at in picked]
            found.append((f"union kind {size}", f"of {size} requests of one kind", of_kind))
        alike = [request[nearest[int(rng.integers(n)), :size]] for _ in range(DRAWS)]
        found.append((f"union alike {size}", f"of {size} requests most alike", alike))
    return found
