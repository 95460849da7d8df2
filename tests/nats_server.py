"""A NATS server of its own for a test."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from eldr.demo.ports import free_ports

PROGRAM = shutil.which("nats-server", path=str(Path(sys.executable).parent)) or shutil.which("nats-server")


class NatsServer:
    """It can be stopped, and started again at the same address."""

    def __init__(self, *arguments: str) -> None:
        self._port = free_ports(1)[0]
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._port}"

    def launch(self) -> None:
        """Start it. It listens soon after. The test is skipped where it is not installed."""
        if PROGRAM is None:
            pytest.skip("nats-server is not installed")
        command = [PROGRAM, "-a", "127.0.0.1", "-p", str(self._port), *self._arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._port), 1).close()
        except OSError:
            return False
        return True

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
