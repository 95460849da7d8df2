"""The command line: parses arguments, calls a room of the house, prints. Rooms are imported when they are needed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eldr
import eldr.cost_cli
import eldr.evaluate.cli
import eldr.load.cli
import eldr.policies.flags
import eldr.replay.cli
import eldr.replay.decisions_cli
import eldr.report.cli
import eldr.workloads.cli
from eldr.errors import EldrError

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

SERVE_EXAMPLES = """examples:
  eldr serve --prefill http://p0:8100 --decode http://d0:8200 --decode http://d1:8200 --policy jsq
  eldr serve --config eldr.toml
  eldr serve --prefill http://p0:8100 --decode http://d0:8200 --decode http://d1:8200 \\
      --policy locality-band --calibration qwen3.eldr.npz --max-inflight 128
  eldr serve --prefill http://p0:8100 --decode http://h100:8200 --decode http://a100:8200 \\
      --policy expected-union --cost h100.cost.json --worker-cost http://a100:8200=a100.cost.json --cost-scope moe
"""
RECORD_EXAMPLES = """examples:
  eldr record prompts.jsonl --url http://p0:8100 -o trace.npz
  eldr record prompts.txt --url http://router:8000 --admin-key-file admin.key -o trace.npz

A line of prompts.jsonl: {"prompt": "def fib(n):", "label": "code"}, or {"messages": [...], "label": "chat"}.
exit codes: 0 all recorded, 1 some prompts failed and the trace holds the others, 2 nothing was recorded.
"""
FIT_EXAMPLES = """examples:
  eldr fit trace.npz --workers 16 -o qwen3.eldr.npz
"""
INSPECT_EXAMPLES = """examples:
  eldr inspect qwen3.eldr.npz
  eldr inspect qwen3.eldr.npz --html calibration.html
  eldr inspect qwen3.eldr.npz --json | jq .rho
"""
DEMO_EXAMPLES = """examples:
  make demo
  eldr demo --vllm-python .envs/vllm-0.32/bin/python --policies jsq,p2c,locality-band
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        code = command(arguments)
        sys.stdout.flush()
        return code
    except EldrError as error:
        print(f"eldr: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("eldr"):
            raise
        print(f"eldr: the package {error.name} is missing; install {arguments.extra}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has gone, as `| head` does: not a failure. Nothing more may be flushed to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eldr", description=eldr.__doc__)
    parser.add_argument("--version", action="version", version=f"eldr {eldr.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        _add_serve,
        _add_record,
        _add_fit,
        _add_inspect,
        _add_replay,
        _add_decisions,
        _add_evaluate,
        _add_report,
        _add_workload,
        _add_load,
        _add_calibrate_cost,
        _add_demo,
    ):
        add(commands)
    return parser


def _add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], extra: str, summary: str, examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run, extra=f"eldr[{extra}]")
    return parser


def _add_serve(commands: Any) -> None:
    parser = _add_command(commands, "serve", _serve, "router", "route requests to a P/D fleet", SERVE_EXAMPLES)
    # Flags have no default of their own, so that only what was given overrides the configuration file.
    unset = argparse.SUPPRESS
    flag = parser.add_argument
    flag("--config", type=Path, metavar="FILE", help="TOML file with the same settings; flags override it")
    flag("--prefill", action="append", default=unset, metavar="URL", help="a prefill worker (repeatable)")
    flag("--decode", action="append", default=unset, metavar="URL", help="a decode worker (repeatable)")
    flag(
        "--policy",
        default=unset,
        metavar="NAME",
        help="decode policy: rr, random, p2c, jsq, domain, locality-band, expected-union",
    )
    flag("--calibration", type=Path, default=unset, metavar="FILE", help="file made by `eldr fit`")
    flag("--seed", type=int, default=unset, help="of random choices and ties (0)")
    flag("--decision-log", type=Path, default=unset, metavar="FILE",
         help="append every decision to this file, for `eldr decisions`; reopened on SIGHUP")  # fmt: skip
    flag("--host", default=unset, help="address to listen on (127.0.0.1)")
    flag("--port", type=int, default=unset, help="port to listen on (8000)")
    flag("--max-inflight", type=int, default=unset, metavar="N", help="requests a decode worker runs at once")
    flag("--api-key-file", type=Path, default=unset, metavar="FILE", help="keys that clients must have, one a line")
    flag("--tls-cert", type=Path, default=unset, metavar="FILE", help="certificate chain shown to clients, PEM")
    flag("--tls-key", type=Path, default=unset, metavar="FILE", help="its private key, PEM")
    flag("--worker-ca", type=Path, default=unset, metavar="FILE", help="certificates to check https workers against")
    flag("--worker-api-key-file", type=Path, default=unset, metavar="FILE", help="API key of the workers")
    flag("--admin-key-file", type=Path, default=unset, metavar="FILE", help="key of recording and the admin API")
    flag("--admin-listen", default=unset, metavar="HOST:PORT", help="serve the admin API there; needs the admin key")
    flag("--otel-endpoint", default=unset, metavar="URL", help="collector of traces, OTLP over HTTP (off)")
    flag("--otel-sampling", type=float, default=unset, metavar="SHARE", help="share of requests traced (0.01)")
    flag("--log-level", default=unset, choices=["debug", "info", "warning", "error"])
    eldr.policies.flags.add_option_flags(parser)


def _serve(arguments: argparse.Namespace) -> int:
    from eldr.router.process import serve

    given = {name: value for name, value in vars(arguments).items() if name not in ("command", "extra", "config")}
    serve(arguments.config, given)
    return 0


