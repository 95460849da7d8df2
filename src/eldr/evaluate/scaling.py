"""Pools and models that no recording reaches: synthetic traces with more requests and experts than the recording."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from eldr.evaluate.bench import MOST_IN_FLIGHT, POLICIES, Bench, EvaluationError, Experiment, Part, Row, run_cell
from eldr.replay.experiment import Laboratory
from eldr.replay.output import as_object
from eldr.synthetic import Geometry, TrafficModel, draw_trace, fit_traffic, is_synthetic

# The recorded geometry first, to compare with the recording, and then larger pools of a model with more experts.
COMPARED = {"workers": 8, "batch": 7.0}
WORKERS = (8, 16, 40)
BATCHES = (2.0, 7.0, 16.0)
EXPERTS, TOP_K, MOST_LAYERS = 128, 8, 24
# Decodes are cut, which bounds memory and time: 40 workers at batch 16 need 1,600 requests.
REQUESTS, STEPS = 1600, 128
SHOWN = ("jsq", *POLICIES, "expected-union-true")

# Of this process. A model is fitted once, and a trace is drawn, packed and fitted once.
_models: dict[Path, TrafficModel] = {}
_laboratories: dict[tuple[Path, str], Laboratory] = {}


def _parts(bench: Bench) -> list[Part]:
    """One part per size of the pool and batch, and two that compare a synthetic trace with the recording if it can."""
    if is_synthetic(bench.trace.meta.note):
        return []
    compared: list[Part] = []
    if COMPARED["workers"] * COMPARED["batch"] <= bench.capacity:
        compared = [{"trace": trace, **COMPARED} for trace in ("recorded", "synthetic")]
    return compared + [{"trace": "scaled", "workers": w, "batch": b} for w in WORKERS for b in BATCHES]


def _run(bench: Bench, part: Part) -> list[Row]:
    """One row per policy. Changes are against jsq."""
    workers, batch, seeds = part["workers"], part["batch"], bench.fewer_seeds
    laboratory = _laboratory(bench, part["trace"])
    served = len(laboratory.split(0).serve)
    if workers * batch > MOST_IN_FLIGHT * served:
        raise EvaluationError(
            f"{workers} workers at batch {batch:g} need {workers * batch / MOST_IN_FLIGHT:.0f} requests to serve, and "
            f"the {part['trace']} trace has {served}"
        )
    rate = laboratory.rate_for_batch(batch, workers)
    cells = [run_cell(laboratory, name, workers, rate, batch, seeds) for name in SHOWN]
    layers, experts, top_k = laboratory.packed_geometry
    shown = {"trace": part["trace"], "layers": layers, "experts": experts, "top_k": top_k, "batch_target": batch}
    scope = laboratory.settings.options.cost_scope
    return [{**shown, **as_object(cell, cells, scope)} for cell in cells]


def _laboratory(bench: Bench, kind: str) -> Laboratory:
    """The trace of a part, cut after STEPS decode steps, and its settings."""
    key = bench.path, kind
    if key not in _laboratories:
        settings = dataclasses.replace(
            bench.laboratory.settings, requests=max(1, bench.requests // 2), max_output=STEPS + 1
        )
        trace = bench.trace
        if kind != "recorded":
            if bench.path not in _models:
                _models[bench.path] = fit_traffic(bench.trace)
            model, meta = _models[bench.path], bench.trace.meta
            if kind == "synthetic":
                trace = draw_trace(model, bench.trace.requests, seed=1, max_steps=STEPS)
            else:
                geometry = Geometry(min(meta.layers, MOST_LAYERS), EXPERTS, TOP_K)
                trace = draw_trace(model, REQUESTS, geometry, seed=1, max_steps=STEPS)
        _laboratories[key] = Laboratory(trace, settings)
    return _laboratories[key]


SCALING = Experiment("scaling", _parts, _run)
