"""Runs experiments in several processes and keeps finished parts, so that an interrupted evaluation can continue."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import eldr
from eldr.errors import EldrError
from eldr.evaluate import (
    ablations,
    aggregated,
    comparisons,
    drift,
    expert_parallel,
    host_memory,
    named,
    overhead,
    predictors,
    prompt_costs,
    prompt_signatures,
    prompt_texts,
    recordings,
    scaling,
    unequal,
)
from eldr.evaluate.bench import Bench, EvaluationError, Experiment, Part, Row
from eldr.evaluate.results import Results, TraceResults, rounded
from eldr.fileio import write_atomically

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        comparisons.MAIN,
        comparisons.LOAD,
        comparisons.GOODPUT,
        comparisons.KNOB,
        comparisons.POOL,
        ablations.ABLATION,
        drift.DRIFT,
        named.NAMED,
        recordings.CORRELATION,
        recordings.KINDS,
        recordings.SIGNATURES,
        predictors.PREDICTORS,
        prompt_signatures.BY_SIGNATURE,
        prompt_signatures.LEARNING,
        prompt_signatures.CHANGE,
        prompt_texts.TEXTS,
        aggregated.AGGREGATED,
        expert_parallel.EXPERT_PARALLEL,
        scaling.SCALING,
        host_memory.HOST_MEMORY,
        unequal.UNEQUAL,
        prompt_costs.PROMPT_COSTS,
        overhead.DECISIONS_TIME,
        overhead.MEMORY,
        overhead.CAPTURE,
    )
}
# A kept part is valid while the code that made it is unchanged: the experiment's own, and everything that it runs.
CODE_LEFT_OUT = ("report", "router", "demo", "engines", "load", "evaluate")


@dataclass(frozen=True, slots=True)
class Plan:
    """What to evaluate, and how.

    traces: the trace files.
    keep: the folder of finished parts.
    only: names of experiments. Empty for all.
    seeds, requests, torch_python: see `Bench`.
    processes: worker processes.
    """

    traces: tuple[Path, ...]
    keep: Path
    only: tuple[str, ...] = ()
    seeds: int = 10
    requests: int = 2000
    processes: int = 2
    torch_python: Path | None = None

    def bench(self, trace: Path) -> Bench:
        return Bench(trace, self.seeds, self.requests, self.torch_python)

    def wants(self, name: str) -> bool:
        return not self.only or name in self.only


@dataclass(frozen=True, slots=True)
class _Work:
    trace: Path
    experiment: str
    part: Part
    kept: Path


def evaluate(plan: Plan, progress: Callable[[int, int, str], None]) -> Results:
    """Run the parts that are not kept yet, and gather all results.

    progress: called with the number of parts done, the number of all parts, and the name of the last one.
    Raises EvaluationError for an unknown experiment, TraceError for an unusable trace.
    """
    for name in plan.only:
        if name not in EXPERIMENTS:
            raise EvaluationError(f"there is no experiment {name!r}; choose from {', '.join(EXPERIMENTS)}")
    benches = {trace: plan.bench(trace) for trace in plan.traces}
    work = list(_work(plan, benches))
    missing = [item for item in work if not item.kept.exists()]
    done = len(work) - len(missing)
    progress(done, len(work), "")
    # Start the longest parts first, so that no process is left alone with one at the end.
    with ProcessPoolExecutor(plan.processes, initializer=_one_thread) as pool:
        running = {pool.submit(_run, plan, item): item for item in missing}
        for future in as_completed(running):
            future.result()
            done += 1
            progress(done, len(work), f"{running[future].experiment}, {running[future].trace.name}")
    return _gather(plan, benches, work)


def _one_thread() -> None:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"


def _work(plan: Plan, benches: dict[Path, Bench]) -> Iterable[_Work]:
    for number, (trace, bench) in enumerate(benches.items()):
        for name, experiment in EXPERIMENTS.items():
            if not plan.wants(name) or (experiment.once and number):
                continue
            code = _code_digest(experiment)
            for part in experiment.parts(bench):
                setting = [
                    bench.trace.sha256,
                    name,
                    part,
                    plan.seeds,
                    plan.requests,
                    plan.torch_python is not None,
                    code,
                ]
                digest = hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:16]
                yield _Work(trace, name, part, plan.keep / f"{name}-{digest}.json")


def _code_digest(experiment: Experiment) -> str:
    own = {inspect.getsourcefile(experiment.run), inspect.getsourcefile(Bench)}
    digest = hashlib.sha256(_common_code())
    for path in sorted(path for path in own if path is not None):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


@functools.cache
def _common_code() -> bytes:
    root = Path(eldr.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] not in CODE_LEFT_OUT and not path.name.endswith("cli.py"):
            digest.update(path.read_bytes())
    return digest.digest()


# The benches of this process. A trace is read, packed and fitted once, not once per part.
_benches: dict[Path, Bench] = {}


def _run(plan: Plan, work: _Work) -> None:
    if work.trace not in _benches:
        _benches[work.trace] = plan.bench(work.trace)
    kept: dict[str, Any] = {"rows": [], "skipped": None}
    try:
        kept["rows"] = rounded(EXPERIMENTS[work.experiment].run(_benches[work.trace], work.part))
    except EldrError as error:  # this trace does not allow it, and the report says so
        kept["skipped"] = str(error)
    work.kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(work.kept, lambda file: file.write(json.dumps(kept).encode()))


def _gather(plan: Plan, benches: dict[Path, Bench], work: list[_Work]) -> Results:
    traces = {trace: TraceResults(about(bench), {}, {}) for trace, bench in benches.items()}
    common: dict[str, list[Row]] = {}
    for item in work:
        kept = json.loads(item.kept.read_bytes())
        rows = common if EXPERIMENTS[item.experiment].once else traces[item.trace].experiments
        rows.setdefault(item.experiment, []).extend(kept["rows"])
        if kept["skipped"]:
            traces[item.trace].skipped[item.experiment] = kept["skipped"]
    made = {"version": eldr.__version__, "seeds": plan.seeds, "requests": plan.requests}
    return Results(made, list(traces.values()), common)


def about(bench: Bench) -> dict[str, Any]:
    """Describe a trace."""
    trace = bench.trace
    steps = np.diff(trace.decode_offsets)
    kinds, counts = np.unique(trace.label, return_counts=True)
    order = np.argsort(-counts)
    cost = bench.laboratory.settings.options.cost
    return {
        "name": bench.path.stem,
        "model": trace.meta.model,
        "layers": trace.meta.layers,
        "experts": trace.meta.experts,
        "top_k": trace.meta.top_k,
        "requests": trace.requests,
        "kinds": {str(kinds[at]) or "no label": int(counts[at]) for at in order},
        "prompt_tokens_p50": float(np.median(trace.prompt_tokens)),
        "decode_steps_p50": float(np.median(steps)),
        "note": trace.meta.note,
        "sha256": trace.sha256,
        "cost": cost.name,
        "cost_source": cost.source,
        "in_flight_at_most": bench.capacity,
    }
