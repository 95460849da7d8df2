"""Listening sockets that outlive a process: taken over from systemd or from the router's predecessor.

The sockets are shared, not copied: there is one queue of connections not yet accepted, and whoever still listens takes
them. So nothing is lost between two processes, which several sockets on one port (SO_REUSEPORT) cannot promise: what
waits at one of them is reset when it closes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

log = logging.getLogger("eldr.router")

# systemd's protocol (sd_listen_fds): so many sockets from descriptor 3 on.
SYSTEMD_FIRST_FD = 3
# Ours: their descriptors, and where the successor says that it serves.
FDS, READY_FD = "ELDR_LISTEN_FDS", "ELDR_READY_FD"
READY_TIMEOUT_S = 120.0


def inherited_sockets() -> list[socket.socket]:
    """The listening sockets that this process was started with: that of clients, then that of the admin API."""
    ours = os.environ.pop(FDS, "")
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    fds = [int(fd) for fd in ours.split(",")] if ours else []
    if not fds and count.isdecimal() and pid in ("", str(os.getpid())):
        fds = list(range(SYSTEMD_FIRST_FD, SYSTEMD_FIRST_FD + int(count)))
    sockets = [socket.socket(fileno=fd) for fd in fds]
    for each in sockets:
        each.set_inheritable(False)
    return sockets


def tell_predecessor() -> None:
    """Say that this process serves, if it was started to take over."""
    fd = os.environ.pop(READY_FD, "")
    if fd:
        os.write(int(fd), b"1")
        os.close(int(fd))


async def start_successor(sockets: Sequence[socket.socket]) -> bool:
    """Start this program again, as it was called, on these sockets; whether it serves. It outlives this process."""
    reading, writing = os.pipe()
    fds = [each.fileno() for each in sockets]
    environment = {**os.environ, FDS: ",".join(map(str, fds)), READY_FD: str(writing)}
    try:
        # Not the event loop's: it would end the process together with itself.
        process = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment, pass_fds=(*fds, writing))
    except OSError as error:
        log.error("no successor could be started, this process goes on: %s", error)
        os.close(reading)
        return False
    finally:
        os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        os.set_blocking(pipe.fileno(), False)
        said = await _first_byte(pipe.fileno())
    if not said:
        log.error("the successor does not serve, this process goes on")
        process.kill()
        process.wait()
        return False
    log.info("process %d has taken over", process.pid)
    return True


async def _first_byte(fd: int) -> bytes:
    """What comes first through a pipe; nothing if it closes or stays silent."""
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, readable.set)
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            await readable.wait()
        return os.read(fd, 1)
    except TimeoutError:
        return b""
    finally:
        loop.remove_reader(fd)