def _add_record(commands: Any) -> None:
    parser = _add_command(commands, "record", _record, "fit", "record the experts that prompts use", RECORD_EXAMPLES)
    flag = parser.add_argument
    flag("prompts", type=Path, metavar="PROMPTS", help=".jsonl or .txt file")
    flag("--url", required=True, help="a worker with the eldr connector, or a router")
    flag("-o", "--output", required=True, type=Path, metavar="TRACE.npz")
    flag("--model", help="model name (default: the only one the server has)")
    flag("--max-tokens", type=_positive, default=128, metavar="N", help="generated tokens a prompt (128)")
    flag("--temperature", type=float, default=0.0)
    flag("--concurrency", type=_positive, default=8, metavar="N", help="prompts in flight (8)")
    flag("--timeout", type=float, default=600.0, dest="timeout_s", metavar="SECONDS", help="limit a prompt (600)")
    flag("--api-key-file", type=Path, metavar="FILE", help="the worker's API key")
    flag("--admin-key-file", type=Path, metavar="FILE", help="the router's admin key; its presence means a router")


def _record(arguments: argparse.Namespace) -> int:
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
        api_key=_read_key(arguments.api_key_file),
        admin_key=_read_key(arguments.admin_key_file),
    )
    with Progress(transient=True) as progress:
        task = progress.add_task("recording", total=len(prompts))
        recording = record(prompts, options, lambda: progress.advance(task))
    write_trace(recording.trace, arguments.output)
    for failure in recording.failures[:5]:
        print(f"eldr: {failure}", file=sys.stderr)
    print(f"{arguments.output}: {len(prompts) - len(recording.failures)} of {len(prompts)} prompts recorded")
    return EXIT_FAILED if recording.failures else 0


def _add_fit(commands: Any) -> None:
    parser = _add_command(commands, "fit", _fit, "fit", "fit signatures and zones to a recorded trace", FIT_EXAMPLES)
    flag = parser.add_argument
    flag("trace", type=Path, metavar="TRACE.npz", help="file made by `eldr record`")
    flag("--workers", required=True, type=_positive, metavar="K", help="decode workers, one zone each")
    flag("--seed", type=int, default=0)
    flag("--transform", default="count_idf", metavar="NAME", help="count_idf (default), count, sqrt_count or binary")
    flag("-o", "--output", required=True, type=Path, metavar="FILE")


def _fit(arguments: argparse.Namespace) -> int:
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


def _add_inspect(commands: Any) -> None:
    parser = _add_command(commands, "inspect", _inspect, "fit", "show what a calibration file holds", INSPECT_EXAMPLES)
    flag = parser.add_argument
    flag("calibration", type=Path, metavar="FILE", help="file made by `eldr fit`")
    flag("--json", action="store_true", help="print it as JSON")
    flag("--html", type=Path, metavar="OUT", help="write a page with plots (needs eldr[report])")


def _inspect(arguments: argparse.Namespace) -> int:
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


def _add_replay(commands: Any) -> None:
    room = eldr.replay.cli
    room.add_arguments(_add_command(commands, "replay", room.run, "fit", room.SUMMARY, room.EXAMPLES))


def _add_decisions(commands: Any) -> None:
    room = eldr.replay.decisions_cli
    room.add_arguments(_add_command(commands, "decisions", room.run, "router", room.SUMMARY, room.EXAMPLES))


def _add_evaluate(commands: Any) -> None:
    room = eldr.evaluate.cli
    room.add_arguments(_add_command(commands, "evaluate", room.run, "fit,report", room.SUMMARY, room.EXAMPLES))


def _add_report(commands: Any) -> None:
    room = eldr.report.cli
    room.add_arguments(_add_command(commands, "report", room.run, "report", room.SUMMARY, room.EXAMPLES))


def _add_workload(commands: Any) -> None:
    room = eldr.workloads.cli
    room.add_arguments(_add_command(commands, "workload", room.run, "demo", room.SUMMARY, room.EXAMPLES))


def _add_load(commands: Any) -> None:
    room = eldr.load.cli
    room.add_arguments(_add_command(commands, "load", room.run, "demo", room.SUMMARY, room.EXAMPLES))


def _add_calibrate_cost(commands: Any) -> None:
    room = eldr.cost_cli
    room.add_arguments(_add_command(commands, "calibrate-cost", room.run, "report", room.SUMMARY, room.EXAMPLES))


def _add_demo(commands: Any) -> None:
    parser = _add_command(
        commands, "demo", _demo, "demo", "run a whole P/D fleet on this machine and compare policies", DEMO_EXAMPLES
    )
    flag = parser.add_argument
    flag("--vllm-python", required=True, type=Path, metavar="PATH", help="interpreter of an environment with vLLM")
    flag("--policies", default="jsq,locality-band", metavar="A,B", help="policies to compare (jsq,locality-band)")
    flag("--requests", type=_positive, default=200, metavar="N", help="requests a policy (200)")
    flag("--decode-workers", type=_positive, default=4, metavar="N")
    flag("--output", type=Path, default=Path("build/demo"), metavar="DIR")
    flag("--seed", type=int, default=0)


def _demo(arguments: argparse.Namespace) -> int:
    from eldr.demo.orchestrate import DemoOptions, run_demo

    fields = {field.name for field in dataclasses.fields(DemoOptions)}
    given = {name: value for name, value in vars(arguments).items() if name in fields}
    return run_demo(DemoOptions(**{**given, "policies": arguments.policies.split(",")}))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _read_key(path: Path | None) -> str | None:
    from eldr.router.config import read_key

    return None if path is None else read_key(path).decode()
