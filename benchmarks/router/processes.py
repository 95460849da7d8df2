"""Processes under measurement: compiled, started, weighed and ended."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
END_WAIT_S = 10.0


def compile_c(name: str, folder: Path) -> Path:
    """Compile `name`.c of this folder with the system's compiler; the program's path."""
    program = folder / name
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-o", program, HERE / f"{name}.c"], check=True)
    return program


@contextmanager
def running(
    command: Sequence[str | Path], core: int, log: Path, stdout: int | None = None
) -> Iterator[subprocess.Popen[str]]:
    """`command` on one core, in a process group of its own that is ended at the end."""
    with log.open("ab") as sink:
        process = subprocess.Popen(
            ["taskset", "--cpu-list", str(core), *map(str, command)],
            stdout=sink if stdout is None else stdout,
            stderr=sink,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(END_WAIT_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def cpu_s(pid: int) -> float:
    """User and system time of a process, its threads and its children, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    own = sum(map(int, fields[11:15])) / TICKS_PER_S
    return own + sum(cpu_s(child) for child in _children(pid))


def peak_mib(pid: int) -> float:
    """Largest resident memory of a process so far, its children's included, MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    own = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    return own + sum(peak_mib(child) for child in _children(pid))


def _children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]
