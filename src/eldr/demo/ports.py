"""Finds free ports of this machine for workers and routers that are about to start."""

from __future__ import annotations

import random
import socket

from eldr.errors import EldrError

# Below the range from which Linux takes ports for outgoing connections.
FIRST_PORT, END_PORT = 12000, 32000

_given: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Returns `count` free ports of 127.0.0.1, drawn at random. None was returned before in this process.

    A worker listens on its port only half a minute later. If ports were taken in order, two demos that start together
    would get the same ones. Ports that the kernel chooses (port 0) do not help: before the worker listens, the kernel
    may give them to an outgoing connection.

    Raises EldrError if too few ports are free.
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
