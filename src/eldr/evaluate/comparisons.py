"""Compares policies: the main comparison, over load, over pool size, over their settings, and by goodput."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from eldr.evaluate.bench import MAIN_BATCH, POLICIES, Bench, Experiment, Part, Row, compare_at, run_cell
from eldr.policies.expected_union import ANCHOR, TAIL_GUARD
from eldr.replay.errors import ReplayError
from eldr.replay.experiment import BASELINES, Laboratory
from eldr.replay.goodput import goodput
from eldr.replay.output import as_object

LABORATORY = ("expected-union-true",)
LOADS = (1.0, 2.0, 4.0, 7.0, 10.0, 14.0, 18.0)
LOAD_WORKERS = 8
POOLS = (8, 16, 24, 40)
# Settings of the policies, under their names in the replay. Infinity turns the tail guard off.
KNOBS: dict[str, tuple[str, tuple[float, ...]]] = {
    "others_weight": ("expected-union", (0.25, 0.5, 1.0, 2.0, 4.0)),
    "tail_guard": ("expected-union", (*(factor * TAIL_GUARD for factor in (0.0, 0.5, 1.0, 2.0, 4.0)), math.inf)),
    "anchor": ("expected-union", tuple(factor * ANCHOR for factor in (0.0, 0.5, 1.0, 2.0))),
    "tau": ("locality-band", (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)),
}
# Limits of p99 TPOT, relative to the p99 TPOT of jsq at the main batch.
LIMITS = (0.9, 1.15)
GOODPUT_SEEDS = 2


def _main_parts(bench: Bench) -> list[Part]:
    """Split the main comparison into parts.

    Clairvoyant takes ten times as long as all other policies together. It runs in parts of its own, only in the scope
    of the headline.
    """
    sizes = [workers for workers in (bench.workers // 2, bench.workers) if workers > 1]
    parts = [
        {"workers": workers, "scope": scope, "policies": [*POLICIES, *LABORATORY]}
        for scope in ("step", "moe")
        for workers in sizes
    ]
    return parts + [{"workers": workers, "scope": "step", "policies": ["clairvoyant"]} for workers in sizes]


def _main(bench: Bench, part: Part) -> list[Row]:
    laboratory = bench.laboratory.with_options(cost_scope=part["scope"])
    rows = compare_at(laboratory, part["policies"], part["workers"], MAIN_BATCH, bench.seeds)
    # The load balancers run in every part, as a baseline. Only one part keeps their rows.
    return [row for row in rows if row["policy"] in part["policies"] or part["policies"] != ["clairvoyant"]]


def _load_workers(bench: Bench) -> int:
    return min(LOAD_WORKERS, bench.workers)


def _load_parts(bench: Bench) -> list[Part]:
    workers = _load_workers(bench)
    return [{"workers": workers, "batch": batch} for batch in bench.batches(workers, LOADS)]


def _load(bench: Bench, part: Part) -> list[Row]:
    return compare_at(bench.laboratory, POLICIES, part["workers"], part["batch"], bench.fewer_seeds)


def _pool_parts(bench: Bench) -> list[Part]:
    """One part per pool: each at the batch that the largest pool can sustain, and at the main batch if it can."""
    common = min(MAIN_BATCH, math.floor(bench.capacity / POOLS[-1] * 2) / 2)
    batches = {batch for batch in (common, MAIN_BATCH) if batch >= 1}
    return [
        {"workers": workers, "batch": batch}
        for batch in sorted(batches)
        for workers in POOLS
        if workers * batch <= bench.capacity
    ]


def _knob_parts(bench: Bench) -> list[Part]:
    return [{"knob": knob} for knob in KNOBS]


def _knobs(bench: Bench, part: Part) -> list[Row]:
    """One row per value. Changes are against the best load balancer, which is run once."""
    knob, laboratory, workers = part["knob"], bench.laboratory, bench.workers
    policy, values = KNOBS[knob]
    rate = laboratory.rate_for_batch(MAIN_BATCH, workers)

    baselines = [run_cell(laboratory, name, workers, rate, MAIN_BATCH, bench.fewer_seeds) for name in BASELINES]
    rows = []
    for value in values:
        of_value = run_cell(
            laboratory.with_options(**{knob: value}), policy, workers, rate, MAIN_BATCH, bench.fewer_seeds
        )
        shown = {"knob": knob, "value": None if math.isinf(value) else value}
        shown["default"] = value == getattr(laboratory.settings.options, knob)
        rows.append({**shown, "batch_target": MAIN_BATCH, **as_object(of_value, [*baselines, of_value], "step")})
    return rows


def _goodput_parts(bench: Bench) -> list[Part]:
    return [{"relative_limit": limit} for limit in LIMITS]


def _goodput(bench: Bench, part: Part) -> list[Row]:
    """The highest rate of each policy at which p99 TPOT stays within the limit."""
    workers = _load_workers(bench)
    laboratory = Laboratory(bench.trace, dataclasses.replace(bench.laboratory.settings, requests=bench.requests // 2))
    rate = laboratory.rate_for_batch(MAIN_BATCH, workers)
    seeds = min(GOODPUT_SEEDS, bench.seeds)
    at_main = run_cell(laboratory, "jsq", workers, rate, MAIN_BATCH, seeds)
    limit_ms = part["relative_limit"] * 1e3 * float(np.mean([np.percentile(run.tpot_s, 99) for run in at_main.runs]))
    rows: list[Row] = []
    for policy in ("jsq", *POLICIES):
        row: Row = {"policy": policy, "workers": workers, "limit_ms": limit_ms, "seeds": seeds, **part}
        try:
            cell, reached = goodput(laboratory, policy, workers, limit_ms, seeds)
        except ReplayError:  # even an idle fleet is slower
            rows.append(row | {"rate": None, "reached": True, "batch_mean": None})
            continue
        batch = float(np.mean([run.batch_mean for run in cell.runs]))
        rows.append(row | {"rate": cell.rate, "reached": reached, "batch_mean": batch})
    jsq_rate = rows[0]["rate"]
    for row in rows:
        row["vs_jsq"] = 100 * (row["rate"] / jsq_rate - 1) if jsq_rate and row["rate"] else None
    return rows


MAIN = Experiment("main", _main_parts, _main)
LOAD = Experiment("load", _load_parts, _load)
POOL = Experiment("pools", _pool_parts, _load)
KNOB = Experiment("knobs", _knob_parts, _knobs)
GOODPUT = Experiment("goodput", _goodput_parts, _goodput)
