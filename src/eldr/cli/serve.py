"""`eldr serve`: the router."""

from __future__ import annotations

import argparse
from pathlib import Path

from eldr.cli.policy_flags import add_option_flags

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
    add_option_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr serve`; returns the exit code."""
    from eldr.router.process import serve

    given = {name: value for name, value in vars(arguments).items() if name not in ("command", "extra", "config")}
    serve(arguments.config, given)
    return 0
