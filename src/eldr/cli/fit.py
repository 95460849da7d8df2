"""`eldr fit`: fits a calibration to a trace."""

from __future__ import annotations

import argparse
from pathlib import Path

from eldr.cli.arguments import positive

SUMMARY = "fit signatures and zones to a recorded trace"
EXAMPLES = """examples:
  eldr fit trace.npz --workers 16 -o qwen3.eldr.npz
  eldr serve --config eldr.toml --policy locality-band --calibration qwen3.eldr.npz

The calibration is one file with everything that `eldr serve` needs to route on experts. Record the trace with traffic
like that of the fleet.

exit codes: 0 success, 2 bad input.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr fit`."""
    flag = parser.add_argument
    flag("trace", type=Path, metavar="TRACE.npz", help="file made by `eldr record`")
    flag("--workers", required=True, type=positive, metavar="K", help="number of decode workers; each gets one zone")
    flag("--seed", type=int, default=0, metavar="N", help="seed of the fit (0)")
    flag("--transform", default="count_idf", metavar="NAME", help="count_idf, count, sqrt_count or binary (count_idf)")
    flag("-o", "--output", required=True, type=Path, metavar="FILE", help="the calibration file to write")


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr fit` and return the exit code."""
    from rich.console import Console

    from eldr.calibration import fit_calibration
    from eldr.report.calibration import render_calibration
    from eldr.trace import read_trace

    console = Console()
    with console.status("fitting") as status:
        calibration = fit_calibration(
            read_trace(arguments.trace),
            arguments.workers,
            seed=arguments.seed,
            transform=arguments.transform,
            progress=status.update,
        )
    calibration.save(arguments.output)
    console.print(render_calibration(calibration))
    return 0
