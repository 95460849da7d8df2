"""The main comparison under the mixes of the named workloads that a trace can serve."""

from __future__ import annotations

import dataclasses

from eldr.evaluate.bench import MAIN_BATCH, POLICIES, Bench, Experiment, Part, Row, compare_at
from eldr.replay.experiment import Laboratory
from eldr.replay.split import Mix
from eldr.replay.workload import ServedKind
from eldr.workloads.presets import WORKLOADS, WorkloadError, labels_of_kinds

# Requests in flight per request that the scarcest kind can serve.
MOST_OF_A_KIND = 0.7


def _parts(bench: Bench) -> list[Part]:
    """One part per workload whose kinds are all in the trace."""
    parts = []
    for preset in WORKLOADS.values():
        try:
            found = labels_of_kinds(preset, bench.trace.label.tolist(), {})
        except WorkloadError:
            continue
        parts.append({"workload": preset.name, "labels": {kind: list(labels) for kind, labels in found.items()}})
    return parts


def _run(bench: Bench, part: Part) -> list[Row]:
    preset = WORKLOADS[part["workload"]]
    kinds = tuple(ServedKind(kind.name, tuple(part["labels"][kind.name]), kind.share) for kind in preset.kinds)
    labels = tuple(label for kind in kinds for label in kind.labels)
    mix = Mix(calibrate_labels=labels, serve_labels=labels)
    settings = dataclasses.replace(bench.laboratory.settings, mix=mix, kinds=kinds, max_output=preset.output_tokens)
    laboratory = Laboratory(bench.trace, settings)
    served = bench.trace.label[laboratory.split(0).serve].tolist()
    capacity = min(sum(label in kind.labels for label in served) / kind.share for kind in kinds) * MOST_OF_A_KIND
    workers = min(bench.workers, max(2, int(capacity / MAIN_BATCH)))
    batch = min(MAIN_BATCH, capacity / workers)
    shown = {"workload": preset.name, "kinds": ", ".join(f"{kind.name} {kind.share:.0%}" for kind in kinds)}
    policies = (*POLICIES, "expected-union-true")
    return compare_at(laboratory, policies, workers, batch, bench.seeds, **shown)


NAMED = Experiment("workloads", _parts, _run)
