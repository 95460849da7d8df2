"""The quality of decode activation predictors, on unions of whole batches and on single probabilities."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from eldr.activation import ActivationModel, expected_union, own_frequencies, to_probabilities
from eldr.counts import ExpertCounts
from eldr.evaluate.bench import Bench, EvaluationError, Experiment, Part, Row
from eldr.replay.predictors import judge, recorded_union

BATCHES = (2, 4, 7, 12, 16)
GROUPS = 25
JUDGED_SEEDS = 3

Predict = Callable[[ExpertCounts], NDArray[np.float32]]


def predictors(fitted: ActivationModel) -> dict[str, Predict]:
    """The fitted predictor on traffic like the calibration's, and the frequencies that are used without one."""

    def own(counts: ExpertCounts) -> NDArray[np.float32]:
        return to_probabilities(own_frequencies(counts, fitted.mean_frequency), counts.layers, counts.top_k)

    def corrected(counts: ExpertCounts) -> NDArray[np.float32]:
        frequency = own_frequencies(counts, fitted.mean_frequency)
        return fitted.predict(frequency, fitted.mean_frequency, fitted.trust)

    return {"fitted": corrected, "own frequencies": own}


def _run(bench: Bench, part: Part) -> list[Row]:
    """Rows of sort "union" (one per batch), "probability" (one per bin) and "judgement" (one per predictor)."""
    laboratory = bench.laboratory
    profiles = bench.trace.decode_profiles().reshape(bench.trace.requests, -1)
    rows: list[Row] = []
    for seed in range(min(JUDGED_SEEDS, bench.seeds)):
        calibration = laboratory.calibration(bench.workers, seed)
        if calibration is None or calibration.predictor is None:
            raise EvaluationError("the trace has too few requests to fit a predictor")
        served = laboratory.split(seed).serve
        for name, predict in predictors(calibration.predictor).items():
            judged = judge(predict, laboratory.packed, profiles, served, seed=seed)
            row: Row = {"sort": "judgement", "predictor": name, "seed": seed, "r2": judged.r2}
            for draw, union in (("random", judged.random), ("alike", judged.similar)):
                row |= {f"{draw}_predicted": union.predicted, f"{draw}_recorded": union.recorded}
                row[f"{draw}_from_true_profiles"] = union.from_true_profiles
            rows.append(row)
            if seed == 0:
                rows += [{"sort": "union", "predictor": name, **union} for union in _unions(predict, bench, served)]
                rows += [
                    {"sort": "probability", "predictor": name, "predicted": p, "recorded": r, "entries": int(n)}
                    for p, r, n in judged.reliability.tolist()
                    if n
                ]
    return rows


def _unions(predict: Predict, bench: Bench, served: NDArray[np.int64]) -> list[Row]:
    """Predicted and recorded distinct experts of single batches, from very similar ones to random ones."""
    rng = np.random.default_rng(1)
    packed = bench.laboratory.packed
    predicted = np.stack([predict(packed.counts[request]) for request in served.tolist()])
    centred = predicted - predicted.mean(axis=0)
    directions = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    nearest = np.argsort(-(directions @ directions.T), axis=1)
    rows = []
    for batch in (size for size in BATCHES if size <= len(served) // 2):
        for number in range(GROUPS):
            alike = number % 2 == 0
            group = (
                nearest[rng.integers(len(served)), :batch] if alike else rng.choice(len(served), batch, replace=False)
            )
            rows.append(
                {
                    "batch": batch,
                    "requests": "alike" if alike else "random",
                    "predicted": expected_union(predicted[group], packed.layers),
                    "recorded": recorded_union(packed, served[group], rng, places=60),
                }
            )
    return rows


PREDICTORS = Experiment("predictors", lambda bench: [{}], _run)
