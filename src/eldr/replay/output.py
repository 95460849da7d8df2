"""Formats the results of a comparison as rows, JSON objects and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from eldr.replay.changes import FleetChange, recovery_s
from eldr.replay.experiment import Cell
from eldr.replay.measurements import RunResult
from eldr.replay.statistics import Change, paired_change

Measure = Callable[[RunResult], float]
# A timeline divides the run into this many parts.
TIMELINE_BINS = 20


def tpot_ms(percent: float | None) -> Measure:
    """A percentile of TPOT over requests, in ms. None for the mean."""
    return lambda run: _statistic(run.tpot_s, percent)


def moe_tpot_ms(percent: float | None) -> Measure:
    """The same for the part of TPOT that the MoE layers take."""
    return lambda run: _statistic(run.moe_tpot_s, percent)


def _statistic(values: Any, percent: float | None) -> float:
    return 1e3 * float(values.mean() if percent is None else np.percentile(values, percent))


def ttft_ms(percent: float | None) -> Measure:
    """The same for the time to the first token."""
    return lambda run: _statistic(run.ttft_s, percent)


def request_ms(percent: float | None) -> Measure:
    """The same for the time from arrival to the last token."""
    return lambda run: _statistic(run.request_s, percent)


def prefix_hit_share(run: RunResult) -> float:
    """The share of all tokens of prompts that were cached."""
    return float(run.cached_tokens.sum() / run.prompt_tokens.sum())


STATISTICS: dict[str, float | None] = {"p50": 50.0, "p99": 99.0, "mean": None}


def change_against_best(cell: Cell, cells: Sequence[Cell], measure: Measure) -> Change:
    """Paired change against the load balancer with the lowest mean over seeds."""
    baselines = [other.per_seed(measure) for other in cells if other.is_baseline]
    best = min(baselines, key=lambda values: float(values.mean()))
    return paired_change(cell.per_seed(measure), best)


def as_object(cell: Cell, cells: Sequence[Cell], scope: str, aggregated: bool = False) -> dict[str, Any]:
    """Return the JSON object of one (policy, workers, rate, routers).

    aggregated: whether the workers computed the prompts. The object then tells how long that took.
    """

    def mean(measure: Measure) -> float:
        return float(cell.per_seed(measure).mean())

    result: dict[str, Any] = {
        "policy": cell.policy,
        "workers": cell.workers,
        "rate": cell.rate,
        "seeds": len(cell.runs),
        "cost_scope": scope,
        "requests": len(cell.runs[0].tpot_s),
        "tpot_p50_ms": mean(tpot_ms(50)),
        "tpot_p95_ms": mean(tpot_ms(95)),
        "tpot_p99_ms": mean(tpot_ms(99)),
        "tpot_mean_ms": mean(tpot_ms(None)),
        "active_experts_mean": mean(lambda run: run.active_experts_mean),
        "expert_reads_mean": mean(lambda run: run.expert_reads_mean),
        "batch_mean": mean(lambda run: run.batch_mean),
        "wait_mean_ms": mean(lambda run: 1e3 * float(run.wait_s.mean())),
        "wait_p99_ms": mean(lambda run: 1e3 * float(np.percentile(run.wait_s, 99))),
    }
    for prefix, of in (("", tpot_ms), ("moe_", moe_tpot_ms)):
        for name, percent in STATISTICS.items():
            if prefix:
                result[f"moe_tpot_{name}_ms"] = mean(of(percent))
            change = change_against_best(cell, cells, of(percent))
            key = f"{prefix}vs_best_baseline_{name}"
            result |= {key: change.percent, f"{key}_lo": _known(change.low), f"{key}_hi": _known(change.high)}
    jsq = next(other for other in cells if other.policy == "jsq" and other.is_baseline)
    change = paired_change(cell.per_seed(tpot_ms(99)), jsq.per_seed(tpot_ms(99)))
    result |= {"vs_jsq_p99": change.percent, "vs_jsq_p99_lo": _known(change.low), "vs_jsq_p99_hi": _known(change.high)}
    if cell.sharing.replicas > 1:
        sharing = cell.sharing
        delay_ms = None if sharing.what == "nothing" else 1e3 * sharing.delay_s
        result |= {"replicas": sharing.replicas, "share": sharing.what, "share_delay_ms": delay_ms}
    return result | _of_prompts(cell, jsq) if aggregated else result


def _of_prompts(cell: Cell, jsq: Cell) -> dict[str, Any]:
    """The members of a result that exist only where workers compute prompts. Changes are against jsq."""
    result: dict[str, Any] = {
        "chunk_step_share": float(cell.per_seed(lambda run: run.chunk_step_share).mean()),
        "chunk_time_share": float(cell.per_seed(lambda run: run.chunk_time_share).mean()),
        "prefix_hit_share": float(cell.per_seed(prefix_hit_share).mean()),
    }
    for prefix, of in (("ttft", ttft_ms), ("request", request_ms)):
        for name, percent in STATISTICS.items():
            values, baseline = cell.per_seed(of(percent)), jsq.per_seed(of(percent))
            change, key = paired_change(values, baseline), f"{prefix}_vs_jsq_{name}"
            result |= {f"{prefix}_{name}_ms": float(values.mean()), key: change.percent}
            result |= {f"{key}_lo": _known(change.low), f"{key}_hi": _known(change.high)}
    return result


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def timeline_ms(cell: Cell) -> list[float]:
    """Mean TPOT in ms for each twentieth of the measured arrivals, in order of arrival, over all seeds."""
    parts = [np.array_split(run.tpot_s, TIMELINE_BINS) for run in cell.runs]
    return [1e3 * float(np.concatenate([run[at] for run in parts]).mean()) for at in range(TIMELINE_BINS)]


def recoveries_s(cell: Cell, changes: Sequence[FleetChange]) -> list[float | None]:
    """Mean recovery time over the seeds, in seconds, for each fleet change.

    None if TPOT did not recover in some seed.
    """
    ends = [change.at for change in changes[1:]] + [1.0]
    means = (
        float(cell.per_seed(lambda run, change=change, end=end: recovery_s(run, change, end)).mean())  # type: ignore[misc]
        for change, end in zip(changes, ends, strict=True)
    )
    return [_known(mean) for mean in means]


def as_tables(objects: Sequence[dict[str, Any]], title: str) -> list[Table]:
    """Return tables that fit a terminal of 80 columns, one row per (policy, workers, rate, routers).

    The first has TPOT, the second its change against the best load balancer. For a goodput search the second has the
    change of the rate. Aggregated serving has two more, of the time to the first token.
    """
    absolute = _table(f"{title}\nTPOT in ms", ("workers", "req/s", "p50", "p95", "p99", "mean", "experts", "batch"))
    if "goodput_limit_ms" in objects[0]:
        change = _table("change of req/s against the best load balancer", ("workers", "%"))
    else:
        change = _table(
            "change of TPOT in percent against the best load balancer", ("workers", "p50", "p99", "mean", "MoE mean")
        )
    workers = None
    for row in objects:
        if workers not in (None, row["workers"]):
            absolute.add_section()
            change.add_section()
        workers = row["workers"]
        absolute.add_row(
            _label(row),
            str(workers),
            f"{row['rate']:.4g}",
            *(f"{row[f'tpot_{name}_ms']:.3f}" for name in ("p50", "p95", "p99", "mean")),
            f"{row['active_experts_mean']:.2f}",
            f"{row['batch_mean']:.2f}",
        )
        change.add_row(_label(row), str(workers), *_changes(row))
    return [absolute, change, *_prompt_tables(objects)] if "ttft_p50_ms" in objects[0] else [absolute, change]


def _prompt_tables(objects: Sequence[dict[str, Any]]) -> list[Table]:
    absolute = _table(
        "TTFT in ms; percent of the time in which prompts were computed, and of prompt tokens that were cached",
        ("workers", "p50", "p99", "mean", "computing", "cached"),
    )
    change = _table(
        "change in percent against jsq, of TTFT and of the mean time of a request", ("workers", "p50", "p99", "request")
    )
    for row in objects:
        workers = str(row["workers"])
        shares = (row["chunk_time_share"], row["prefix_hit_share"])
        absolute.add_row(
            _label(row),
            workers,
            *(f"{row[f'ttft_{name}_ms']:.1f}" for name in ("p50", "p99", "mean")),
            *(f"{100 * share:.1f}" for share in shares),
        )
        changes = (("ttft", "p50"), ("ttft", "p99"), ("request", "mean"))
        change.add_row(_label(row), workers, *(_interval(row, f"{prefix}_vs_jsq_{name}") for prefix, name in changes))
    return [absolute, change]


def _label(row: dict[str, Any]) -> str:
    """The policy, and in how many routers it ran if there were several."""
    return f"{row['policy']} x{row['replicas']}" if "replicas" in row else str(row["policy"])


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("policy", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _changes(row: dict[str, Any]) -> list[str]:
    if "goodput_limit_ms" in row:
        return [f"{row['goodput_vs_best_baseline']:+.1f}" + ("" if row["goodput_reached"] else ", trace too short")]
    keys = [f"vs_best_baseline_{name}" for name in STATISTICS]
    return [_interval(row, key) for key in (*keys, "moe_vs_best_baseline_mean")]


def _interval(row: dict[str, Any], key: str) -> str:
    low, high = row[f"{key}_lo"], row[f"{key}_hi"]
    half = "" if low is None else f" ±{(high - low) / 2:.1f}"
    return f"{row[key]:+.1f}{half}"
