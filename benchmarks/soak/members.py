"""Worker processes of a mock fleet: started, killed, stopped and made to misbehave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from eldr.demo.ports import free_ports
from eldr.lifeline import die_with

WORKER = Path(__file__).with_name("worker.py")


@dataclass(eq=False)
class Member:
    """One mock worker. faults: (monotonic time, what) of everything that was done to it."""

    role: str
    port: int = field(default_factory=lambda: free_ports(1)[0])
    process: subprocess.Popen[bytes] | None = None
    stopped: bool = False
    faults: list[tuple[float, str]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def runs(self) -> bool:
        return self.process is not None and not self.stopped

    def launch(self, used: Path) -> None:
        """Start its process. used: the file in which spent hand-offs are noted."""
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), self.role, str(self.port), str(used)],
            process_group=0,
            preexec_fn=die_with(os.getpid()),
        )
        self.stopped = False

    def kill(self) -> None:
        self.faults.append((time.monotonic(), "killed"))
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def signal(self, number: int) -> None:
        if self.process is not None:
            self.faults.append((time.monotonic(), signal.Signals(number).name))
            if number in (signal.SIGSTOP, signal.SIGCONT):
                self.stopped = number == signal.SIGSTOP
            self.process.send_signal(number)
