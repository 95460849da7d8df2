"""`eldr serve`: the router."""

from __future__ import annotations

import argparse
from pathlib import Path

from eldr.router.config.settings import RouterConfig
from eldr.settings import add_flags, given

SUMMARY = "route requests to a P/D fleet"
EXAMPLES = """examples:
  eldr serve --prefill http://p0:8100 --decode http://d0:8200 --decode http://d1:8200 --policy jsq
  eldr serve --config eldr.toml
  eldr serve --prefill http://p0:8100 --decode http://d0:8200 --decode http://d1:8200 \\
      --policy locality-band --calibration qwen3.eldr.npz --max-inflight 128
  eldr serve --prefill http://p0:8100 --decode http://h100:8200 --decode http://a100:8200 \\
      --policy expected-union --cost h100.cost.json --worker-cost http://a100:8200=a100.cost.json --cost-scope moe
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr serve`."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with the same settings and more; flags override it"
    )
    add_flags(parser, RouterConfig)


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr serve`; returns the exit code."""
    from eldr.router.process import serve

    serve(arguments.config, given(arguments, RouterConfig))
    return 0
