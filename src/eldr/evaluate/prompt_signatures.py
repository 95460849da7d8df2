"""Signatures from prompts: what they gain, how fast they are learned while serving, and what a new mix does to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from eldr.activation import ActivationModel
from eldr.evaluate.bench import MAIN_BATCH, Bench, EvaluationError, Experiment, Part, Row, run_cell
from eldr.evaluate.drift import AFTER, BEFORE, by_labels
from eldr.evaluate.predictors import predictors
from eldr.policies.base import Policy
from eldr.policies.expected_union import ExpectedUnion
from eldr.prompt.fit import Choice, held_out_profiles
from eldr.replay.experiment import Cell, Laboratory
from eldr.replay.measurements import RunResult
from eldr.replay.output import STATISTICS, Measure, tpot_ms
from eldr.replay.split import Mix, take_requests
from eldr.replay.statistics import paired_change

Floats = NDArray[np.float32]

SIGNATURES = ("none", "label", "prompt", "counts", "both", "true")
OF_LOCALITY_BAND = ("prompt", "counts")
# Requests served since the learning began are put together by as many.
BUCKET = 100
CURVE_SEEDS = 6
SHARES = (1.0, 0.25, 0.1)
# The share of the requests of one side that may be in flight. There are few, so chance has more room.
MOST_OF_A_SIDE = 0.6
# What places requests while the mix changes: signature, whether it was fitted to the old mix, whether it learns.
CHANGES: dict[str, tuple[str, bool, str]] = {
    "counts, no calibration": ("counts", False, "off"),
    "counts, fitted to the others": ("counts", True, "off"),
    "prompt, fitted to the others": ("prompt", True, "off"),
    "prompt, fitted to the others, learning": ("prompt", True, "online"),
    "prompt, learning from nothing": ("prompt", False, "online"),
}


def with_prompts(bench: Bench) -> Laboratory:
    """The laboratory of a trace with prompts. Raises EvaluationError for any other."""
    if not bench.trace.has_prompts:
        raise EvaluationError("the trace holds no prompts; record it with --keep-prompts")
    return bench.laboratory


def against(cell: Cell, other: Cell, measure: Measure, key: str) -> Row:
    """The paired change of a measure, and its interval, as members `key`, `key`_lo and `key`_hi."""
    change = paired_change(cell.per_seed(measure), other.per_seed(measure))
    return {key: change.percent, f"{key}_lo": change.low, f"{key}_hi": change.high}


def against_jsq(cell: Cell, jsq: Cell) -> Row:
    """TPOT of a cell, and its paired changes against jsq."""
    row: Row = {}
    for name, percent in STATISTICS.items():
        row[f"tpot_{name}_ms"] = float(cell.per_seed(tpot_ms(percent)).mean())
        row |= against(cell, jsq, tpot_ms(percent), f"vs_jsq_{name}")
    return row | {"active_experts_mean": float(cell.per_seed(lambda run: run.active_experts_mean).mean())}


def _sizes(bench: Bench) -> list[Part]:
    return [{"workers": workers} for workers in (bench.workers // 2, bench.workers) if workers > 1]


def _by_signature(bench: Bench, part: Part) -> list[Row]:
    """One row per policy and signature."""
    laboratory, workers = with_prompts(bench), part["workers"]
    rate = laboratory.rate_for_batch(MAIN_BATCH, workers)
    jsq = run_cell(laboratory, "jsq", workers, rate, MAIN_BATCH, bench.seeds)
    rows: list[Row] = []
    for policy, signatures in (("expected-union", SIGNATURES), ("locality-band", OF_LOCALITY_BAND)):
        for signature in signatures:
            runs: list[RunResult] = []
            shares: list[float] = []
            for seed in range(bench.seeds):
                if signature == "both":
                    profiles, share = combined(laboratory, workers, seed)
                    shares.append(share)
                    made = laboratory.told(profiles, seed)
                else:
                    made = policy_by(laboratory, policy, signature, workers, seed)
                runs.append(laboratory.run_policy(made, workers, rate, MAIN_BATCH, seed))
            row = {"policy": policy, "signature": signature, "workers": workers, "batch_target": MAIN_BATCH}
            row |= {"rate": rate, "seeds": bench.seeds, "prompt_share": float(np.mean(shares)) if shares else None}
            rows.append(row | against_jsq(Cell(policy, workers, rate, runs), jsq))
    return rows


def policy_by(laboratory: Laboratory, policy: str, signature: str, workers: int, seed: int) -> Policy:
    """A fresh policy that knows requests by one signature."""
    if signature == "none":
        calibration = laboratory.calibration(workers, seed)
        options = laboratory.settings.options.of_expected_union() | {"signature": "prompt"}
        return ExpectedUnion(None if calibration is None else calibration.predictor, **options, seed=seed)
    if signature == "label":
        return laboratory.told(of_labels(laboratory, seed), seed)
    if signature == "true":
        return laboratory.policy("expected-union-true", workers, seed)
    return laboratory.with_options(signature=signature).policy(policy, workers, seed)


def of_labels(laboratory: Laboratory, seed: int) -> Floats:
    """For each request the mean profile of the calibration requests with its label, float32 [N, D].

    For a label that none of them has, it is the mean profile of all of them.
    """
    chosen = laboratory.split(seed).calibrate
    profiles, labels = _true_profiles(laboratory), laboratory.trace.label
    told = np.tile(profiles[chosen].mean(axis=0), (len(profiles), 1))
    for label in np.unique(labels[chosen]):
        told[labels == label] = profiles[chosen[labels[chosen] == label]].mean(axis=0)
    return told


def combined(laboratory: Laboratory, workers: int, seed: int) -> tuple[Floats, float]:
    """A prediction of each request's profile from its words and its counts together, float32 [N, D].

    It is between the two predictions, at the share of the words that has the least squared error on the calibration
    requests, where each is predicted by models of others. Returns that share too.
    """
    calibration = laboratory.calibration(workers, seed)
    if calibration is None or calibration.predictor is None or calibration.prompts is None:
        raise EvaluationError("the trace has too few requests to fit both predictors")
    packed, chosen, served = laboratory.packed, laboratory.split(seed).calibrate, laboratory.split(seed).serve
    assert packed.prompts is not None
    true = _true_profiles(laboratory)[chosen]
    model, predictor = calibration.prompts, calibration.predictor
    choice = Choice(model.strength, model.idf, model.words.rank, model.r2)
    words = [packed.prompts[request] for request in chosen.tolist()]
    by_words = held_out_profiles(words, true, packed.layers, packed.top_k, choice, seed=seed)
    by_counts = _held_out_by_counts(laboratory, predictor, chosen, seed)
    apart = by_words - by_counts
    share = float(np.clip(((true - by_counts) * apart).sum() / max(float((apart**2).sum()), 1e-12), 0, 1))
    told = np.tile(true.mean(axis=0), (packed.requests, 1))
    of_counts = predictors(predictor)["fitted"]
    for request in served.tolist():
        told[request] = share * model.predict(packed.prompts[request]) + (1 - share) * of_counts(packed.counts[request])
    return told, share


def _held_out_by_counts(
    laboratory: Laboratory, predictor: ActivationModel, chosen: NDArray[np.int64], seed: int, folds: int = 4
) -> Floats:
    fold = np.random.default_rng(seed).permutation(len(chosen)) % folds
    predicted = np.zeros((len(chosen), len(predictor.mean_profile)), dtype=np.float32)
    for held in range(folds):
        part = take_requests(laboratory.trace, chosen[fold != held])
        fitted = ActivationModel.fit(
            part.prefill_counts,
            part.prompt_tokens,
            part.decode_profiles(),
            part.meta.top_k,
            ranks=(predictor.rank,),
            strengths=(predictor.strength,),
        )
        predict = predictors(fitted)["fitted"]
        for place in np.flatnonzero(fold == held).tolist():
            predicted[place] = predict(laboratory.packed.counts[int(chosen[place])])
    return predicted


def _true_profiles(laboratory: Laboratory) -> Floats:
    return laboratory.trace.decode_profiles().reshape(laboratory.packed.requests, -1)


def _learning_parts(bench: Bench) -> list[Part]:
    """One part per line of the picture: the shares of requests that report, and a model that was fitted before."""
    return [{"share": share} for share in SHARES] + [{"share": None}]


def _learning(bench: Bench, part: Part) -> list[Row]:
    """Rows of sort "curve", one per bucket, and "all", one per line.

    They are mean TPOT of requests in order of arrival, against the same requests under jsq.
    """
    laboratory, share = with_prompts(bench), part["share"]
    seeds = min(CURVE_SEEDS, bench.seeds)
    workers = max(2, bench.workers // 2)
    rate = laboratory.rate_for_batch(MAIN_BATCH, workers)
    learning = dataclasses.replace(
        laboratory.settings,
        options=dataclasses.replace(laboratory.settings.options, signature="prompt"),
        learn="off" if share is None else "online",
        learn_share=share or 1.0,
    )
    policy = "expected-union" if share is None else "expected-union-own"
    cell = run_cell(laboratory.with_settings(learning), policy, workers, rate, MAIN_BATCH, seeds)
    jsq = run_cell(laboratory, "jsq", workers, rate, MAIN_BATCH, seeds)
    shared: Row = {"share": share, "workers": workers, "rate": rate, "batch_target": MAIN_BATCH, "seeds": seeds}
    rows: list[Row] = [{"sort": "all", **shared, **against_jsq(cell, jsq)}]
    width = min(BUCKET, bench.requests)
    for first in range(0, bench.requests - width + 1, width):
        own, other = (one.per_seed(mean_of(first, first + width)) for one in (cell, jsq))
        change = paired_change(own, other)
        row = {"sort": "curve", **shared, "served": first + width, "vs_jsq_mean": change.percent}
        rows.append(row | {"vs_jsq_mean_lo": change.low, "vs_jsq_mean_hi": change.high})
    return rows


def mean_of(first: int, end: int) -> Callable[[RunResult], float]:
    """Mean TPOT of the measured requests from one to another, in order of arrival."""
    return lambda run: float(run.tpot_s[first:end].mean())


def _change_parts(bench: Bench) -> list[Part]:
    return [{"fitted": BEFORE, "served": AFTER}, {"fitted": AFTER, "served": BEFORE}]


def _change(bench: Bench, part: Part) -> list[Row]:
    """One row per line of CHANGES, for a fleet that serves other kinds than its calibration was fitted to."""
    trace = with_prompts(bench).trace
    side = by_labels(trace)
    kinds = {name: ", ".join(sorted(set(trace.label[side == name].tolist()))) for name in (BEFORE, AFTER)}
    mix = Mix(calibrate_labels=(part["fitted"],), serve_labels=(part["served"],))
    seeds = bench.fewer_seeds

    settings = dataclasses.replace(bench.laboratory.settings, mix=mix)
    plain = Laboratory(dataclasses.replace(trace, label=side), settings)
    served = len(plain.split(0).serve)
    workers = max(2, min(8, int(MOST_OF_A_SIDE * served / MAIN_BATCH)))
    batch = min(MAIN_BATCH, MOST_OF_A_SIDE * served / workers)
    rate = plain.rate_for_batch(batch, workers)
    jsq = run_cell(plain, "jsq", workers, rate, batch, seeds)
    rows: list[Row] = []
    for name, (signature, fitted, learn) in CHANGES.items():
        options = dataclasses.replace(settings.options, signature=signature)
        laboratory = plain.with_settings(dataclasses.replace(settings, options=options, learn=learn))
        policy = "expected-union" if fitted else "expected-union-own"
        cell = run_cell(laboratory, policy, workers, rate, batch, seeds)
        row = {"fitted": kinds[part["fitted"]], "served": kinds[part["served"]], "signature": name, "seeds": seeds}
        rows.append(row | {"workers": workers, "batch_target": batch} | against_jsq(cell, jsq))
    return rows


BY_SIGNATURE = Experiment("prompt-signatures", _sizes, _by_signature)
LEARNING = Experiment("prompt-learning", _learning_parts, _learning)
CHANGE = Experiment("prompt-change", _change_parts, _change)
