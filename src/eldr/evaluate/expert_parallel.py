"""Expert parallelism inside the workers: what is left of the gain by ranks, placement, and choice of replica."""

from __future__ import annotations

import dataclasses

from eldr.evaluate.bench import MAIN_BATCH, Bench, Experiment, Part, Row, run_cell
from eldr.evaluate.prompt_signatures import against, against_jsq
from eldr.replay.experiment import Cell, Laboratory
from eldr.replay.output import tpot_ms
from eldr.replay.ranks import ExpertParallel

RANKS = (4, 8)
WORKERS = 8
# The share of the experts that have a redundant copy.
REDUNDANT = 0.25
POLICIES = ("jsq", "locality-band", "expected-union")
# Every layout, without the number of redundant experts, and whether it has some. The first one is what others are
# compared with.
LAYOUTS: tuple[tuple[ExpertParallel, bool], ...] = (
    (ExpertParallel(), False),
    (ExpertParallel("eplb"), False),
    (ExpertParallel("eplb", "worker"), False),
    (ExpertParallel("union-aware"), False),
    (ExpertParallel("union-aware", "worker"), False),
    (ExpertParallel("eplb", replica="random"), True),
    (ExpertParallel("eplb", replica="lp"), True),
    (ExpertParallel("eplb", replica="fewest"), True),
    (ExpertParallel("eplb", "worker", replica="fewest"), True),
)


def _parts(bench: Bench) -> list[Part]:
    """One part for each number of ranks that the experts can be divided over."""
    return [{"ranks": ranks} for ranks in RANKS if bench.trace.meta.experts % ranks == 0]


def _run(bench: Bench, part: Part) -> list[Row]:
    """One row per layout and policy. Changes are against jsq with the same layout, and against it with the first."""
    ranks, workers = part["ranks"], min(WORKERS, bench.workers)
    redundant = max(1, round(REDUNDANT * bench.trace.meta.experts / ranks)) * ranks
    plain = _laboratory(bench, ranks, LAYOUTS[0][0])
    rate = plain.rate_for_batch(MAIN_BATCH, workers)
    first: Cell | None = None
    rows: list[Row] = []
    for layout, has_copies in LAYOUTS:
        how = dataclasses.replace(layout, redundant=redundant if has_copies else 0)
        laboratory = _laboratory(bench, ranks, how)
        jsq, *others = [
            run_cell(laboratory, policy, workers, rate, MAIN_BATCH, bench.fewer_seeds) for policy in POLICIES
        ]
        first = first or jsq
        shared: Row = {"ranks": ranks, **dataclasses.asdict(how), "workers": workers, "batch_target": MAIN_BATCH}
        for cell in (jsq, *others):
            row = {"policy": cell.policy, **shared, "rate": rate, "seeds": bench.fewer_seeds, **against_jsq(cell, jsq)}
            row |= against(cell, first, tpot_ms(None), "vs_contiguous_mean")
            row["expert_reads_mean"] = float(cell.per_seed(lambda run: run.expert_reads_mean).mean())
            rows.append(row)
    return rows


def _laboratory(bench: Bench, ranks: int, how: ExpertParallel) -> Laboratory:
    """MoE layers alone: this is what ranks share."""
    settings = bench.laboratory.settings
    options = dataclasses.replace(settings.options, cost_scope="moe", expert_parallel=ranks)
    requests = max(1, bench.requests // 2)
    return bench.laboratory.with_settings(dataclasses.replace(settings, requests=requests, options=options, ranks=how))


EXPERT_PARALLEL = Experiment("expert-parallel", _parts, _run)
