"""`eldr synthesize`: draws a synthetic trace from a model that it fits to a recorded one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from eldr.cli.arguments import positive

if TYPE_CHECKING:
    from eldr.synthetic import Statistic

SUMMARY = "draw a synthetic trace of any size, like a recorded one"
EXAMPLES = """examples:
  eldr synthesize trace.npz -o large.npz --requests 1200
  eldr synthesize trace.npz -o 128.npz --requests 1200 --layers 48 --experts 128 --top-k 8
  eldr synthesize trace.npz --check

What requests have in common is fitted to the recorded trace. The result says that it is synthetic, in its model name
and its note. It has no texts of prompts. --check compares what is drawn at the recorded geometry with the recording.

exit codes: 0 success, 2 bad input.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr synthesize`."""
    flag = parser.add_argument
    flag("trace", type=Path, metavar="TRACE.npz", help="file made by `eldr record`")
    flag("-o", "--output", type=Path, metavar="OUT.npz", help="the trace to write")
    flag("--requests", type=positive, metavar="N", help="requests to draw (as many as recorded)")
    flag("--layers", type=positive, metavar="L", help="MoE layers (as recorded)")
    flag("--experts", type=positive, metavar="E", help="experts in a layer (as recorded)")
    flag("--top-k", type=positive, metavar="K", help="experts that a token chooses (as recorded)")
    flag("--max-steps", type=positive, metavar="T", help="decode steps of a request, at most (as recorded)")
    flag("--seed", type=int, default=0, metavar="N", help="seed of the fit and of the draws (0)")
    flag("--check", action="store_true", help="compare a drawn trace with the recorded one; without -o, do only this")
    flag("--json", action="store_true", help="print the comparison as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr synthesize` and return the exit code."""
    from rich.console import Console

    from eldr.synthetic import Geometry, SyntheticError, draw_trace, fit_traffic, measure
    from eldr.trace import read_trace, write_trace

    if arguments.output is None and not arguments.check:
        raise SyntheticError("nothing to do: name a file to write with -o, or pass --check")
    if arguments.output is not None and arguments.output.suffix != ".npz":
        raise SyntheticError(f"{arguments.output}: the name of a trace ends in .npz")
    trace = read_trace(arguments.trace)
    meta = trace.meta
    geometry = Geometry(
        arguments.layers or meta.layers, arguments.experts or meta.experts, arguments.top_k or meta.top_k
    )
    geometry.check()
    console = Console(stderr=True)
    with console.status("fitting") as status:
        model = fit_traffic(trace, seed=arguments.seed, progress=lambda stage: status.update(f"fitting: {stage}"))
        if arguments.output is not None:
            status.update("drawing")
            requests = arguments.requests or trace.requests
            drawn = draw_trace(model, requests, geometry, seed=arguments.seed, max_steps=arguments.max_steps)
            write_trace(drawn, arguments.output)
        if arguments.check:
            status.update("comparing")
            # Other draws than those of the fit.
            like = draw_trace(model, trace.requests, seed=arguments.seed + 1)
            _show(measure(trace), measure(like), as_json=arguments.json)
    if arguments.output is not None and not arguments.json:
        print(f"{arguments.output}: {drawn.requests} synthetic requests, {len(drawn.decode_experts)} decode rows")
    return 0


def _show(recorded: list[Statistic], drawn: list[Statistic], *, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    found = {statistic.name: statistic.value for statistic in drawn}
    if as_json:
        rows = [
            {"name": one.name, "meaning": one.meaning, "recorded": one.value, "synthetic": found.get(one.name)}
            for one in recorded
        ]
        print(json.dumps(rows, indent=2))
        return
    table = Table("statistic", "meaning")
    for heading in ("recorded", "synthetic", "%"):
        table.add_column(heading, justify="right")
    for one in recorded:
        value = found.get(one.name)
        if value is not None:
            change = f"{100 * (value / one.value - 1):+.1f}" if one.value else ""
            table.add_row(one.name, one.meaning, f"{one.value:.3f}", f"{value:.3f}", change)
    Console().print(table)
