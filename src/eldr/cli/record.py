"""`eldr record`: prompts to a trace."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eldr.cli.arguments import positive, read_key_file
from eldr.cli.exit_codes import EXIT_FAILED

SUMMARY = "record the experts that prompts use"
EXAMPLES = """examples:
  eldr record prompts.jsonl --url http://p0:8100 -o trace.npz
  eldr record prompts.txt --url http://router:8000 --admin-key-file admin.key -o trace.npz

A line of prompts.jsonl: {"prompt": "def fib(n):", "label": "code"}, or {"messages": [...], "label": "chat"}.
exit codes: 0 all recorded, 1 some prompts failed and the trace holds the others, 2 nothing was recorded.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr record`."""
    flag = parser.add_argument
    flag("prompts", type=Path, metavar="PROMPTS", help=".jsonl or .txt file")
    flag("--url", required=True, help="a worker with the eldr connector, or a router")
    flag("-o", "--output", required=True, type=Path, metavar="TRACE.npz")
    flag("--model", help="model name (default: the only one the server has)")
    flag("--max-tokens", type=positive, default=128, metavar="N", help="generated tokens a prompt (128)")
    flag("--temperature", type=float, default=0.0)
    flag("--concurrency", type=positive, default=8, metavar="N", help="prompts in flight (8)")
    flag("--timeout", type=float, default=600.0, dest="timeout_s", metavar="SECONDS", help="limit a prompt (600)")
    flag("--api-key-file", type=Path, metavar="FILE", help="the worker's API key")
    flag("--admin-key-file", type=Path, metavar="FILE", help="the router's admin key; its presence means a router")


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr record`; returns the exit code."""
    from rich.progress import Progress

    from eldr.record import RecordOptions, read_prompts, record
    from eldr.trace import write_trace

    prompts = read_prompts(arguments.prompts)
    options = RecordOptions(
        url=arguments.url,
        model=arguments.model,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        concurrency=arguments.concurrency,
        timeout_s=arguments.timeout_s,
        api_key=read_key_file(arguments.api_key_file),
        admin_key=read_key_file(arguments.admin_key_file),
    )
    with Progress(transient=True) as progress:
        task = progress.add_task("recording", total=len(prompts))
        recording = record(prompts, options, lambda: progress.advance(task))
    write_trace(recording.trace, arguments.output)
    for failure in recording.failures[:5]:
        print(f"eldr: {failure}", file=sys.stderr)
    print(f"{arguments.output}: {len(prompts) - len(recording.failures)} of {len(prompts)} prompts recorded")
    return EXIT_FAILED if recording.failures else 0
