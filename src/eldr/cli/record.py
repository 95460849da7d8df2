"""`eldr record`: records prompts to a trace."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from eldr.cli.arguments import positive, read_key_file
from eldr.cli.exit_codes import EXIT_FAILED

SUMMARY = "send prompts to a worker or a router and record the experts that they use"
EXAMPLES = """examples:
  eldr record prompts.jsonl --url http://p0:8100 -o trace.npz
  eldr record prompts.txt --url http://router:8000 --admin-key-file admin.key -o trace.npz

PROMPTS is a .txt file with one prompt per line, or a .jsonl file with one object per line:
  {"prompt": "def fib(n):", "label": "code"}
  {"messages": [{"role": "user", "content": "Hello"}], "label": "chat"}

exit codes: 0 all prompts were recorded, 1 some failed and the trace has the others, 2 nothing was recorded.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr record`."""
    flag = parser.add_argument
    flag("prompts", type=Path, metavar="PROMPTS", help=".jsonl or .txt file with the prompts")
    flag("--url", required=True, help="a worker with the eldr connector, or a router")
    flag("-o", "--output", required=True, type=Path, metavar="TRACE.npz", help="the trace file to write")
    flag("--model", help="model name (the server's only model)")
    flag("--max-tokens", type=positive, default=128, metavar="N", help="generated tokens per prompt, at most (128)")
    flag("--temperature", type=float, default=0.0, metavar="T", help="sampling temperature (0.0)")
    flag("--concurrency", type=positive, default=8, metavar="N", help="prompts in flight at a time (8)")
    flag("--timeout", type=float, default=600.0, dest="timeout_s", metavar="SECONDS", help="limit per prompt (600)")
    flag("--api-key-file", type=Path, metavar="FILE", help="file with the worker's API key")
    flag("--admin-key-file", type=Path, metavar="FILE", help="file with the admin key, if --url is a router")


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr record` and return the exit code."""
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
