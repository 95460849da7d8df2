"""Passes listening sockets from one process to the next: from systemd, or from the router's predecessor.

Both processes share the same sockets. Connections that are not yet accepted wait in one queue, and any process that
listens can accept them, so none is lost. Separate sockets on one port (SO_REUSEPORT) cannot promise that: when one of
them closes, the connections that wait at it are reset.
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

# systemd's protocol (sd_listen_fds): LISTEN_FDS says how many sockets there are, from descriptor 3 on.
SYSTEMD_FIRST_FD = 3
# The router's own protocol: the sockets' descriptors, and a pipe on which the successor says that it serves.
FDS, READY_FD = "ELDR_LISTEN_FDS", "ELDR_READY_FD"
READY_TIMEOUT_S = 120.0


def inherited_sockets() -> list[socket.socket]:
    """The listening sockets that this process was started with: the one for clients, then the admin API's."""
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
    """Tell the predecessor, if there is one, that this process now serves."""
    fd = os.environ.pop(READY_FD, "")
    if fd:
        os.write(int(fd), b"1")
        os.close(int(fd))


async def start_successor(sockets: Sequence[socket.socket]) -> bool:
    """Start this program again, with the same arguments, on `sockets`. Returns whether it serves.

    The new process outlives this one.
    """
    reading, writing = os.pipe()
    fds = [each.fileno() for each in sockets]
    environment = {**os.environ, FDS: ",".join(map(str, fds)), READY_FD: str(writing)}
    try:
        # Not asyncio's subprocess: the event loop would kill it when it closes.
        process = subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment, pass_fds=(*fds, writing))
    except OSError as error:
        log.error("no successor could be started, this process continues: %s", error)
        os.close(reading)
        return False
    finally:
        os.close(writing)
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        os.set_blocking(pipe.fileno(), False)
        said = await first_byte(pipe.fileno())
    if not said:
        log.error("the successor does not serve, this process continues")
        process.kill()
        process.wait()
        return False
    log.info("process %d has taken over", process.pid)
    return True


async def first_byte(fd: int) -> bytes:
    """The first byte from a pipe, or nothing if the pipe closes or READY_TIMEOUT_S passes."""
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
