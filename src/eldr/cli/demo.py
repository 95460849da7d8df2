"""`eldr demo`: runs a whole fleet on this machine."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from eldr.cli.arguments import positive

SUMMARY = "run a whole prefill/decode fleet on this machine and compare policies"
EXAMPLES = """examples:
  make demo
  eldr demo --vllm-python .envs/vllm-0.32/bin/python --policies jsq,p2c,locality-band
  make demo-gateway

The demo starts one prefill worker and several decode workers of a small MoE model on the CPU, and a router for each
policy. The policies take turns, round by round, and their TPOT is compared within each round. It writes a summary and a
page to the output folder. With --envoy, the requests pass an Envoy that asks an endpoint picker, in the two calls of
llm-d's coordinator.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr demo`."""
    flag = parser.add_argument
    flag("--vllm-python", required=True, type=Path, metavar="PATH", help="Python of an environment with vLLM")
    policies = "jsq,locality-band,expected-union"
    flag("--policies", default=policies, metavar="A,B", help=f"policies to compare with the first ({policies})")
    flag("--requests", type=positive, default=48, metavar="N", help="requests of each policy in a round (48)")
    flag("--rounds", type=positive, default=9, metavar="N", help="rounds after the warm-up, at most; 3 or more (9)")
    flag("--decode-workers", type=positive, default=4, metavar="N", help="number of decode workers (4)")
    flag("--envoy", type=Path, metavar="PROGRAM", help="put this Envoy in front of the workers instead of a router")
    example = Path("examples/envoy-epp.yaml")
    flag("--envoy-config", type=Path, default=example, metavar="FILE", help=f"its configuration ({example})")
    flag("--in-flight", type=positive, default=40, metavar="N", help="requests in flight at all workers (40)")
    flag("--output", type=Path, default=Path("build/demo"), metavar="DIR", help="folder for results (build/demo)")
    flag("--seed", type=int, default=0, metavar="N", help="seed of prompts, lengths and calibration (0)")


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr demo` and return the exit code."""
    from eldr.demo.gateway import Gateway
    from eldr.demo.orchestrate import DemoOptions, run_demo

    fields = {field.name for field in dataclasses.fields(DemoOptions)}
    given = {name: value for name, value in vars(arguments).items() if name in fields}
    if arguments.envoy is not None:
        given["gateway"] = Gateway(arguments.envoy, arguments.envoy_config)
    return run_demo(DemoOptions(**{**given, "policies": arguments.policies.split(",")}))
