"""Statistics of a recording before any routing: prefill against decode, one kind against mixed, and signatures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eldr.calibration import fit_calibration
from eldr.evaluate.bench import Bench, Experiment, Part, Row
from eldr.replay.predictors import recorded_union

BATCHES = (1, 2, 4, 7, 12, 16, 24, 32)
DRAWS = 300
HISTOGRAM_BINS = 40
ZONES_SHOWN = 8


def _correlation(bench: Bench, part: Part) -> list[Row]:
    """Pearson's r, over requests, between an expert's share of the prompt and its share of the decode.

    Given by layer, and as a histogram over all experts. An expert that all requests use equally, or not at all, has no
    r.
    """
    trace = bench.trace
    recorded = np.diff(trace.decode_offsets) > 0
    prompt = trace.prefill_counts[recorded] / trace.prompt_tokens[recorded, None, None]
    decode = trace.decode_profiles()[recorded].astype(np.float64)
    r = _pearson(prompt, decode)
    rows: list[Row] = []
    for layer, of_layer in enumerate(r):
        known = of_layer[np.isfinite(of_layer)]
        if len(known):
            low, median, high = np.percentile(known, (10, 50, 90)).tolist()
            rows.append({"sort": "layer", "layer": layer, "r_p10": low, "r_p50": median, "r_p90": high})
    known = r[np.isfinite(r)]
    edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)
    shares = np.histogram(known, edges)[0] / len(known)
    for left, share in zip(edges[:-1].tolist(), shares.tolist(), strict=True):
        rows.append({"sort": "histogram", "r_from": left, "r_to": left + 2 / HISTOGRAM_BINS, "share": share})
    low, median, high = np.percentile(known, (10, 50, 90)).tolist()
    rows.append({"sort": "all", "experts": len(known), "r_p10": low, "r_p50": median, "r_p90": high})
    return rows


def _pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlation over axis 0, [L, E]. NaN if either side does not vary."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    scale = np.sqrt((x * x).sum(axis=0) * (y * y).sum(axis=0))
    undefined: NDArray[np.float64] = np.full(scale.shape, np.nan)
    np.divide((x * y).sum(axis=0), scale, out=undefined, where=scale > 1e-12)
    return undefined


def _kinds(bench: Bench, part: Part) -> list[Row]:
    """Distinct experts per step and layer, for random requests, requests of one kind (label), and similar requests."""
    rng = np.random.default_rng(0)
    packed, labels = bench.laboratory.packed, bench.trace.label
    served = np.flatnonzero(np.diff(bench.trace.decode_offsets) > 0)
    profiles = bench.trace.decode_profiles()[served].reshape(len(served), -1)
    centred = profiles - profiles.mean(axis=0)
    directions = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    nearest = np.argsort(-(directions @ directions.T), axis=1)
    kinds = [served[labels[served] == kind] for kind in np.unique(labels).tolist()]
    weights = np.array([len(kind) for kind in kinds], dtype=float)
    rows: list[Row] = []
    for batch in BATCHES:
        if batch > len(served) // 2:
            break
        large = weights * (weights >= 2 * batch)  # otherwise the same few requests would be drawn again and again
        drawn = {
            "mixed": [rng.choice(served, batch, replace=False) for _ in range(DRAWS)],
            "alike": [served[nearest[rng.integers(len(served)), :batch]] for _ in range(DRAWS)],
        }
        if large.any() and len(kinds) > 1:
            chosen = rng.choice(len(kinds), DRAWS, p=large / large.sum())
            drawn["one kind"] = [rng.choice(kinds[kind], batch, replace=False) for kind in chosen.tolist()]
        means = {
            name: float(np.mean([recorded_union(packed, group, rng) for group in groups]))
            for name, groups in drawn.items()
        }
        for name, experts in means.items():
            vs_mixed = 100 * (experts / means["mixed"] - 1)
            rows.append({"batch": batch, "requests": name, "active_experts": experts, "vs_mixed": vs_mixed})
    return rows


def _signatures(bench: Bench, part: Part) -> list[Row]:
    """Signatures of all requests on their two main axes, the centroids of the zones, and the rho of each transform."""
    fitted = fit_calibration(bench.trace, min(ZONES_SHOWN, bench.workers), seed=0)
    picture = fitted.picture
    rows: list[Row] = [
        {"sort": "request", "x": float(x), "y": float(y), "zone": zone, "kind": kind}
        for (x, y), zone, kind in zip(picture.points, picture.zones.tolist(), picture.labels.tolist(), strict=True)
    ]
    for zone, ((x, y), size) in enumerate(zip(picture.centroids, fitted.zone_sizes.tolist(), strict=True)):
        rows.append({"sort": "centroid", "x": float(x), "y": float(y), "zone": zone, "requests": size})
    for transform, rho in fitted.rho.items():
        rows.append({"sort": "rho", "transform": transform, "rho_in_sample": rho})
    kept = int(fitted.signature.layer_mask.sum())
    rows.append({"sort": "layers", "kept": kept, "of": len(fitted.signature.layer_mask)})
    return rows


CORRELATION = Experiment("correlation", lambda bench: [{}], _correlation)
KINDS = Experiment("kinds", lambda bench: [{}], _kinds)
SIGNATURES = Experiment("signatures", lambda bench: [{}], _signatures)
