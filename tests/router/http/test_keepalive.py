"""TCP keepalive, as the kernel shows it."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import pytest

from eldr.router.http.keepalive import keep_alive
from tests.router.harness import on_uvloop, running, until

ESTABLISHED, KEEPALIVE = "01", "02"


def timers(from_port: int | None = None, to_port: int | None = None) -> set[str]:
    """The running timers of the established connections from or to a port (proc_net_tcp in the kernel's documents)."""
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, peer, state, _, timer, *_ = line.split()
        ports = int(local.partition(":")[2], 16), int(peer.partition(":")[2], 16)
        if state == ESTABLISHED and (ports[0] == from_port or ports[1] == to_port):
            found.add(timer.partition(":")[0])
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@on_uvloop
async def test_silent_connections_are_kept_alive_on_both_sides() -> None:
    async with running(health_interval_s=60, load_interval_s=60) as s:
        s.decode[0].token_gap_s = 0.5
        asking = asyncio.create_task(s.post())
        await until(lambda: s.decode[0].running == 1, "it runs")
        worker_port = int(s.decode[0].url.rpartition(":")[2])
        # Another timer runs for a moment after something was sent.
        await until(lambda: timers(to_port=worker_port) == {KEEPALIVE}, "probes to the worker")
        await until(lambda: timers(from_port=s.router.port) == {KEEPALIVE}, "probes to the client")
        assert (await asking).status == 200


def test_a_unix_socket_has_no_keepalive() -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        keep_alive(one, 30, 10)
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
