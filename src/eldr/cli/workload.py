"""`eldr workload`: lists the named workloads and writes prompts for them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

SUMMARY = "list the named workloads, or write prompts for one"
EXAMPLES = """examples:
  eldr workload list
  eldr workload prompts task --count 400 -o task.jsonl      # for `eldr record`
  eldr load http://router:8000 --workload task --rate 20    # see `eldr load --help`
  eldr replay trace.npz --workload language --workers 16

exit codes: 0 success, 2 bad input.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr workload`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|prompts")
    listing = actions.add_parser("list", help="list the workloads with their kinds, shares and lengths")
    listing.add_argument("--json", action="store_true", help="print JSON")
    prompts = actions.add_parser("prompts", help="write built-in prompts for a workload to a .jsonl file")
    prompts.add_argument("workload", metavar="NAME", help="named workload, see `eldr workload list`")
    prompts.add_argument("--count", type=int, default=400, metavar="N", help="number of prompts (400)")
    prompts.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the prompts (0)")
    prompts.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.jsonl", help="the file to write")


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr workload` and return the exit code."""
    return _list(arguments) if arguments.action == "list" else _prompts(arguments)


def _list(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from eldr.workloads.presets import WORKLOADS

    if arguments.json:
        print(json.dumps([asdict(preset) for preset in WORKLOADS.values()], indent=2))
        return 0
    console = Console()
    for preset in WORKLOADS.values():
        title = f"{preset.name}: {preset.summary}; {preset.output_tokens} generated tokens"
        table = Table(title=title, title_justify="left")
        for column in ("kind", "share", "prompt tokens, median", "10 % to 90 %", "labels in traces and prompt files"):
            table.add_column(column, justify="left" if column == "kind" or "labels" in column else "right")
        for kind in preset.kinds:
            low, high = kind.prompt_tokens_at(0.1), kind.prompt_tokens_at(0.9)
            labels = ", ".join((kind.name, *kind.labels))
            table.add_row(
                kind.name, f"{kind.share:.0%}", f"{kind.median_prompt_tokens:g}", f"{low:.0f} to {high:.0f}", labels
            )
        console.print(table)
    return 0


def _prompts(arguments: argparse.Namespace) -> int:
    from eldr.fileio import write_atomically
    from eldr.workloads.presets import WorkloadError, find_workload
    from eldr.workloads.prompts import built_in_prompts

    if arguments.count < 1:
        raise WorkloadError(f"--count is {arguments.count}, expected a number of at least 1")
    prompts = built_in_prompts(find_workload(arguments.workload), arguments.count, seed=arguments.seed)
    lines = "".join(json.dumps({"prompt": p.text, "label": p.kind}, ensure_ascii=False) + "\n" for p in prompts)
    try:
        write_atomically(arguments.output, lambda file: file.write(lines.encode()))
    except OSError as error:
        raise WorkloadError(f"{arguments.output}: cannot be written: {error.strerror or error}") from None
    print(f"{arguments.output}: {len(prompts)} prompts")
    return 0
