"""TCP keepalive: notices a peer that has vanished, and keeps the path to a silent one alive.

A connection may be silent for minutes, as during a long prefill. NAT gateways and firewalls forget such connections,
some after two minutes. The peer's kernel answers keepalive probes, so a process that is busy or stopped is kept.
"""

from __future__ import annotations

import socket

# The unanswered probes that end a connection.
PROBES = 3


def keep_alive(sock: socket.socket, idle_s: int, interval_s: int) -> None:
    """Send a probe after each `idle_s` seconds of silence, and further ones every `interval_s` until one is answered.

    Does nothing to a UNIX socket.
    """
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
