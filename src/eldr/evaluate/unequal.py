"""Unequal workers: policies that know the step time of each worker, learn it, or take all workers for equal."""

from __future__ import annotations

import dataclasses

import numpy as np

from eldr.cost import DEFAULT_PRESET, PRESETS, CostModel
from eldr.evaluate.bench import MAIN_BATCH, Bench, Experiment, Part, Row
from eldr.evaluate.prompt_signatures import against, against_jsq
from eldr.replay.changes import Slowdown
from eldr.replay.experiment import Cell, Laboratory
from eldr.replay.measurements import RunResult
from eldr.replay.output import Measure
from eldr.replay.worker import worker_name

# Assumed, not measured: decode is bound by memory, so all times of a kind are those of the preset's device by the ratio
# of their memory bandwidths, in TB/s by data sheet. For the MI300X, other software: its fixed times are longer by half.
BANDWIDTH = {"RTX PRO 6000": 1.79, "H100": 3.35, "H200": 4.8, "MI300X": 5.3}
LONGER_BASE = {"MI300X": 1.5}
# Name -> the kinds of the workers, in turn.
MIXES: dict[str, tuple[str, ...]] = {
    "H100 and H200": ("H100", "H200"),
    "H100, H200 and MI300X": ("H100", "H200", "MI300X"),
    "all H200": ("H200",),
    "all H200, one slows down": ("H200",),
}
# In the last mix, steps of the second worker take twice as long for this part of the run.
SLOW = Slowdown("w1", 2.0, 0.3, 0.8)
WORKERS = 8
# What a policy believes of the workers: the same of all, each one's true time, or what it learns of each.
BELIEFS = ("equal", "own", "learned")
POLICIES = (
    ("jsq-speed", "own"),
    ("jsq-speed", "learned"),
    ("locality-band", "equal"),
    ("expected-union", "equal"),
    ("expected-union", "own"),
    ("expected-union", "learned"),
)
# Runs are this many times as long as others, because learning takes some seconds of them.
LONGER = 2
# Requests that arrive this long after the first are counted once more, without those before: by then it has learned.
LEARNED_S = 12.0


def cost_of(kind: str) -> CostModel:
    """The assumed cost of a kind of device."""
    preset = PRESETS[DEFAULT_PRESET]
    ratio = BANDWIDTH["RTX PRO 6000"] / BANDWIDTH[kind]
    fixed = ratio * LONGER_BASE.get(kind, 1.0)
    moe, rest = preset.moe_layer, preset.rest
    assert rest is not None
    return CostModel(
        name=kind,
        device=kind,
        source="assumed: the preset by the ratio of memory bandwidths",
        moe_layer=dataclasses.replace(
            moe,
            base_us=moe.base_us * fixed,
            per_expert_us=moe.per_expert_us * ratio,
            per_token_us=moe.per_token_us * ratio,
        ),
        rest=dataclasses.replace(
            rest,
            layer_base_us=rest.layer_base_us * fixed,
            layer_per_token_us=rest.layer_per_token_us * ratio,
            head_base_us=rest.head_base_us * fixed,
            head_per_token_us=rest.head_per_token_us * ratio,
            context_token_us=rest.context_token_us * ratio,
        ),
    )


def _parts(bench: Bench) -> list[Part]:
    workers = min(WORKERS, bench.workers)
    return [{"mix": mix, "scope": scope, "workers": workers} for mix in MIXES for scope in ("moe", "step")]


def _run(bench: Bench, part: Part) -> list[Row]:
    """One row per policy and belief. Changes are against jsq."""
    workers, seeds = part["workers"], bench.fewer_seeds
    told = _laboratory(bench, part["mix"], part["scope"], workers)
    learning = told.with_settings(dataclasses.replace(told.settings, learn_costs=True))
    equal = told.with_options(worker_costs={})
    rate = told.rate_for_batch(MAIN_BATCH, workers)

    def cell(policy: str, belief: str) -> Cell:
        ran_by = learning if belief == "learned" else told
        knows = equal if belief == "equal" else ran_by
        runs = [
            ran_by.run_policy(knows.policy(policy, workers, seed), workers, rate, MAIN_BATCH, seed)
            for seed in range(seeds)
        ]
        return Cell(policy, workers, rate, runs)

    jsq = cell("jsq", "equal")
    shared: Row = {"mix": part["mix"], "cost_scope": part["scope"], "workers": workers, "batch_target": MAIN_BATCH}
    shared |= {"rate": rate, "seeds": seeds, "run_s": float(np.mean([_seconds(run) for run in jsq.runs]))}
    rows: list[Row] = []
    for policy, belief in POLICIES:
        found = cell(policy, belief)
        row: Row = {**shared, "policy": policy, "belief": belief, **against_jsq(found, jsq)}
        for name, percent in (("p99", 99.0), ("mean", None)) if shared["run_s"] > 1.5 * LEARNED_S else ():
            row |= against(found, jsq, _later_tpot_ms(percent), f"later_vs_jsq_{name}")
        rows.append(row)
    return rows


def _seconds(run: RunResult) -> float:
    return float(run.arrival_s[-1] - run.arrival_s[0])


def _later_tpot_ms(percent: float | None) -> Measure:
    """TPOT of the requests that arrive once there was time to learn: a percentile, or the mean for None."""

    def measure(run: RunResult) -> float:
        tpot_ms = 1e3 * run.tpot_s[run.arrival_s >= run.arrival_s[0] + LEARNED_S]
        return float(tpot_ms.mean() if percent is None else np.percentile(tpot_ms, percent))

    return measure


def _laboratory(bench: Bench, mix: str, scope: str, workers: int) -> Laboratory:
    kinds = [cost_of(kind) for kind in MIXES[mix]]
    settings = bench.laboratory.settings
    options = dataclasses.replace(
        settings.options,
        cost_scope=scope,
        worker_costs={worker_name(index): kinds[index % len(kinds)] for index in range(workers)},
    )
    return bench.laboratory.with_settings(
        dataclasses.replace(
            settings,
            requests=LONGER * bench.requests,
            options=options,
            slowdowns=(SLOW,) if "slows down" in mix else (),
        )
    )


UNEQUAL = Experiment("unequal", _parts, _run)
