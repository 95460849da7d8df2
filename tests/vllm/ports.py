"""Free ports, so that two test runs on one machine do not meet."""

from __future__ import annotations

import random
import socket

_given: set[int] = set()


def http_port() -> int:
    return _free(range(12000, 22000))


def side_channel_port() -> int:
    return _free(range(22000, 32000))


def _free(ports: range) -> int:
    # Not the kernel's choice (port 0): those are handed to outgoing connections too, and taken again before use.
    for port in random.sample(ports, len(ports)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _given:
            _given.add(port)
            return port
    raise AssertionError(f"no free port from {ports[0]} to {ports[-1]}")
