"""`eldr report`: turns result files into a page."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "turn result files into one HTML page"
EXAMPLES = """examples:
  eldr report replay.json -o report.html
  eldr report docs/evaluation/results.json qwen3.cost.json calibration.eldr.npz build/demo/summary.json -o report.html

A file can be a result of `eldr evaluate`, `eldr replay --json` or `eldr load --json`, a cost file, a calibration, or
the summary of a demo. Its content tells which. Sections appear in the order of the files.

exit codes: 0 success, 2 bad input.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr report`."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="result files")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.html", help="the page to write")
    parser.add_argument("--title", default="eldr: results", help="title of the page (eldr: results)")


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr report` and return the exit code."""
    from eldr.report.html import page, write_page
    from eldr.report.inputs import ReportError, blocks_of

    blocks = [block for path in arguments.files for block in blocks_of(path)]
    names = ", ".join(path.name for path in arguments.files)
    try:
        write_page(page(arguments.title, names, *blocks), arguments.output)
    except OSError as error:
        raise ReportError(f"{arguments.output}: cannot be written: {error.strerror or error}") from None
    print(f"{arguments.output}: written")
    return 0
