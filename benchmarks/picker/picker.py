"""What an endpoint picker costs: Envoy with examples/envoy-epp.yaml, `eldr epp` and a mock fleet, in one run.

    python benchmarks/picker/picker.py --envoy .envs/envoy/bin/envoy [--eldr .envs/compiled/bin/eldr] [--seconds 5]

One C process plays 8 workers, another the clients. CPU time is that of the control groups in which the picker and Envoy
run: user and system time of all threads and children, as the kernel accounts it, so that a busy machine changes the
rates but hardly these figures. Where no control group can be made, it is read from /proc, and a line says so. What the
programs take while nobody asks, such as for probes, is measured too and taken off the figures for a token. `none` is
Envoy alone.

exit codes: 0 measured, 1 a request failed or a process did not start.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "router"))

from processes import ControlGroup, compile_c, control_group, cpu_s, running  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from workload import write_bodies, write_handoffs  # noqa: E402

from eldr.demo.gateway import envoy_config  # noqa: E402

OUT = ROOT / "build" / "picker-bench"
WORKERS = 8
TOKENS_PER_S = 30
CONNECTIONS = 16
STREAMS = 256
RAMP_S = 1.5
LOAD_CORE, PROXY_CORE = 1, 0
READY_WITHIN_S = 120.0
# Of the example.
EPP_FILTER = re.compile(
    r" +- name: envoy\.filters\.http\.ext_proc\n.*?(?= +- name: envoy\.filters\.http\.router\n)", re.DOTALL
)


@dataclass(frozen=True)
class Case:
    """What is measured.

    flags: of the picker; None without one. counts: whether bodies bring those of a prefill. duplex: whether bodies are
    streamed both ways, as GAIE and llm-d ask for, and not buffered as in the example.
    """

    name: str
    flags: tuple[str, ...] | None
    role: str = "worker"
    counts: bool = False
    duplex: bool = False


CASES = (
    Case("none", None),
    Case("aggregated, jsq", ("--policy", "jsq")),
    Case("aggregated, expected-union", ("--policy", "expected-union")),
    Case("decode phase, jsq", ("--policy", "jsq"), "decode", True),
    Case("decode phase, expected-union", ("--policy", "expected-union"), "decode", True),
    Case("aggregated, jsq, duplex", ("--policy", "jsq"), duplex=True),
    Case("decode phase, expected-union, duplex", ("--policy", "expected-union"), "decode", True, True),
)
MODE = "request_body_mode: BUFFERED"
DUPLEX_MODE = "request_body_mode: FULL_DUPLEX_STREAMED\n                        request_trailer_mode: SEND"


class Bench:
    """The programs and files of one run."""

    def __init__(self, envoy: str, eldr: str, seconds: float, port: int) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        self._envoy, self._eldr, self._seconds = envoy, eldr, seconds
        self._front, self._grpc, self._status, self._first = port, port + 1, port + 2, port + 3
        self._mock, self._client = compile_c("mock_fleet", OUT), compile_c("load_client", OUT)
        write_handoffs(OUT / "handoffs.jsonl", with_counts=True)
        write_bodies(OUT / "whole.jsonl", max_tokens=1, stream=False)
        write_bodies(OUT / "stream.jsonl", max_tokens=round(TOKENS_PER_S * (RAMP_S + seconds + 1)), stream=True)
        for name in ("whole", "stream"):
            self._add_counts(name)

    def _add_counts(self, name: str) -> None:
        """The same bodies as llm-d's coordinator sends them after a prefill."""
        handoffs = [json.loads(line) for line in (OUT / "handoffs.jsonl").read_text().splitlines()]
        with (OUT / f"{name}_counts.jsonl").open("w") as file:
            for index, line in enumerate((OUT / f"{name}.jsonl").read_text().splitlines()):
                params = handoffs[index % len(handoffs)]["kv_transfer_params"]
                body = json.dumps({**json.loads(line), "kv_transfer_params": params}, separators=(",", ":"))
                file.write(body + "\n")

    def case(self, case: Case) -> dict[str, float]:
        with ExitStack() as stack:
            mock = stack.enter_context(self._fleet())
            groups = {name: stack.enter_context(control_group(name)) for name in ("picker", "envoy")}
            measured: dict[str, Callable[[], float]] = {}
            if case.flags is not None:
                picker = stack.enter_context(self._picker(case, groups["picker"]))
                measured["picker"] = clock(picker, groups["picker"])
            proxy = stack.enter_context(self._proxy(case, groups["envoy"]))
            measured["envoy"] = clock(proxy, groups["envoy"])
            figures: dict[str, float] = {}
            suffix = "_counts" if case.counts else ""
            ports = f"{self._front}-{self._front}"
            whole = ("requests", ports, str(CONNECTIONS), str(self._seconds), str(OUT / f"whole{suffix}.jsonl"))
            seen, cpu = self._load(whole, measured)
            figures["requests_per_s"] = seen["answers"] / seen["seconds"]
            for name, used_s in cpu.items():
                figures[f"{name}_ms_per_request"] = used_s * 1e3 / seen["answers"]
            idle = self._idle(measured)
            figures |= {f"{name}_idle_ms_per_s": used_s * 1e3 for name, used_s in idle.items()}
            stream = (
                "streams",
                ports,
                str(STREAMS),
                str(self._seconds),
                str(RAMP_S),
                str(OUT / f"stream{suffix}.jsonl"),
            )
            seen, cpu = self._load(stream, measured)
            for name, used_s in cpu.items():
                figures[f"{name}_us_per_token"] = (used_s - idle[name] * seen["seconds"]) * 1e6 / seen["tokens"]
            mock.terminate()
        return figures

    @contextmanager
    def _fleet(self) -> Iterator[subprocess.Popen[str]]:
        command: list[str | Path] = [
            self._mock,
            *map(str, (self._first, 0, WORKERS, TOKENS_PER_S)),
            OUT / "handoffs.jsonl",
        ]
        with running(command, LOAD_CORE, OUT / "mock_fleet.log", subprocess.PIPE) as mock:
            assert mock.stdout is not None
            assert mock.stdout.readline() == "ready\n", "the mock fleet did not start"
            yield mock

    @contextmanager
    def _picker(self, case: Case, group: ControlGroup | None) -> Iterator[subprocess.Popen[str]]:
        assert case.flags is not None
        urls = [f"--{case.role}=http://127.0.0.1:{self._first + index}" for index in range(WORKERS)]
        grpc, status = f"127.0.0.1:{self._grpc}", str(self._status)
        command = [self._eldr, "epp", "--grpc-listen", grpc, "--port", status, *urls, *case.flags]
        with running(command, PROXY_CORE, OUT / "picker.log", group=group) as picker:
            self._until(f"http://127.0.0.1:{self._status}/ready", picker)
            yield picker

    @contextmanager
    def _proxy(self, case: Case, group: ControlGroup | None) -> Iterator[subprocess.Popen[str]]:
        example = (ROOT / "examples" / "envoy-epp.yaml").read_text()
        text = envoy_config(example, self._front, self._grpc, range(self._first, self._first + WORKERS))
        if case.duplex:
            text = text.replace(MODE, DUPLEX_MODE)
        if case.flags is None:
            text = EPP_FILTER.sub("", text)
        config = OUT / "envoy.yaml"
        config.write_text(text)
        flags: list[str | Path] = ["-c", config, "--disable-hot-restart", "--concurrency", "1", "--log-level", "error"]
        with running([self._envoy, *flags], PROXY_CORE, OUT / "envoy.log", group=group) as proxy:
            self._until(f"http://127.0.0.1:{self._front}/v1/models", proxy)
            yield proxy

    def _until(self, url: str, process: subprocess.Popen[str]) -> None:
        deadline_s = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline_s and process.poll() is None:
            try:
                with urllib.request.urlopen(url, timeout=READY_WITHIN_S):
                    return
            except OSError:
                time.sleep(0.05)
        raise SystemExit(f"nothing answers at {url}: see the logs in {OUT}")

    def _idle(self, measured: dict[str, Callable[[], float]]) -> dict[str, float]:
        """The CPU seconds that each takes in a second in which nobody asks."""
        before, begun_s = {name: seconds() for name, seconds in measured.items()}, time.monotonic()
        time.sleep(self._seconds)
        passed_s = time.monotonic() - begun_s
        return {name: (seconds() - before[name]) / passed_s for name, seconds in measured.items()}

    def _load(
        self, arguments: tuple[str, ...], measured: dict[str, Callable[[], float]]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        """What the clients saw, and the CPU seconds of picker and Envoy in their window."""
        with running((self._client, *arguments), LOAD_CORE, OUT / "load_client.log", subprocess.PIPE) as client:
            assert client.stdout is not None
            clocks = []
            for _ in ("begin", "end"):
                assert client.stdout.readline() == "window\n", "the clients failed"
                clocks.append({name: seconds() for name, seconds in measured.items()})
            seen: dict[str, Any] = json.loads(client.stdout.read())
        if seen["errors"]:
            raise SystemExit(f"{seen['errors']} requests failed: see the logs in {OUT}")
        return seen, {name: clocks[1][name] - clocks[0][name] for name in measured}


def clock(process: subprocess.Popen[str], group: ControlGroup | None) -> Callable[[], float]:
    """What tells the CPU seconds of a process so far."""
    return (lambda: cpu_s(process.pid)) if group is None else (lambda: group.cpu_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envoy", required=True, metavar="PROGRAM", help="Envoy")
    parser.add_argument("--eldr", default=str(Path(sys.executable).parent / "eldr"), metavar="PROGRAM", help="eldr")
    parser.add_argument("--seconds", type=float, default=5.0, help="the length of each window (5)")
    parser.add_argument("--port", type=int, default=21000, help="the first of 12 free ports (21000)")
    parser.add_argument("--only", default="", help="cases whose names begin so")
    arguments = parser.parse_args()
    with control_group("trial") as group:
        if group is None:
            print("no control group can be made: CPU time is that of /proc, in ticks of 10 ms")
    bench = Bench(arguments.envoy, arguments.eldr, arguments.seconds, arguments.port)
    found = {case.name: bench.case(case) for case in CASES if case.name.startswith(arguments.only)}
    columns = list(dict.fromkeys(name for figures in found.values() for name in figures))
    table = Table("case", *columns)
    for name, figures in found.items():
        table.add_row(name, *(f"{figures[column]:.3f}" if column in figures else "" for column in columns))
    Console(width=240).print(table)
    (OUT / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
