"""What it costs that routers decide as one: replicas over NATS, and processes on one machine, before one mock fleet.

    python benchmarks/peers/peers.py [--quick] [--rounds 3] [--processes 2,4,8] [--program .envs/compiled/bin/eldr]

The mock fleet and the clients are those of benchmarks/router. Each round measures, in turn,

    alone         one router that shares nothing
    replica       one router that tells a NATS server everything, and hears nobody
    2 replicas    two of them, each with half of the clients' connections
    2 processes   one router of two processes, and of more with --processes

with two loads, one after the other: requests of one token, as many as 128 connections carry, and 400 streams of 30
tokens/s each. The table has medians over the rounds, and behind them the least and the most in brackets:

    CPU-µs a request   CPU time of all processes of the routers, a parent's hub included, for each request
    of NATS            CPU time of the NATS server, for each request
    requests/s         requests answered
    CPU-µs a token     CPU time of the routers for each token, of the streams
    tokens/s           tokens received; the clients ask for 12,000

All programs share the machine's cores: routers, mock fleet, clients and NATS. CPU time for each request says what
sharing costs anywhere. Throughput says how far this machine goes with everything on it. How it grows with the number of
processes is only to be seen where there are several cores more than processes; a line says if there are not. Everything
is in build/bench-peers/summary.json.

exit codes: 0 measured, 1 a router failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path += [str(HERE.with_name("router"))]

from processes import compile_c, cpu_s  # noqa: E402
from workload import write_bodies, write_handoffs  # noqa: E402

ROOT = HERE.parents[1]
OUT = ROOT / "build" / "bench-peers"
PREFILL, DECODE, TOKENS_PER_S = 2, 8, 30
CONNECTIONS, STREAMS, RAMP_S = 128, 400, 1.5
READY_WITHIN_S = 60.0
Figures = dict[str, float]
# What is measured: routers, processes of each, and whether they share over NATS.
VARIANTS = {"alone": (1, 1, False), "replica": (1, 1, True), "2 replicas": (2, 1, True)}
COLUMNS = {
    "cpu_us_per_request": "CPU-µs a request",
    "nats_cpu_us_per_request": "of NATS",
    "requests_per_s": "requests/s",
    "cpu_us_per_token": "CPU-µs a token",
    "tokens_per_s": "tokens/s",
}
# Mock fleet, clients and NATS take about as much as this.
CORES_BESIDE = 3


class Bench:
    """The programs and files of one run. program: `eldr`."""

    def __init__(self, program: str, port: int, requests_s: float, streams_s: float) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        self._program = program
        self._port = port
        self._requests_s, self._streams_s = requests_s, streams_s
        self._mock = compile_c("mock_fleet", OUT)
        self._client = compile_c("load_client", OUT)
        write_handoffs(OUT / "handoffs.jsonl", with_counts=True)
        write_bodies(OUT / "whole.jsonl", max_tokens=1, stream=False)
        write_bodies(OUT / "stream.jsonl", max_tokens=round(TOKENS_PER_S * (RAMP_S + streams_s + 1)), stream=True)

    def measure(self, routers: int, processes: int, shares: bool) -> Figures:
        """CPU per request and per token, requests/s and tokens/s of so many routers."""
        with ExitStack() as stack:
            fleet = self._port + 10
            sizes = map(str, (fleet, PREFILL, DECODE, TOKENS_PER_S))
            mock = stack.enter_context(started([str(self._mock), *sizes, str(OUT / "handoffs.jsonl")], pipe=True))
            assert mock.stdout is not None
            mock.stdout.readline()
            prefill = [f"http://127.0.0.1:{fleet + index}" for index in range(PREFILL)]
            decode = [f"http://127.0.0.1:{fleet + PREFILL + index}" for index in range(DECODE)]
            flags = ["--policy", "expected-union", "--processes", str(processes)]
            flags += [part for url in prefill for part in ("--prefill", url)]
            flags += [part for url in decode for part in ("--decode", url)]
            bus: subprocess.Popen[str] | None = None
            if shares:
                server = shutil.which("nats-server", path=str(ROOT / ".envs/dev/bin")) or "nats-server"
                bus = stack.enter_context(started([server, "-a", "127.0.0.1", "-p", str(self._port + 9)]))
                wait_for_port(self._port + 9)
                flags += ["--peers", f"nats://127.0.0.1:{self._port + 9}"]
            watched = []
            for index in range(routers):
                command = [self._program, "serve", "--port", str(self._port + index), *flags]
                watched.append(stack.enter_context(started(command)))
                wait_until_ready(self._port + index)
            ports = f"{self._port}-{self._port + routers - 1}"
            requests = ("requests", ports, str(CONNECTIONS), str(self._requests_s), str(OUT / "whole.jsonl"))
            streams = ("streams", ports, str(STREAMS), str(self._streams_s), str(RAMP_S), str(OUT / "stream.jsonl"))
            seen, cpu, bus_cpu = self._load(watched, bus, requests)
            figures = {
                "cpu_us_per_request": cpu * 1e6 / seen["answers"],
                "nats_cpu_us_per_request": bus_cpu * 1e6 / seen["answers"],
                "requests_per_s": seen["answers"] / seen["seconds"],
            }
            seen, cpu, _ = self._load(watched, bus, streams)
            figures["cpu_us_per_token"] = cpu * 1e6 / seen["tokens"]
            figures["tokens_per_s"] = seen["tokens"] / seen["seconds"]
            return figures

    def _load(
        self, routers: list[subprocess.Popen[str]], bus: subprocess.Popen[str] | None, arguments: tuple[str, ...]
    ) -> tuple[dict[str, Any], float, float]:
        """What the clients saw, and the CPU seconds of the routers and of the bus in their window."""
        with started([str(self._client), *arguments], pipe=True) as client:
            assert client.stdout is not None
            clocks = []
            for _ in ("begin", "end"):
                if client.stdout.readline() != "window\n":
                    raise SystemExit("the clients failed")
                clocks.append((sum(cpu_s(each.pid) for each in routers), 0.0 if bus is None else cpu_s(bus.pid)))
            seen: dict[str, Any] = json.loads(client.stdout.read())
        if seen["errors"]:
            raise SystemExit(f"{seen['errors']} requests failed")
        return seen, clocks[1][0] - clocks[0][0], clocks[1][1] - clocks[0][1]


@contextmanager
def started(command: list[str], pipe: bool = False) -> Iterator[subprocess.Popen[str]]:
    with (OUT / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE if pipe else log, stderr=log, text=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_port(port: int) -> None:
    deadline_s = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline_s:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port}")


def wait_until_ready(port: int) -> None:
    deadline_s = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"the router on port {port} did not start: see {OUT / 'log'}")


def cell(figures: list[float]) -> str:
    """The median, and the range if there are several."""
    text = f"{statistics.median(figures):,.1f}"
    return text if len(figures) == 1 else f"{text} ({min(figures):,.1f} to {max(figures):,.1f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of short windows: a look, no measurement")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (3)")
    parser.add_argument("--processes", default="2", metavar="N[,N...]", help="numbers of processes of one router (2)")
    parser.add_argument("--program", default=str(ROOT / ".envs/compiled/bin/eldr"), help="eldr, compiled if you like")
    parser.add_argument("--port", type=int, default=27100, help="first of 24 free ports (27100)")
    args = parser.parse_args()
    processes = [int(number) for number in args.processes.split(",")]
    variants = VARIANTS | {f"{number} processes": (1, number, False) for number in processes}
    bench = Bench(args.program, args.port, *((1.0, 2.0) if args.quick else (3.0, 4.0)))
    rounds: dict[str, list[Figures]] = {name: [] for name in variants}
    for number in range(1 if args.quick else args.rounds):
        names = list(variants)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            rounds[name].append(bench.measure(*variants[name]))
    medians = {
        name: {key: statistics.median(each[key] for each in found) for key in found[0]}
        for name, found in rounds.items()
    }
    cores = os.cpu_count() or 1
    summary = {"rounds": rounds, "medians": medians, "cores": cores, "load_average": os.getloadavg()[0]}
    (OUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print("| | " + " | ".join(COLUMNS.values()) + " |\n|---" + "|--:" * len(COLUMNS) + "|")
    for name, found in rounds.items():
        print(f"| {name} | " + " | ".join(cell([each[key] for each in found]) for key in COLUMNS) + " |")
    print(f"\n{cores} cores for routers, fleet, clients and NATS together; load average {os.getloadavg()[0]:.1f}")
    if cores < max(processes) + CORES_BESIDE:
        print("These are too few to see how throughput grows with the number of processes: look at the CPU time alone.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
