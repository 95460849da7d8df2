"""`eldr place-experts`: which rank of a worker should hold which experts, by the worker's own traffic."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from eldr.cli.arguments import count, positive, words
from eldr.cli.json_output import write_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from eldr.replay.placed_experts import PlacedExperts

SUMMARY = "place a worker's experts on its ranks, so that the busiest rank reads few"
EXAMPLES = """examples:
  eldr place-experts trace.npz --ranks 4 -o experts.json
  eldr place-experts trace.npz --ranks 4 --redundant 8 -o experts.json
  eldr place-experts trace.npz --ranks 8 --labels code,math --batch 12 -o experts.json
  eldr place-experts trace.npz --ranks 4 --calibration qwen3.eldr.npz --zone 3 -o worker3.json --json -
  python -m sglang.launch_server --ep-size 4 --ep-num-redundant-experts 8 --init-expert-location experts.json ...

The traffic should be the worker's own, because routing by experts makes workers differ: record it at the worker, or
take the part of a trace with --labels, or with the zone that the worker has under locality-band.

experts.json is what SGLang loads with --init-expert-location: the expert of every slot, layer by layer, where each rank
has as many slots. vLLM 0.32 loads no placement. Its EPLB begins with contiguous experts and moves them by load.

A step waits for the experts that its batch activates on one rank, not for its tokens. Redundant experts therefore cost
time where each token takes any of the copies, as in vLLM: every copy that gets a token is read. They pay where copies
are chosen by active experts (arXiv 2512.09277). The table has both.

exit codes: 0 success, 2 bad input.
"""
REPLICA = {None: "–", "random": "at random", "lp": "by LP on tokens", "fewest": "by fewest active experts"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr place-experts`."""
    flag = parser.add_argument
    flag("trace", type=Path, metavar="TRACE.npz", help="file made by `eldr record`")
    flag("--ranks", type=positive, required=True, metavar="R", help="ranks that share the experts of the worker")
    flag("--redundant", type=count, default=0, metavar="N", help="redundant experts in each layer (0)")
    flag("--batch", type=positive, default=7, metavar="B", help="requests that the worker runs at once (7)")
    flag("--labels", type=words, metavar="A,B", help="only the requests with these labels")
    flag("--calibration", type=Path, metavar="FILE", help="with --zone: a calibration with zones")
    flag("--zone", type=count, metavar="K", help="only the requests in this zone, from 0")
    flag("--held-out", type=_share, default=0.3, metavar="SHARE",
         help="share of the requests that placements are compared on, and not made by (0.3)")  # fmt: skip
    flag("--dense-layers", type=count, default=0, metavar="N",
         help="layers without experts before those with; SGLang's file has rows for them (0)")  # fmt: skip
    flag("--seed", type=int, default=0, metavar="N", help="seed of the batches (0)")
    flag("-o", "--output", type=Path, required=True, metavar="FILE", help="the placement to write")
    flag("--json", metavar="FILE|-", help="write the comparison as JSON to a file, or to standard output (-)")


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr place-experts` and return the exit code."""
    from rich.console import Console

    from eldr.calibration import load_calibration
    from eldr.replay.errors import ReplayError
    from eldr.replay.placed_experts import location_file, place_experts, requests_of
    from eldr.trace import read_trace

    if (arguments.calibration is None) != (arguments.zone is None):
        raise ReplayError("--calibration and --zone belong together")
    calibration = None if arguments.calibration is None else load_calibration(arguments.calibration)
    trace = read_trace(arguments.trace)
    chosen = requests_of(trace, arguments.labels, calibration, arguments.zone)
    console = Console(stderr=arguments.json == "-")
    with Console(stderr=True).status("placing experts") as status:
        placed = place_experts(
            trace,
            chosen,
            arguments.ranks,
            arguments.redundant,
            arguments.batch,
            arguments.held_out,
            arguments.seed,
            lambda done, of: status.update(f"placing experts: {100 * done / of:.0f} % of the passes"),
        )
    file = location_file(placed.placement, arguments.dense_layers)
    write_json(str(arguments.output), file, "placement", ReplayError, indent=None)
    _show(console, placed, arguments, len(chosen))
    result = {"ranks": arguments.ranks, "batch": arguments.batch, "requests": len(chosen)}
    write_json(arguments.json, result | {"distinct": placed.distinct, "worth": placed.worth}, "comparison", ReplayError)
    return 0


def _show(console: Console, placed: PlacedExperts, arguments: argparse.Namespace, requests: int) -> None:
    console.print(
        f"{arguments.trace.name}: {requests} requests, of which {100 * arguments.held_out:g} % were held out, in "
        f"batches of {arguments.batch}. A layer of a step activates {placed.distinct:.2f} experts, "
        f"{placed.distinct / arguments.ranks:.2f} for each of {arguments.ranks} ranks."
    )
    console.print(_table(placed))
    console.print(f"{arguments.output}: the union-aware placement is written")


def _table(placed: PlacedExperts) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, title="experts that the busiest rank reads in a layer", title_justify="left")
    table.add_column("placement")
    table.add_column("replicas")
    for name in ("redundant", "experts", "change %"):
        table.add_column(name, justify="right")
    first = placed.worth[0]["busiest"]
    for row in placed.worth:
        change = "" if row is placed.worth[0] else f"{100 * (row['busiest'] / first - 1):+.1f}"
        table.add_row(
            row["placement"], REPLICA[row["replica"]], str(row["redundant"] or "–"), f"{row['busiest']:.2f}", change
        )
    return table


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value
