"""The command line: finds the command, runs it, and turns its errors into messages and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from types import ModuleType

import eldr
from eldr.cli import (
    calibrate_cost,
    decisions,
    demo,
    epp,
    evaluate,
    fit,
    inspect,
    load,
    place_experts,
    record,
    replay,
    report,
    serve,
    synthesize,
    workload,
)
from eldr.cli.exit_codes import EXIT_BAD_INPUT, EXIT_INTERRUPTED
from eldr.errors import EldrError

# Name, module, and the extras that it needs. A module imports them only when it runs, because the base install has only
# numpy.
COMMANDS: tuple[tuple[str, ModuleType, str], ...] = (
    ("serve", serve, "router"),
    ("epp", epp, "epp"),
    ("record", record, "fit"),
    ("fit", fit, "fit"),
    ("inspect", inspect, "fit"),
    ("replay", replay, "fit"),
    ("place-experts", place_experts, "fit"),
    ("synthesize", synthesize, "fit"),
    ("decisions", decisions, "router"),
    ("evaluate", evaluate, "fit,report"),
    ("report", report, "report"),
    ("workload", workload, "demo"),
    ("load", load, "demo"),
    ("calibrate-cost", calibrate_cost, "report"),
    ("demo", demo, "demo"),
)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 success, 1 failure, 2 bad input, 130 interrupted."""
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
        # The reader closed the pipe, as `| head` does. That is not a failure, but nothing more may be flushed to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eldr", description=eldr.__doc__)
    parser.add_argument("--version", action="version", version=f"eldr {eldr.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module, extra in COMMANDS:
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(command=module.run, extra=f"eldr[{extra}]")
        module.add_arguments(command)
    return parser
