"""CPU time that sharing takes of a request: of the router that has it, and of each other that hears of it.

    python benchmarks/peers/costs.py [--requests 20000]

Frames of BATCH starts and ends, with profiles of 48 x 128 experts, are written, read, and taken note of by load and
policy (expected-union), without a bus. The bus adds a cost for each frame, whatever is in it. Prints the median over
rounds, in microseconds of CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from eldr.activation import ActivationModel
from eldr.policies.base import Policy
from eldr.policies.expected_union import ExpectedUnion
from eldr.policies.shares import Share
from eldr.router.config.groups import QueueLimits
from eldr.router.fleet.workers import Fleet
from eldr.router.observe.counters import Metrics
from eldr.router.peers import wire
from eldr.router.peers.others import Others, PeerCounters
from eldr.router.peers.wire import Events, Start
from eldr.router.placement.admission import Admission
from eldr.router.placement.elsewhere import Elsewhere
from eldr.router.placement.lanes import Lanes

LAYERS, EXPERTS, TOP_K = 48, 128, 8
WORKERS, BATCH, RUNNING, ROUNDS = 8, 8, 400, 5


def policy() -> Policy:
    """Expected-union that knows its model before the first request."""
    size = LAYERS * EXPERTS
    mean = np.full(size, TOP_K / EXPERTS, dtype=np.float32)
    slope, none = np.ones(size, dtype=np.float32), np.zeros((0, size), dtype=np.float32)
    return ExpectedUnion(ActivationModel(mean, mean, slope, none, none, LAYERS, TOP_K, 1.0, 0.0))


class Listener:
    """A replica that hears of others: fleet, policy and `Others`."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        own = policy()
        lanes = Lanes(
            self.fleet, lambda group: own, lambda policy: None, lambda *group: None, lambda *lane: None, Metrics(), 0
        )
        elsewhere = Elsewhere(self.fleet, lanes, Admission(QueueLimits()))
        self.fleet.on_change(lanes.fleet_changed)
        self.fleet.on_change(elsewhere.fleet_changed)
        self.others = Others(1, elsewhere, lambda origin: None, lambda origin: None, PeerCounters())
        for index in range(WORKERS):
            self.fleet.set_healthy(self.fleet.add(f"http://10.0.0.{index}:8000", "decode", 4096), True)


def measure(requests: int) -> tuple[float, float]:
    """CPU-us of a request to write, and to read and take note of."""
    rng = np.random.default_rng(1)
    shares = [Share(rng.integers(0, 200, LAYERS * EXPERTS, dtype=np.uint8), 500, True) for _ in range(64)]
    listener = Listener()
    written = heard = 0.0
    number = 0
    for sequence in range(1, requests // BATCH + 1):
        starts = []
        for _ in range(BATCH):
            number += 1
            url = f"http://10.0.0.{number % WORKERS}:8000"
            starts.append(Start(number, url, shares[number % len(shares)], True))
        ended = [each for each in range(number - RUNNING - BATCH + 1, number - RUNNING + 1) if each > 0]
        begun_s = time.process_time()
        data = wire.encode(Events(2, sequence, starts, [], ended, {}))
        written_s = time.process_time()
        listener.others.hear(data, float(sequence))
        written, heard = written + written_s - begun_s, heard + time.process_time() - written_s
    assert listener.others.synced == 1
    return written * 1e6 / requests, heard * 1e6 / requests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    args = parser.parse_args()
    found = [measure(args.requests) for _ in range(ROUNDS)]
    written, heard = (statistics.median(column) for column in zip(*found, strict=True))
    print(f"to tell: {written:.1f} us a request; to hear, of each other replica: {heard:.1f} us a request")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
