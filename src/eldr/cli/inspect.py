"""`eldr inspect`: shows a calibration or a trace."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

SUMMARY = "show the contents of a calibration or a trace"
EXAMPLES = """examples:
  eldr inspect qwen3.eldr.npz
  eldr inspect qwen3.eldr.npz --html calibration.html
  eldr inspect qwen3.eldr.npz --json | jq .rho
  eldr inspect trace.npz --json | jq .prompts

exit codes: 0 success, 2 bad input.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr inspect`."""
    flag = parser.add_argument
    flag("file", type=Path, metavar="FILE", help="file made by `eldr fit` or `eldr record`")
    flag("--json", action="store_true", help="print JSON")
    flag(
        "--html",
        type=Path,
        metavar="OUT",
        help="also write an HTML page with plots of a calibration (needs eldr[report])",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr inspect` and return the exit code."""
    from eldr import trace
    from eldr.errors import EldrError
    from eldr.fileio import NpzError, format_of, reason_of

    try:
        is_trace = format_of(arguments.file) == trace.FORMAT
    except (NpzError, OSError) as error:
        raise EldrError(f"{arguments.file}: {reason_of(error)}") from None
    if is_trace:
        return _trace(arguments)
    return _calibration(arguments)


def _calibration(arguments: argparse.Namespace) -> int:
    from eldr.calibration import load_calibration
    from eldr.report.calibration import calibration_as_json, calibration_page, render_calibration

    calibration = load_calibration(arguments.file)
    if arguments.html is not None:
        calibration_page(calibration, arguments.html)
    _show(arguments, calibration_as_json(calibration), render_calibration(calibration))
    return 0


def _trace(arguments: argparse.Namespace) -> int:
    from eldr.errors import EldrError
    from eldr.report.trace import render_trace, trace_as_json
    from eldr.trace import read_trace

    trace = read_trace(arguments.file)
    if arguments.html is not None:
        raise EldrError(f"{arguments.file} is a trace; --html draws a calibration, which `eldr fit` makes of it")
    _show(arguments, trace_as_json(trace), render_trace(trace))
    return 0


def _show(arguments: argparse.Namespace, values: dict[str, Any], rendered: RenderableType) -> None:
    from rich.console import Console

    if arguments.json:
        print(json.dumps(values, indent=2))
    else:
        Console().print(rendered)
