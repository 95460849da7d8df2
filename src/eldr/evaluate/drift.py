"""Drift: the mix of requests changes during the run. Reports TPOT over time, and before and after the change."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.evaluate.bench import MAIN_BATCH, MOST_IN_FLIGHT, Bench, EvaluationError, Experiment, Part, Row, run_cell
from eldr.replay.experiment import Cell, Laboratory
from eldr.replay.split import Mix
from eldr.replay.statistics import paired_change
from eldr.trace import Trace

BEFORE, AFTER = "before", "after"
SWITCH_AT = 0.4
BUCKETS = 30
REQUESTS = 3000
POLICIES = ("jsq", "locality-band", "locality-band-refit", "expected-union", "expected-union-own")


def by_labels(trace: Trace) -> NDArray[np.str_]:
    """Label each request BEFORE or AFTER, [N], by whole kinds.

    Kinds are ordered along the main axis of their prompts' expert use and cut in half. Raises EvaluationError if the
    trace has only one kind.
    """
    kinds = np.unique(trace.label)
    if len(kinds) < 2:
        raise EvaluationError("all requests have the same label")
    position = _main_axis(trace)
    order = sorted(kinds.tolist(), key=lambda kind: float(position[trace.label == kind].mean()))
    sizes = np.cumsum([(trace.label == kind).sum() for kind in order])
    cut = 1 + int(np.abs(sizes[:-1] - trace.requests / 2).argmin())
    return np.where(np.isin(trace.label, order[:cut]), BEFORE, AFTER)


def by_axis(trace: Trace) -> NDArray[np.str_]:
    """Label each request BEFORE or AFTER, [N], by the main axis of its prompt's expert use.

    The cut is at the median.
    """
    position = _main_axis(trace)
    return np.where(position <= np.median(position), BEFORE, AFTER)


def _main_axis(trace: Trace) -> NDArray[np.float64]:
    """First principal component of the prompt frequencies, float64 [N]."""
    flat = trace.prefill_counts.reshape(trace.requests, -1) / trace.prompt_tokens[:, None]
    centred = flat - flat.mean(axis=0)
    _, vectors = np.linalg.eigh(centred @ centred.T)
    return np.asarray(vectors[:, -1])


GROUPINGS = {"labels": by_labels, "axis": by_axis}


def _parts(bench: Bench) -> list[Part]:
    groupings = GROUPINGS if len(set(bench.trace.label.tolist())) > 1 else {"axis": by_axis}
    return [{"grouping": grouping} for grouping in groupings]


def _run(bench: Bench, part: Part) -> list[Row]:
    """Rows of two sorts: "timeline", one per policy and bucket, and "change", one per policy and phase."""
    labels = GROUPINGS[part["grouping"]](bench.trace)
    kinds = {side: sorted(set(bench.trace.label[labels == side].tolist())) for side in (BEFORE, AFTER)}
    regrouped = dataclasses.replace(bench.trace, label=labels)
    mix = Mix(calibrate_labels=(BEFORE,), serve_labels=(AFTER,), switch_at=SWITCH_AT)
    requests = round(REQUESTS * bench.requests / 2000)
    settings = dataclasses.replace(bench.laboratory.settings, mix=mix, requests=requests)
    laboratory = Laboratory(regrouped, settings)
    split = laboratory.split(0)
    assert split.serve_before is not None
    smallest = min(len(split.serve), len(split.serve_before))
    workers = max(2, min(8, int(MOST_IN_FLIGHT * smallest / MAIN_BATCH)))
    batch = min(MAIN_BATCH, MOST_IN_FLIGHT * smallest / workers)
    rate = laboratory.rate_for_batch(batch, workers)
    cells = [run_cell(laboratory, name, workers, rate, batch, bench.fewer_seeds) for name in POLICIES]
    shared: Row = {"grouping": part["grouping"], "workers": workers, "rate": rate, "batch_target": batch}
    shared |= {"seeds": bench.fewer_seeds}
    rows: list[Row] = []
    for cell in cells:
        rows += [{"sort": "timeline", **shared, **row} for row in _timeline(cell)]
        for phase in (BEFORE, AFTER):
            change = _change(cell, cells[0], phase)
            names = {"kinds": ", ".join(kinds[phase])} if part["grouping"] == "labels" else {}
            rows.append({"sort": "change", **shared, "policy": cell.policy, "phase": phase, **change, **names})
    return rows


def _timeline(cell: Cell) -> list[Row]:
    """TPOT of the requests that arrive in each bucket, by seconds since the switch, over all seeds."""
    rows = []
    for bucket in range(BUCKETS):
        tpot, since = [], []
        for run in cell.runs:
            edges = np.linspace(0, len(run.tpot_s), BUCKETS + 1).astype(int)
            switch_s = run.arrival_s[round(len(run.tpot_s) * SWITCH_AT)]
            tpot.append(run.tpot_s[edges[bucket] : edges[bucket + 1]])
            since.append(run.arrival_s[edges[bucket] : edges[bucket + 1]].mean() - switch_s)
        values = 1e3 * np.concatenate(tpot)
        rows.append(
            {
                "policy": cell.policy,
                "since_switch_s": float(np.mean(since)),
                "tpot_p50_ms": float(np.median(values)),
                "tpot_p99_ms": float(np.percentile(values, 99)),
                "tpot_mean_ms": float(values.mean()),
            }
        )
    return rows


def _change(cell: Cell, jsq: Cell, phase: str) -> dict[str, Any]:
    """TPOT of the requests that arrive before or after the switch, and its paired change against jsq."""

    def values(of: Cell, percent: float | None) -> NDArray[np.float64]:
        per_seed = []
        for run in of.runs:
            cut = round(len(run.tpot_s) * SWITCH_AT)
            part = run.tpot_s[:cut] if phase == BEFORE else run.tpot_s[cut:]
            per_seed.append(1e3 * (part.mean() if percent is None else np.percentile(part, percent)))
        return np.array(per_seed)

    row: dict[str, Any] = {}
    for name, percent in (("p50", 50.0), ("p99", 99.0), ("mean", None)):
        own = values(cell, percent)
        change = paired_change(own, values(jsq, percent))
        row[f"tpot_{name}_ms"] = float(own.mean())
        row |= {f"vs_jsq_{name}": change.percent, f"vs_jsq_{name}_lo": change.low, f"vs_jsq_{name}_hi": change.high}
    return row


DRIFT = Experiment("drift", _parts, _run)
