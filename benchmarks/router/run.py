"""What a router costs: eldr beside the public P/D routers and a plain proxy, in one run, before the same mock fleet.

    python benchmarks/router/run.py [--quick] [--rounds 3] [--only eldr,haproxy] [--other-eldr PATH]

One C process plays 2 prefill and 16 decode workers, another the clients; router and load have a core each. CPU time is
that of the router's process as the kernel accounts it, so that a busy machine changes loads and latencies but hardly
these figures. Every round measures every router in turn, the order turning by one a round; the table holds medians over
the rounds. Clients that talk to the decode workers directly stand beside the routers. A figure during which load or
fleet took more than 90 % of their core is void.

exit codes: 0 measured (void figures are named), 1 a router failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders import API_KEY, CONTENDERS, ROOT, Contender, Fleet, other_eldr
from processes import compile_c, cpu_s, peak_mib, running
from rich.console import Console
from rich.progress import Progress
from table import DIRECT, Figures, summarise, table
from workload import write_bodies, write_handoffs

OUT = ROOT / "build" / "bench"
PREFILL, DECODE = 2, 16
TOKENS_PER_S = 30
CONNECTIONS = 32
STREAMS = (256, 1000)
RAMP_S = 1.5
ROUTER_CORE, LOAD_CORE = 0, 1
READY_WITHIN_S = 60.0
# Of the core that fleet and clients share.
SATURATED = 0.9


@dataclass(frozen=True, slots=True)
class Plan:
    """How long each window is, in seconds."""

    requests_s: float
    streams_s: float
    rounds: int


class Bench:
    """The programs and files of one run."""

    def __init__(self, folder: Path, plan: Plan, first_port: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._plan = plan
        prefill = tuple(range(first_port, first_port + PREFILL))
        decode = tuple(range(prefill[-1] + 1, prefill[-1] + 1 + DECODE))
        self._fleet = Fleet(decode[-1] + 1, prefill, decode)
        self._mock = compile_c("mock_fleet", folder)
        self._client = compile_c("load_client", folder)
        for with_counts in (False, True):
            write_handoffs(self._handoffs(with_counts), with_counts)
        stream_tokens = round(TOKENS_PER_S * (RAMP_S + plan.streams_s + 1))
        write_bodies(folder / "whole.jsonl", max_tokens=1, stream=False)
        write_bodies(folder / "first_token.jsonl", max_tokens=1, stream=True)
        write_bodies(folder / "stream.jsonl", max_tokens=stream_tokens, stream=True)

    def _handoffs(self, with_counts: bool) -> Path:
        return self._folder / f"handoffs_{'with' if with_counts else 'without'}_counts.jsonl"

    def direct(self) -> Figures:
        """The clients alone, straight to the decode workers."""
        with self._fleet_running(with_counts=False) as mock:
            return self._measure(None, mock, f"{self._fleet.decode[0]}-{self._fleet.decode[-1]}")

    def router(self, contender: Contender) -> Figures:
        """One router, started, measured and stopped."""
        log = self._folder / f"{contender.name}.log"
        folder = self._folder / contender.name
        folder.mkdir(exist_ok=True)
        with self._fleet_running(contender.with_counts) as mock:
            with running(contender.command(self._fleet, folder), ROUTER_CORE, log) as router:
                self._wait_until_ready(contender.name, router, log)
                port = self._fleet.router_port
                figures = self._measure(router, mock, f"{port}-{port}")
            mock.terminate()
            assert mock.stdout is not None
            served = json.loads(mock.stdout.read())
        if contender.legs == 2 and served["decodes_with_handoff"] != served["decodes"]:
            raise SystemExit(f"{contender.name}: {served} - it did not hand every request off")
        return figures

    @contextmanager
    def _fleet_running(self, with_counts: bool) -> Iterator[subprocess.Popen[str]]:
        sizes = (self._fleet.prefill[0], PREFILL, DECODE, TOKENS_PER_S)
        command: list[str | Path] = [self._mock, *map(str, sizes), self._handoffs(with_counts)]
        with running(command, LOAD_CORE, self._folder / "mock_fleet.log", subprocess.PIPE) as mock:
            assert mock.stdout is not None
            if mock.stdout.readline() != "ready\n":
                raise SystemExit(f"the mock fleet did not start: see {self._folder / 'mock_fleet.log'}")
            yield mock

    def _wait_until_ready(self, name: str, router: subprocess.Popen[str], log: Path) -> None:
        body = (self._folder / "whole.jsonl").read_bytes().splitlines()[0]
        headers = {"content-type": "application/json", "authorization": f"Bearer {API_KEY}"}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._fleet.router_port}/v1/completions", data=body, headers=headers
        )
        deadline_s = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline_s and router.poll() is None:
            try:
                with urllib.request.urlopen(request, timeout=READY_WITHIN_S):
                    return
            except OSError:
                time.sleep(0.1)
        raise SystemExit(f"{name} did not start: see {log}")

    def _measure(self, router: subprocess.Popen[str] | None, mock: subprocess.Popen[str], ports: str) -> Figures:
        figures: Figures = {}
        plan = self._plan
        for streams in STREAMS:
            shape = ("streams", ports, str(streams), str(plan.streams_s), str(RAMP_S))
            seen, cpu = self._load(router, mock, (*shape, str(self._folder / "stream.jsonl")))
            figures[f"s{streams}_cpu_s_per_million_tokens"] = cpu * 1e6 / seen["tokens"]
            figures[f"s{streams}_tokens_per_s"] = seen["tokens"] / seen["seconds"]
            for quantile in ("p50", "p99"):
                figures[f"s{streams}_ttft_{quantile}_ms"] = seen[f"first_token_ms_{quantile}"]
                figures[f"s{streams}_transit_{quantile}_ms"] = seen[f"transit_ms_{quantile}"]
                figures[f"s{streams}_itl_added_{quantile}_ms"] = seen[f"added_gap_ms_{quantile}"]
            figures[f"s{streams}_load_share"] = seen["load_share"]
        if router is not None:
            figures["memory_mib"] = peak_mib(router.pid)
        for name in ("whole", "first_token"):
            command = ("requests", ports, str(CONNECTIONS), str(plan.requests_s), str(self._folder / f"{name}.jsonl"))
            seen, cpu = self._load(router, mock, command)
            figures[f"{name}_cpu_ms_per_request"] = cpu * 1e3 / seen["answers"]
            figures[f"{name}_requests_per_s"] = seen["answers"] / seen["seconds"]
            figures[f"{name}_load_share"] = seen["load_share"]
        return figures

    def _load(
        self, router: subprocess.Popen[str] | None, mock: subprocess.Popen[str], arguments: tuple[str, ...]
    ) -> tuple[dict[str, Any], float]:
        """What the clients saw, and the router's CPU seconds in their window; `load_share`: of clients and fleet."""
        with running(
            (self._client, *arguments), LOAD_CORE, self._folder / "load_client.log", subprocess.PIPE
        ) as client:
            assert client.stdout is not None
            clocks = []
            for _ in ("begin", "end"):
                if client.stdout.readline() != "window\n":
                    raise SystemExit(f"the clients failed: see {self._folder / 'load_client.log'}")
                load = cpu_s(client.pid) + cpu_s(mock.pid)
                clocks.append((0.0 if router is None else cpu_s(router.pid), load))
            seen: dict[str, Any] = json.loads(client.stdout.read())
        if seen["errors"]:
            raise SystemExit(f"{seen['errors']} requests failed: see {self._folder / 'load_client.log'}")
        (router_begin, load_begin), (router_end, load_end) = clocks
        seen["load_share"] = (load_end - load_begin) / seen["seconds"]
        return seen, router_end - router_begin


