"""Experts in host memory: the gain by what devices hold, what a missing expert costs, and how the cache is kept."""

from __future__ import annotations

import dataclasses

import numpy as np

from eldr.evaluate.aggregated import MOST_DECODING
from eldr.evaluate.bench import Bench, Experiment, Part, Row
from eldr.evaluate.prompt_signatures import against_jsq
from eldr.policies.expected_union import ANCHOR, TAIL_GUARD
from eldr.policies.residents import COMPUTED_BY_HOST, HostShare, miss_ratio
from eldr.replay.experiment import Cell, Laboratory, resulting_rate
from eldr.replay.host_memory import HostLayout

# Requests in flight on each worker, kept constant: see `eldr.replay.workload`.
BATCH, LARGER_BATCH = 4, 7
WORKERS = 8
# What is varied, one thing at a time: the share that devices hold, what a missing expert costs, whether the cache drops
# what was used least often, and the batch.
HALF: Part = {"resident": 0.5, "miss_cost": "pcie5", "evict": "lru", "batch": BATCH}
LAYOUTS: tuple[Part, ...] = (
    {**HALF, "resident": 0.25},
    HALF,
    {**HALF, "resident": 0.75},
    {**HALF, "batch": LARGER_BATCH},
    {**HALF, "evict": "lfu"},
    {**HALF, "miss_cost": "pcie4"},
    {**HALF, "miss_cost": "cpu", "evict": "none"},
)
# Policies by what they are told: a name, and whether it knows that experts are missing.
POLICIES = (("locality-band", False), ("expected-union", False), ("expected-union", True))
# Weights of the anchor and of the guard, for the frontier between the mean and the tail.
FRONTIER = tuple((anchor * ANCHOR, guard * TAIL_GUARD) for guard in (1.0, 3.0) for anchor in (0.0, 0.5, 1.0, 2.0, 3.0))


def _parts(bench: Bench) -> list[Part]:
    """One part per layout, with as many workers as the trace can keep, and one for the frontier."""
    parts = []
    for layout in LAYOUTS:
        workers = min(WORKERS, int(MOST_DECODING * bench.capacity / layout["batch"]))
        if workers > 1:
            parts.append({**layout, "workers": workers, "frontier": False})
            if layout is HALF:
                parts.append({**layout, "workers": workers, "frontier": True})
    return parts


def _run(bench: Bench, part: Part) -> list[Row]:
    """One row per policy, or per pair of weights. Changes are against jsq in front of the same workers."""
    laboratory = _laboratory(bench, part)
    told = {"resident": part["resident"], "miss_cost": part["miss_cost"]}
    jsq = _cell(bench, laboratory, "jsq", part)
    if part["frontier"]:
        rows = []
        for anchor, guard in FRONTIER:
            weighted = laboratory.with_options(**told, anchor=anchor, tail_guard=guard)
            row = _row(_cell(bench, weighted, "expected-union", part), jsq, part)
            rows.append({"anchor": anchor, "tail_guard": guard, **row})
        return rows
    rows = [{"told": False, **_row(jsq, jsq, part)}]
    for name, knows in POLICIES:
        cell = _cell(bench, laboratory.with_options(**told) if knows else laboratory, name, part)
        rows.append({"told": knows, **_row(cell, jsq, part)})
    return rows


def _laboratory(bench: Bench, part: Part) -> Laboratory:
    host = HostShare(part["resident"], part["miss_cost"])
    settings = bench.laboratory.settings
    return bench.laboratory.with_settings(
        dataclasses.replace(
            settings,
            requests=max(1, bench.requests // 2),
            host_memory=HostLayout(host, by_frequency=part["evict"] == "lfu"),
            options=dataclasses.replace(settings.options, cost_scope="moe"),
        )
    )


def _cell(bench: Bench, laboratory: Laboratory, name: str, part: Part) -> Cell:
    workers, batch = part["workers"], part["batch"]
    runs = [laboratory.run(name, workers, None, batch, seed) for seed in range(bench.fewer_seeds)]
    return Cell(name, workers, resulting_rate(runs), runs)


def _row(cell: Cell, jsq: Cell, part: Part) -> Row:
    """Missing experts are per layer and step. They are not known where the host computes beside the device."""
    missing = None
    if part["miss_cost"] != COMPUTED_BY_HOST:
        more = [run.expert_reads_mean - run.active_experts_mean for run in cell.runs]
        missing = float(np.mean(more)) / miss_ratio(part["miss_cost"])
    return {
        **part,
        "policy": cell.policy,
        "seeds": len(cell.runs),
        "rate": cell.rate,
        "missing": missing,
        **against_jsq(cell, jsq),
    }


HOST_MEMORY = Experiment("host-memory", _parts, _run)
