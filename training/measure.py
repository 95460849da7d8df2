"""How far experts follow the kind of text in a recorded, labelled trace: the figures of docs/model.md.

    python training/measure.py data/small-moe.npz [--json FILE]

Batches are drawn at random, every request at a random decode step of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.signature import SignatureModel
from eldr.trace import Trace, read_trace

BATCHES = (4, 8, 16)
DRAWS = 2000
TASKS = ("code", "mathematics", "medicine", "law")

Floats = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures = measure(read_trace(args.trace))
    text = json.dumps(figures, indent=1, default=lambda value: round(float(value), 3))
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n", encoding="utf-8")


def measure(trace: Trace) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    kinds = sorted(set(trace.label.tolist()))
    everything = np.ones(trace.requests, dtype=bool)
    tasks = np.isin(trace.label, TASKS)
    return {
        "requests": trace.requests,
        "decode_steps": len(trace.decode_experts),
        "rho": rho(trace, everything),
        "rho_of_tasks": rho(trace, tasks),
        "rho_within_kind": {kind: rho(trace, trace.label == kind) for kind in kinds},
        "prefill_decode_correlation": correlation(trace),
        "cosine_of_prompt_and_output": cosines(trace),
        "active_experts": {str(batch): active_experts(trace, everything, batch, rng) for batch in BATCHES},
        "active_experts_of_tasks": {str(batch): active_experts(trace, tasks, batch, rng) for batch in BATCHES},
        "active_experts_by_kind_batch_8": {
            kind: distinct(trace, [np.flatnonzero(trace.label == kind)], 8, rng) for kind in kinds
        },
        "experts_used_less_than_a_tenth_of_the_mean": rare_experts(trace),
    }


def rho(trace: Trace, chosen: NDArray[np.bool_]) -> float:
    """Spearman correlation, over pairs of requests, of signature distance and decode distance."""
    return SignatureModel.fit(trace.prefill_counts[chosen], trace.decode_profiles()[chosen]).rho


def correlation(trace: Trace) -> float:
    """Median over experts of Pearson's r, over requests, of their shares of the prompt and of the decode."""
    prompt, decode = prompt_profiles(trace), trace.decode_profiles().astype(float)
    prompt, decode = prompt - prompt.mean(0), decode - decode.mean(0)
    scale = np.sqrt((prompt**2).sum(0) * (decode**2).sum(0))
    used = scale > 1e-9
    return float(np.median((prompt * decode).sum(0)[used] / scale[used]))


def cosines(trace: Trace) -> dict[str, float]:
    """Mean cosine of a request's prompt profile with its own decode profile, and with those of other requests."""
    prompt, decode = unit(prompt_profiles(trace)), unit(trace.decode_profiles().astype(float))
    cosine = prompt @ decode.T
    alike = trace.label[:, None] == trace.label
    own = np.eye(trace.requests, dtype=bool)
    return {
        "own": cosine[own].mean(),
        "same_kind": cosine[alike & ~own].mean(),
        "other_kind": cosine[~alike].mean(),
    }


def prompt_profiles(trace: Trace) -> Floats:
    return np.asarray(trace.prefill_counts / trace.prompt_tokens[:, None, None])


def unit(profiles: Floats) -> Floats:
    rows = profiles.reshape(len(profiles), -1)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def active_experts(trace: Trace, chosen: NDArray[np.bool_], batch: int, rng: np.random.Generator) -> dict[str, float]:
    """Mean distinct experts a layer of batches of mixed kinds and of one kind, and the change in percent."""
    kinds = sorted(set(trace.label[chosen].tolist()))
    mixed = distinct(trace, [np.flatnonzero(chosen)], batch, rng)
    one_kind = distinct(trace, [np.flatnonzero(trace.label == kind) for kind in kinds], batch, rng)
    return {"mixed": mixed, "one_kind": one_kind, "change_percent": 100 * (one_kind / mixed - 1)}


def distinct(trace: Trace, pools: list[NDArray[np.int64]], batch: int, rng: np.random.Generator) -> float:
    """Mean distinct experts of a step, a layer: `batch` requests out of one of the pools, in turn."""
    total = 0.0
    for draw in range(DRAWS):
        requests = rng.choice(pools[draw % len(pools)], batch, replace=False)
        rows = trace.decode_experts[rng.integers(trace.decode_offsets[requests], trace.decode_offsets[requests + 1])]
        used = np.zeros((trace.meta.layers, trace.meta.experts), dtype=bool)
        for layer in range(trace.meta.layers):
            used[layer, rows[:, layer]] = True
        total += used.sum(1).mean()
    return total / DRAWS


def rare_experts(trace: Trace) -> int:
    """How many of all experts decode steps use less than a tenth as often as the mean."""
    load = trace.decode_profiles().mean(0)
    return int((load < 0.1 * load.mean()).sum())


if __name__ == "__main__":
    main()