def run_rounds(
    bench: Bench, contenders: Mapping[str, Contender], rounds: int, console: Console
) -> list[dict[str, Figures]]:
    """One dictionary a round: contender -> figures."""
    names = [DIRECT, *contenders]
    results = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=rounds * len(names))
        for number in range(rounds):
            turn = number % len(names)
            figures = {}
            for name in names[turn:] + names[:turn]:
                progress.update(task, description=f"round {number + 1} of {rounds}: {name}")
                figures[name] = bench.direct() if name == DIRECT else bench.router(contenders[name])
                progress.advance(task)
            results.append(figures)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of short windows: a look, no measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(CONTENDERS), help="routers to measure, by commas")
    parser.add_argument("--other-eldr", metavar="PATH", help="another build's program `eldr`, to compare with this one")
    parser.add_argument("--port", type=int, default=26100, help="first of 24 free ports")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    args = parser.parse_args()
    console = Console(stderr=args.json)
    if (os.cpu_count() or 1) < 2:
        raise SystemExit("two cores are needed: one for the router, one for fleet and clients")
    plan = Plan(1.0, 2.0, 1) if args.quick else Plan(3.0, 5.0, args.rounds)
    wanted = args.only.split(",")
    if unknown := [name for name in wanted if name not in CONTENDERS]:
        raise SystemExit(f"no such router: {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    chosen = [CONTENDERS[name] for name in wanted]
    if args.other_eldr is not None:
        chosen.append(other_eldr(args.other_eldr))
    missing = [contender.name for contender in chosen if not contender.installed]
    contenders = {contender.name: contender for contender in chosen if contender.installed}
    bench = Bench(OUT, plan, args.port)
    summary = summarise(run_rounds(bench, contenders, plan.rounds, console), SATURATED)
    summary |= {"missing": missing, "quick": args.quick, "load_average": os.getloadavg()[0]}
    (OUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    if args.json:
        print(json.dumps(summary))
    else:
        console.print(table(summary))
        if missing:
            console.print(f"not installed, not measured: {', '.join(missing)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
