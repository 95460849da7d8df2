"""Flags of `eldr serve` and `eldr replay` that set `PolicyOptions`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from eldr.policies.options import OPTION_NAMES


def add_option_flags(parser: argparse.ArgumentParser) -> None:
    """Declare them. None has a default, so that only what was given is set; help texts state `PolicyOptions`' own."""
    unset = argparse.SUPPRESS
    band = parser.add_argument_group("locality-band")
    band.add_argument("--tau", type=float, default=unset, help="width of the band, in cosine similarity (0.1)")
    band.add_argument("--no-two-nearest", dest="two_nearest", action="store_false", default=unset,
                      help="a band of one does not take the second-nearest worker in")  # fmt: skip
    band.add_argument("--refit-interval", dest="refit_interval_s", type=float, default=unset, metavar="SECONDS",
                      help="refit the zones to recent requests this often (inf: never)")  # fmt: skip
    band.add_argument("--refit-window", dest="refit_window_s", type=float, default=unset, metavar="SECONDS",
                      help="how long ago recent is (5.0)")  # fmt: skip
    union = parser.add_argument_group("expected-union")
    union.add_argument("--cost", default=unset, metavar="FILE|PRESET",
                       help="step-time model of decode workers, a file of `eldr calibrate-cost` or a preset "
                       "(qwen3-30b-a3b-rtxpro6000)")  # fmt: skip
    union.add_argument("--worker-cost", dest="worker_costs", default=unset, action="append", type=_worker_cost,
                       metavar="WORKER=COST", help="of one worker where hardware differs (repeatable)")  # fmt: skip
    union.add_argument("--cost-scope", choices=("step", "moe"), default=unset,
                       help="time of whole decode steps, or of their MoE layers alone (step)")  # fmt: skip
    union.add_argument("--others-weight", type=float, default=unset, metavar="X",
                       help="weight of what a placement adds to the requests there: 0.5 favours the tail, 2 the median "
                       "(1.0)")  # fmt: skip
    union.add_argument("--anchor", type=float, default=unset, metavar="X",
                       help="weight of sending a request where similar ones went lately; 0 for none (0.1)")  # fmt: skip
    union.add_argument("--tail-guard", type=float, default=unset, metavar="X",
                       help="how much longer than the mean a step may become, in units of what locality saves; smaller "
                       "favours the tail of TPOT, larger its median, inf for no guard (1.25)")  # fmt: skip
    union.add_argument("--step-tokens", type=float, default=unset, metavar="X",
                       help="independent tokens that a step takes a request further, above 1 with speculative decoding "
                       "(1.0)")  # fmt: skip
    union.add_argument("--expert-parallel", type=int, default=unset, metavar="R",
                       help="ranks that the experts of a decode worker are divided over (1)")  # fmt: skip


def given_options(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """What was given of them, for `PolicyOptions.from_settings`."""
    return {name: getattr(arguments, name) for name in OPTION_NAMES if hasattr(arguments, name)}


def _worker_cost(text: str) -> tuple[str, str]:
    worker, _, cost = text.rpartition("=")
    if not worker or not cost:
        raise argparse.ArgumentTypeError(f"{text!r}: expected WORKER=FILE or WORKER=PRESET")
    return worker, cost
