"""Processes under measurement: compiled, started, weighed and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
END_WAIT_S = 10.0
CGROUPS = Path("/sys/fs/cgroup")


def compile_c(name: str, folder: Path) -> Path:
    """Compile `name`.c of this folder with the system's compiler; the program's path."""
    program = folder / name
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-o", program, HERE / f"{name}.c"], check=True)
    return program


class ControlGroup:
    """A control group of Linux: the kernel adds up the CPU time of all that ever ran in it, to the nanosecond or so."""

    def __init__(self, folder: Path, usage: str) -> None:
        self._folder = folder
        self._usage = folder / usage

    @property
    def procs(self) -> Path:
        """Who writes its process id there is in the group, with all that it starts later."""
        return self._folder / "cgroup.procs"

    @property
    def cpu_s(self) -> float:
        text = self._usage.read_text()
        if self._usage.name == "cpu.stat":  # version 2
            return int(text.split("usage_usec ", 1)[1].split()[0]) / 1e6
        return int(text) / 1e9


@contextmanager
def control_group(name: str) -> Iterator[ControlGroup | None]:
    """A new group below this process's own, version 2 or the cpuacct of version 1. None where it cannot be made."""
    made = None
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "cpuacct", "cpu,cpuacct"):
            continue
        folder = CGROUPS / controllers / path.strip("/") / f"eldr-{name}-{os.getpid()}"
        usage = "cpuacct.usage" if controllers else "cpu.stat"
        with contextlib.suppress(OSError):
            folder.mkdir()
            if (folder / usage).exists():
                made = folder
                break
            folder.rmdir()
    try:
        yield None if made is None else ControlGroup(made, usage)
    finally:
        if made is not None:
            _remove(made)


def _remove(group: Path) -> None:
    """It is busy until the kernel has buried the last process."""
    deadline_s = time.monotonic() + END_WAIT_S
    while True:
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)
        else:
            return


@contextmanager
def running(
    command: Sequence[str | Path],
    core: int,
    log: Path,
    stdout: int | None = None,
    group: ControlGroup | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """`command` on one core, in a process group of its own that is ended at the end. group: it joins that first."""
    joins = [] if group is None else ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.procs)]
    with log.open("ab") as sink:
        process = subprocess.Popen(
            [*joins, "taskset", "--cpu-list", str(core), *map(str, command)],
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
