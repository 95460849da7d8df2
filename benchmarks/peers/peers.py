"""What it costs that routers decide as one: replicas over NATS, and processes on one machine, before one mock fleet.

    python benchmarks/peers/peers.py [--quick] [--rounds 3] [--program .envs/compiled/bin/eldr]

The mock fleet and the clients are those of benchmarks/router. Each round measures, in turn,

    alone         one router that shares nothing
    replica       one router that tells a NATS server everything, and hears nobody
    2 replicas    two of them, each with half of the clients' connections
    2 processes   one router of two processes

CPU time is what the kernel accounts to all processes of the routers, a parent's hub included, and to the NATS server
apart. All programs share the machine's cores. So throughput says how far this machine goes with everything on it, and
CPU time per request what sharing costs anywhere.

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
VARIANTS = {"alone": (1, 1, False), "replica": (1, 1, True), "2 replicas": (2, 1, True), "2 processes": (1, 2, False)}


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of short windows: a look, no measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--program", default=str(ROOT / ".envs/compiled/bin/eldr"))
    parser.add_argument("--port", type=int, default=27100, help="first of 24 free ports")
    args = parser.parse_args()
    bench = Bench(args.program, args.port, *((1.0, 2.0) if args.quick else (3.0, 4.0)))
    rounds: dict[str, list[Figures]] = {name: [] for name in VARIANTS}
    for number in range(1 if args.quick else args.rounds):
        names = list(VARIANTS)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            rounds[name].append(bench.measure(*VARIANTS[name]))
    medians = {
        name: {key: statistics.median(each[key] for each in found) for key in found[0]}
        for name, found in rounds.items()
    }
    summary = {"rounds": rounds, "medians": medians, "cores": os.cpu_count(), "load_average": os.getloadavg()[0]}
    (OUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print("| | CPU-µs a request | of NATS | requests/s | CPU-µs a token | tokens/s |\n|---|--:|--:|--:|--:|--:|")
    for name, median in medians.items():
        order = ("cpu_us_per_request", "nats_cpu_us_per_request", "requests_per_s", "cpu_us_per_token", "tokens_per_s")
        print(f"| {name} | " + " | ".join(f"{median[key]:,.1f}" for key in order) + " |")
    print(
        f"\n{os.cpu_count()} cores for routers, fleet, clients and NATS together; load average {os.getloadavg()[0]:.1f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
