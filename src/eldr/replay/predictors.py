"""Judges predictors of decode activations on what routing needs: the distinct experts of whole batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr.activation import expected_union
from eldr.counts import ExpertCounts
from eldr.replay.packed import PackedTrace

Predict = Callable[[ExpertCounts], NDArray[np.float32]]
RELIABILITY_BINS = 20


@dataclass(frozen=True, slots=True)
class UnionJudgement:
    """Distinct experts per step and layer, averaged over batches.

    predicted: from the predictor.
    from_true_profiles: from true profiles. Its difference from `recorded` is the error of assuming independent
        requests.
    recorded: counted in the trace.
    """

    predicted: float
    from_true_profiles: float
    recorded: float


@dataclass(frozen=True, slots=True, eq=False)
class Judgement:
    """The quality of one predictor.

    r2: the share of the variance of decode profiles that it explains.
    random: on batches of random requests.
    similar: on batches of requests with the nearest true profiles.
    reliability: float64 [bins, 3], the mean predicted probability, the recorded frequency and the number of entries.
    """

    r2: float
    random: UnionJudgement
    similar: UnionJudgement
    reliability: NDArray[np.float64]


def judge(
    predict: Predict,
    trace: PackedTrace,
    profiles: NDArray[np.float32],
    requests: NDArray[np.int64],
    *,
    batch: int = 7,
    batches: int = 200,
    seed: int = 0,
) -> Judgement:
    """Judge a predictor on `requests`, which it must not have been fitted on.

    profiles: float32 [N, D], the true profiles of the trace.
    """
    rng = np.random.default_rng(seed)
    true = profiles[requests]
    predicted = np.stack([predict(trace.counts[request]) for request in requests.tolist()])
    centred = true - true.mean(axis=0)
    directions = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    nearest = np.argsort(-(directions @ directions.T), axis=1)[:, :batch]
    at_random = [rng.choice(len(requests), batch, replace=False) for _ in range(batches)]
    similar = list(nearest[rng.integers(0, len(requests), batches)])

    def unions(groups: list[NDArray[np.int64]]) -> UnionJudgement:
        return UnionJudgement(
            float(np.mean([expected_union(predicted[group], trace.layers) for group in groups])),
            float(np.mean([expected_union(true[group], trace.layers) for group in groups])),
            float(np.mean([recorded_union(trace, requests[group], rng) for group in groups])),
        )

    error, spread = float(((predicted - true) ** 2).sum()), float((centred**2).sum())
    return Judgement(1 - error / spread, unions(at_random), unions(similar), _reliability(predicted, true))


def recorded_union(
    trace: PackedTrace, requests: NDArray[np.int64], rng: np.random.Generator, places: int = 20
) -> float:
    """Distinct experts per step and layer of these requests, each at a random point of its decode."""
    union = np.zeros((places, trace.words.shape[1]), dtype=np.uint64)
    for request in requests.tolist():
        union |= trace.words[rng.integers(trace.first_row[request], trace.end_row[request], places)]
    return float(np.bitwise_count(union).sum()) / places / trace.layers


def _reliability(predicted: NDArray[np.float32], true: NDArray[np.float32]) -> NDArray[np.float64]:
    edges = np.linspace(0, 1, RELIABILITY_BINS + 1)[1:-1]
    index = np.digitize(predicted.reshape(-1), edges)
    count = np.bincount(index, minlength=RELIABILITY_BINS).astype(np.float64)
    safe = np.maximum(count, 1)
    sums = [np.bincount(index, weights=values.reshape(-1), minlength=RELIABILITY_BINS) for values in (predicted, true)]
    return np.stack([sums[0] / safe, sums[1] / safe, count], axis=1)
