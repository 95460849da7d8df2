"""`eldr epp`: the endpoint picker."""

from __future__ import annotations

import argparse
from pathlib import Path

from eldr.router.config.picker import PickerConfig
from eldr.settings import add_flags, given

SUMMARY = "tell a gateway which workers get its requests (Envoy's ext_proc, GAIE, llm-d)"
EXAMPLES = """examples:
  eldr epp --worker http://10.0.0.1:8000 --worker http://10.0.0.2:8000 --policy expected-union --signature prompt
  eldr epp --grpc-listen 0.0.0.0:9002 --host 0.0.0.0 --port 9090 \\
      --prefill dns+http://prefill:8000 --decode dns+http://decode:8000 --policy expected-union
  eldr epp --phase pair --prefill http://10.0.0.1:8000 --decode http://10.0.0.2:8000 --decode http://10.0.0.3:8000
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr epp`."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with the same settings and more; flags override it"
    )
    add_flags(parser, PickerConfig)


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr epp`; returns the exit code."""
    from eldr.router.process import serve

    serve(arguments.config, given(arguments, PickerConfig), PickerConfig)
    return 0
