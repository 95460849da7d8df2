"""Aggregated serving: what is left of the gain where workers compute prompts in the same steps, by chunk and load."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from eldr.evaluate.bench import Bench, Experiment, Part, Row, run_cell
from eldr.evaluate.prompt_signatures import against, against_jsq, policy_by
from eldr.replay.experiment import Cell, Laboratory
from eldr.replay.output import ttft_ms
from eldr.replay.prompts import RecordedPrompts

# Tokens of a step, prompts and decodes together. None: prefill is elsewhere, for comparison.
CHUNKS: tuple[int | None, ...] = (None, 512, 2048, 8192)
# Mean batch of decodes under jsq -> workers, where the trace can keep them.
LOADS = {4.0: 8, 8.0: 8, 24.0: 4}
# The share of the capacity that may decode. Requests whose prompts are computed or wait are in flight too.
MOST_DECODING = 0.6
SIGNATURES = ("none", "prompt", "counts", "true")
# Log-normal lengths with the mean and the deviation of the logarithm of those of Azure's conversations of 2023
# (AzurePublicDataset, CC-BY-4.0). The experts of a prompt remain those of the trace.
MEDIAN_TOKENS, LOG_DEVIATION, MOST_TOKENS = 760.0, 0.985, 16384
LENGTHS = 10000


def prompt_lengths(seed: int = 0) -> NDArray[np.int64]:
    """Made-up lengths of prompts in tokens, int64 [LENGTHS]."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEDIAN_TOKENS), LOG_DEVIATION, LENGTHS)
    return np.clip(np.rint(drawn), 1, MOST_TOKENS).astype(np.int64)


def _parts(bench: Bench) -> list[Part]:
    """One part per load and chunk, with as many workers as the trace can keep at that load."""
    sizes = {batch: min(workers, int(MOST_DECODING * bench.capacity / batch)) for batch, workers in LOADS.items()}
    return [
        {"workers": workers, "batch": batch, "chunk": chunk}
        for batch, workers in sizes.items()
        if workers > 1
        for chunk in CHUNKS
    ]


def _run(bench: Bench, part: Part) -> list[Row]:
    """One row per signature, of expected-union. Changes are against jsq."""
    workers, batch, chunk = part["workers"], part["batch"], part["chunk"]
    laboratory = _laboratory(bench, chunk)
    rate = laboratory.rate_for_batch(batch, workers)
    jsq = run_cell(laboratory, "jsq", workers, rate, batch, bench.fewer_seeds)
    shared: Row = {"workers": workers, "batch_target": batch, "chunk": chunk, "rate": rate, "seeds": bench.fewer_seeds}
    for name, percent in (("p50", 50.0), ("p99", 99.0)):
        shared[f"ttft_jsq_{name}_ms"] = float(jsq.per_seed(ttft_ms(percent)).mean())
    shared["jsq_chunk_step_share"] = float(jsq.per_seed(lambda run: run.chunk_step_share).mean())
    rows: list[Row] = []
    for signature in SIGNATURES:
        if signature == "prompt" and not bench.trace.has_prompts:
            continue
        runs = [
            laboratory.run_policy(
                policy_by(laboratory, "expected-union", signature, workers, seed), workers, rate, batch, seed
            )
            for seed in range(bench.fewer_seeds)
        ]
        cell = Cell("expected-union", workers, rate, runs)
        row: Row = {"signature": signature, **shared, **against_jsq(cell, jsq)}
        row["chunk_step_share"] = float(cell.per_seed(lambda run: run.chunk_step_share).mean())
        row["chunk_time_share"] = float(cell.per_seed(lambda run: run.chunk_time_share).mean())
        for name, percent in (("p50", 50.0), ("p99", 99.0)):
            row |= against(cell, jsq, ttft_ms(percent), f"ttft_vs_jsq_{name}") if chunk is not None else {}
        rows.append(row)
    return rows


def _laboratory(bench: Bench, chunk: int | None) -> Laboratory:
    settings = dataclasses.replace(
        bench.laboratory.settings,
        requests=max(1, bench.requests // 2),
        recorded_prompts=RecordedPrompts(prompt_lengths()),
        aggregated=chunk is not None,
    )
    if chunk is not None:
        options = dataclasses.replace(settings.options, prefill_chunk=chunk)
        settings = dataclasses.replace(settings, options=options)
    return bench.laboratory.with_settings(settings)


AGGREGATED = Experiment("aggregated", _parts, _run)
