"""`eldr load`: sends a workload to a server and prints the measurements."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eldr.cli.arguments import read_key_file
from eldr.cli.json_output import write_json

if TYPE_CHECKING:
    from eldr.load.client import Target
    from eldr.load.outcome import Outcome
    from eldr.workloads.presets import WorkloadPreset
    from eldr.workloads.prompt import Prompt

SUMMARY = "send a named workload to a router or a worker and measure TTFT, TPOT and ITL"
EXAMPLES = """examples:
  eldr load http://router:8000 --workload task --rate 20 --requests 500
  eldr load http://router:8000 --workload language --prompts wildchat/ --rate 60 --requests 5000 --json result.json
  eldr load http://127.0.0.1:8000 --workload task --in-flight 8 --requests 40 --max-tokens 64 --max-prompt-chars 300

--prompts takes a .jsonl file with one {"prompt": ..., "label": ...} object per line, or a folder of .jsonl and .txt
files named after their label. Without it, built-in templates are used. They have a workload's lengths but not its
variety.

exit codes: 0 every request succeeded, 1 some failed, 2 nothing was sent.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr load`."""
    flag = parser.add_argument
    flag("url", help="address of a router, or of any server with the OpenAI completions API")
    flag("--workload", default="task", metavar="NAME", help="named workload, see `eldr workload list` (task)")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--rate", type=float, metavar="R", help="open loop: requests per second, as a Poisson process")
    pace.add_argument("--in-flight", type=int, metavar="N", help="closed loop: requests in flight at all times (8)")
    flag("--requests", type=int, default=200, metavar="N", help="requests to send (200)")
    flag("--prompts", type=Path, metavar="FILE|DIR", help="send these prompts instead of the built-in ones")
    flag("--kind", action="append", default=[], metavar="KIND=LABEL[,LABEL...]",
         help="with --prompts: the labels that belong to this kind (repeatable)")  # fmt: skip
    flag("--max-tokens", type=int, metavar="T", help="generated tokens per request (as the workload says)")
    flag("--max-prompt-chars", type=int, metavar="C", help="cut prompts to C characters, for short contexts")
    flag("--stop-at-eos", action="store_true",
         help="let the model end a request; otherwise all have the same length")  # fmt: skip
    flag("--model", help="model name (the server's only model)")
    flag("--api-key-file", type=Path, metavar="FILE", help="file with the server's API key")
    flag("--timeout", type=float, default=600.0, dest="timeout_s", metavar="SECONDS", help="limit per request (600)")
    flag("--seed", type=int, default=0, metavar="N", help="seed of prompts and arrival times (0)")
    flag("--json", metavar="FILE|-", help="write the figures as JSON to a file, or to standard output (-)")


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr load` and return the exit code."""
    import asyncio

    from rich.console import Console
    from rich.progress import Progress

    from eldr.load.client import run_closed, run_open
    from eldr.load.request import Request
    from eldr.load.summary import as_table, summarise
    from eldr.workloads.presets import WorkloadError, arrivals, find_workload

    _check(arguments)
    preset = find_workload(arguments.workload)
    texts = _prompts(arguments, preset)
    requests = [Request(at, prompt, arguments.max_tokens or preset.output_tokens) for at, prompt in enumerate(texts)]
    target = _target(arguments)
    outcomes: list[Outcome] = []
    times = [] if arguments.rate is None else arrivals(arguments.rate, len(requests), seed=arguments.seed).tolist()
    late_s: list[float] = []
    console = Console(stderr=arguments.json == "-")
    begin = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("streaming", total=len(requests))

        def heard(outcome: Outcome) -> None:
            outcomes.append(outcome)
            progress.advance(task)

        if arguments.rate is None:
            asyncio.run(run_closed(target, requests, arguments.in_flight or 8, heard))
        else:
            started_s = asyncio.run(run_open(target, requests, times, heard))
            late_s = [outcome.sent_s - started_s - times[outcome.number] for outcome in outcomes]
    summary = {
        "workload": preset.name,
        "rate": arguments.rate,
        "in_flight": None if arguments.rate is not None else arguments.in_flight or 8,
        "max_tokens": arguments.max_tokens or preset.output_tokens,
        "prompts": "built in" if arguments.prompts is None else str(arguments.prompts),
        "seed": arguments.seed,
        **summarise(outcomes, time.monotonic() - begin),
        # How late this client sent its requests. This delay is part of what it measured.
        "sent_late_p99_ms": _p99_ms(late_s),
    }
    title = f"{preset.name}: {summary['requests'] - summary['errors']} of {summary['requests']} succeeded, "
    console.print(as_table(summary, f"{title}{summary['tokens_per_s']:.0f} tokens/s"))
    for example in summary["error_examples"]:
        console.print(f"{example['count']} x {example['error']}", style="red", markup=False)
    write_json(arguments.json, summary, "figures", WorkloadError)
    return 1 if summary["errors"] else 0


def _check(arguments: argparse.Namespace) -> None:
    from eldr.workloads.presets import WorkloadError

    for name in ("requests", "in_flight", "max_tokens", "max_prompt_chars"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise WorkloadError(f"--{name.replace('_', '-')} is {value}, expected a number of at least 1")
    if arguments.rate is not None and not 0 < arguments.rate < float("inf"):
        raise WorkloadError(f"--rate is {arguments.rate}, expected a positive number of requests per second")


def _prompts(arguments: argparse.Namespace, preset: WorkloadPreset) -> list[Prompt]:
    from eldr.workloads.presets import kinds_of
    from eldr.workloads.prompt import Prompt
    from eldr.workloads.prompts import built_in_prompts, prompts_from

    count, seed = arguments.requests, arguments.seed
    if arguments.prompts is None:
        prompts = built_in_prompts(preset, count, seed=seed)
    else:
        prompts = prompts_from(arguments.prompts, preset, count, seed=seed, given=kinds_of(arguments.kind))
    return [Prompt(prompt.kind, prompt.text[: arguments.max_prompt_chars]) for prompt in prompts]


def _target(arguments: argparse.Namespace) -> Target:
    import secrets

    from eldr.load.client import Target
    from eldr.record import RecordOptions, only_model

    url = arguments.url.rstrip("/").removesuffix("/v1")
    key = read_key_file(arguments.api_key_file)
    model = arguments.model or only_model(RecordOptions(url=url, api_key=key))
    run_name = f"load-{secrets.token_hex(4)}"  # a run with a new name hits no cached prefixes of earlier runs
    return Target(url, model, run_name, not arguments.stop_at_eos, key, arguments.timeout_s)


def _p99_ms(late_s: Sequence[float]) -> float | None:
    from eldr.load.outcome import percentile_ms

    return percentile_ms(late_s, 99)
