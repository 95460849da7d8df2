"""`eldr evaluate`: runs the experiments and writes the results to a folder."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUMMARY = "run every experiment on recorded traces; write pictures, tables and an HTML page"
EXAMPLES = """examples:
  eldr evaluate trace.npz -o build/evaluation
  eldr evaluate a.npz b.npz -o docs/evaluation --torch-python .envs/vllm-0.32/bin/python
  eldr evaluate trace.npz -o build/evaluation --only main,drift --seeds 4

Finished parts are kept in build/evaluate, so an interrupted evaluation continues where it stopped. A part is reused
only if its trace and code have not changed.

exit codes: 0 success, 2 bad input.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr evaluate`."""
    flag = parser.add_argument
    flag("traces", type=Path, nargs="+", metavar="TRACE.npz", help="files made by `eldr record`")
    flag("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the report and results.json")
    flag("--only", type=_words, default=(), metavar="A,B", help="run only these experiments (all)")
    flag("--seeds", type=int, default=10, metavar="S", help="paired runs of the main comparison; others run half (10)")
    flag("--requests", type=int, default=2000, metavar="N", help="measured requests per run (2000)")
    flag("--processes", type=int, default=2, metavar="N", help="worker processes (2)")
    flag("--keep", type=Path, default=Path("build/evaluate"), metavar="DIR",
         help="folder of finished parts (build/evaluate)")  # fmt: skip
    flag("--torch-python", type=Path, metavar="PATH",
         help="Python with PyTorch, to time the connector's table of counts")  # fmt: skip
    flag("--no-report", action="store_true", help="compute and keep the parts, but write no results")


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr evaluate` and return the exit code."""
    from eldr.evaluate.bench import EvaluationError
    from eldr.evaluate.run import Plan, evaluate

    if min(arguments.seeds, arguments.requests, arguments.processes) < 1 or arguments.seeds < 2:
        raise EvaluationError("at least two seeds, one request and one process are needed")
    python = arguments.torch_python
    plan = Plan(
        traces=tuple(arguments.traces),
        keep=arguments.keep,
        only=arguments.only,
        seeds=arguments.seeds,
        requests=arguments.requests,
        processes=arguments.processes,
        torch_python=python.absolute() if python is not None and python.exists() else None,
    )
    begin = time.monotonic()
    with _progress() as progress:
        results = evaluate(plan, progress)
    print(f"experiments: {time.monotonic() - begin:.0f} s")
    if arguments.no_report:
        return 0
    from eldr.evaluate.results import write_results
    from eldr.report.evaluation import write_evaluation

    arguments.output.mkdir(parents=True, exist_ok=True)
    write_results(results, arguments.output / "results.json")
    write_evaluation(results, arguments.output)
    print(f"{arguments.output}: report.html, README.md, results.json and pictures written")
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[last]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=None, last="")

        def tell(done: int, total: int, last: str) -> None:
            progress.update(task, completed=done, total=total, last=last)

        yield tell


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())
