"""Ablations of the paper's method: locality-band with one step changed at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eldr.calibration import Calibration, fit_calibration
from eldr.evaluate.bench import MAIN_BATCH, Bench, Experiment, Part, Row, run_cell
from eldr.policies.locality_band import LocalityBand
from eldr.replay.experiment import BASELINES, Cell
from eldr.replay.measurements import RunResult
from eldr.replay.output import as_object, tpot_ms
from eldr.replay.split import take_requests
from eldr.replay.statistics import paired_change
from eldr.signature import DEFAULT_TRANSFORM, SignatureModel, rho
from eldr.trace import Trace
from eldr.zones import balanced_kmeans


@dataclass(frozen=True, slots=True)
class Variant:
    """Locality-band with at most one step changed.

    ablation: the step that is changed.
    name: what it is changed to. "the paper's method" if nothing is changed.
    transform, all_layers, balanced, tau, two_nearest: the settings of the method.
    """

    ablation: str
    name: str
    transform: str = DEFAULT_TRANSFORM
    all_layers: bool = False
    balanced: bool = True
    tau: float = 0.1
    two_nearest: bool = True

    def change(self, fitted: Calibration, part: Trace, seed: int) -> Calibration:
        """Return `fitted` with this variant's transform, layers and zones, computed on the requests of `part`."""
        if not self.all_layers and self.balanced:
            return fitted
        signature = fitted.signature
        if self.all_layers:
            signature = dataclasses.replace(signature, layer_mask=np.ones_like(signature.layer_mask))
        points = signature.transform(part.prefill_counts)
        zones = balanced_kmeans(points, fitted.workers, seed=seed, cap=None if self.balanced else len(points))
        return dataclasses.replace(
            fitted,
            signature=signature,
            centroids=zones.centroids,
            zone_sizes=zones.sizes,
            prompts=None,  # the zones of prompts are those of the unchanged signature
            prompt_centroids=None,
        )


REFERENCE = "the paper's method"
VARIANTS = (
    Variant("reference", REFERENCE),
    Variant("transform", "counts, no IDF", transform="count"),
    Variant("transform", "square root of counts", transform="sqrt_count"),
    Variant("transform", "binary", transform="binary"),
    Variant("layers", "all layers", all_layers=True),
    Variant("balance", "zones of any size", balanced=False),
    Variant("tau", "tau 0", tau=0.0),
    Variant("two-nearest", "no two-nearest rule", two_nearest=False),
)


def _run(bench: Bench, part: Part) -> list[Row]:
    """One row per variant: rho on held-out requests, TPOT, and the change of TPOT against the unchanged method."""
    laboratory, workers, seeds = bench.laboratory, bench.workers, bench.seeds
    rate = laboratory.rate_for_batch(MAIN_BATCH, workers)
    baselines = [run_cell(laboratory, name, workers, rate, MAIN_BATCH, seeds) for name in BASELINES]
    profiles = bench.trace.decode_profiles()
    cells: dict[str, Cell] = {}

    @functools.cache  # most variants share the fit
    def fit(transform: str, seed: int) -> tuple[Calibration, Trace]:
        part = take_requests(bench.trace, laboratory.split(seed).calibrate)
        return fit_calibration(part, workers, seed=seed, transform=transform, compare=False), part

    rows = []
    for variant in VARIANTS:
        runs: list[RunResult] = []
        held_out, largest = [], []
        for seed in range(seeds):
            served = laboratory.split(seed).serve
            fitted = variant.change(*fit(variant.transform, seed), seed)
            held_out.append(_rho(fitted.signature, bench.trace.prefill_counts[served], profiles[served]))
            largest.append(float(fitted.zone_sizes.max() / fitted.zone_sizes.mean()))
            policy = LocalityBand(fitted, tau=variant.tau, two_nearest=variant.two_nearest, seed=seed)
            runs.append(laboratory.run_policy(policy, workers, rate, MAIN_BATCH, seed))
        cell = cells[variant.name] = Cell("locality-band", workers, rate, runs)
        row = {"ablation": variant.ablation, "variant": variant.name, "batch_target": MAIN_BATCH}
        row |= {"rho_held_out": float(np.mean(held_out)), "largest_zone": float(np.mean(largest))}
        rows.append(row | as_object(cell, [*baselines, cell], "step") | _against(cell, cells[REFERENCE]))
    return rows


def _rho(signature: SignatureModel, counts: NDArray[np.uint32], profiles: NDArray[np.float32]) -> float:
    return rho(signature.transform(counts), profiles)


def _against(cell: Cell, reference: Cell) -> Row:
    measures: dict[str, Callable[[RunResult], float]] = {"p50": tpot_ms(50), "p99": tpot_ms(99), "mean": tpot_ms(None)}
    row: Row = {}
    for name, measure in measures.items():
        change = paired_change(cell.per_seed(measure), reference.per_seed(measure))
        key = f"vs_paper_{name}"
        row |= {key: change.percent, f"{key}_lo": change.low, f"{key}_hi": change.high}
    return row


ABLATION = Experiment("ablations", lambda bench: [{}], _run)
