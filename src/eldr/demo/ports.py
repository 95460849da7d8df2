"""Free ports of this machine for workers and routers that are about to start."""

from __future__ import annotations

import random
import socket

from eldr.errors import EldrError

# Below the range that Linux takes the ports of outgoing connections from.
FIRST_PORT, END_PORT = 12000, 32000

_given: set[int] = set()


def free_ports(count: int) -> list[int]:
    """`count` ports of 127.0.0.1 that nobody listens on, drawn at random, none given before in this process.

    A worker takes its port half a minute later: drawn in order, two demos started together would get the same ones.
    Not the kernel's choice (port 0) either: those are handed to outgoing connections too, and taken again before use.
    Raises EldrError where there are not so many.
    """
    ports: list[int] = []
    for port in random.sample(range(FIRST_PORT, END_PORT), END_PORT - FIRST_PORT):
        if len(ports) == count:
            break
        if port not in _given and _is_free(port):
            _given.add(port)
            ports.append(port)
    if len(ports) < count:
        raise EldrError(f"fewer than {count} free ports between {FIRST_PORT} and {END_PORT}")
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
