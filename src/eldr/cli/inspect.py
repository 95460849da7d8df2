"""`eldr inspect`: shows a calibration."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SUMMARY = "show the contents of a calibration file"
EXAMPLES = """examples:
  eldr inspect qwen3.eldr.npz
  eldr inspect qwen3.eldr.npz --html calibration.html
  eldr inspect qwen3.eldr.npz --json | jq .rho

exit codes: 0 success, 2 bad input.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr inspect`."""
    flag = parser.add_argument
    flag("calibration", type=Path, metavar="FILE", help="file made by `eldr fit`")
    flag("--json", action="store_true", help="print JSON")
    flag("--html", type=Path, metavar="OUT", help="also write an HTML page with plots (needs eldr[report])")


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr inspect` and return the exit code."""
    from rich.console import Console

    from eldr.calibration import load_calibration
    from eldr.report.calibration import calibration_as_json, calibration_page, render_calibration

    calibration = load_calibration(arguments.calibration)
    if arguments.html is not None:
        calibration_page(calibration, arguments.html)
    if arguments.json:
        print(json.dumps(calibration_as_json(calibration), indent=2))
    else:
        Console().print(render_calibration(calibration))
    return 0
