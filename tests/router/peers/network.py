"""Replicas without sockets: what each hears of a simulated bus that loses, repeats, delays and mixes up frames."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np

from eldr.policies.base import Decision, DecodeRequest, Policy
from eldr.policies.shares import Share
from eldr.router.config.groups import QueueLimits
from eldr.router.fleet.workers import Fleet
from eldr.router.observe.counters import Metrics
from eldr.router.peers import wire
from eldr.router.peers.others import Others, PeerCounters
from eldr.router.peers.wire import Ask, Events, Frame, Heartbeat, Snapshot, Start
from eldr.router.placement.admission import Admission
from eldr.router.placement.elsewhere import Elsewhere
from eldr.router.placement.lanes import Lanes

URLS = ["http://d0", "http://d1", "http://d2"]
D = 6


class Sums(Policy):
    """Keeps the sums of what it is told of other replicas: worker -> requests, context tokens and codes."""

    name = "sums"

    def __init__(self) -> None:
        self.told: list[tuple[str, Share]] = []

    def choose(self, request: DecodeRequest, in_flight: object) -> Decision:
        raise NotImplementedError

    def elsewhere_started(self, worker: str, share: Share) -> None:
        assert not any(share is each for _, each in self.told)
        self.told.append((worker, share))

    def elsewhere_finished(self, worker: str, share: Share) -> None:
        at = [share is each and worker == where for where, each in self.told].index(True)
        del self.told[at]

    @property
    def sums(self) -> dict[str, tuple[int, ...]]:
        """Worker -> count, context tokens, and the sum of the codes."""
        return sums_of(self.told)


def sums_of(running: list[tuple[str, Share]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, np.ndarray] = {}
    for worker, share in running:
        codes = [] if share.codes is None else share.codes.tolist()
        one = np.array([1, share.context_tokens, *(codes or [0] * D)])
        found[worker] = found.get(worker, np.zeros_like(one)) + one
    return {worker: tuple(map(int, sums)) for worker, sums in found.items()}


class Listener:
    """What one replica knows of the others: fleet, policy and `Others`, without a bus."""

    def __init__(self, origin: int, ask: Callable[[int], None], asked: Callable[[int], None]) -> None:
        self.fleet = Fleet()
        self.policy = Sums()
        lanes = Lanes(
            self.fleet, lambda group: self.policy, lambda policy: None, lambda *a: None, lambda *a: None, Metrics(), 0
        )
        self.counters = PeerCounters()
        self.admission = Admission(QueueLimits())
        self.elsewhere = Elsewhere(self.fleet, lanes, self.admission)
        self.fleet.on_change(lanes.fleet_changed)
        self.fleet.on_change(self.elsewhere.fleet_changed)
        self.others = Others(origin, self.elsewhere, ask, asked, self.counters)

    def join(self, url: str) -> None:
        self.fleet.set_healthy(self.fleet.add(url, "decode", 1000), True)

    def leave(self, url: str) -> None:
        self.fleet.remove(self.fleet.workers("decode")[url])

    @property
    def load(self) -> dict[str, int]:
        return dict(self.fleet.eligible)


class Origin:
    """A replica's own requests, and the frames that it would send.

    history: sequence -> the numbers of the requests that ran after that frame.
    """

    def __init__(self, origin: int) -> None:
        self.origin = origin
        self.sequence = self.number = 0
        self.running: dict[int, Start] = {}
        self.history: dict[int, set[int]] = {0: set()}

    def events(self, starts: list[tuple[str, Share]], ends: int, chance: random.Random) -> Events:
        self.sequence += 1
        begun = []
        for url, share in starts:
            self.number += 1
            start = Start(self.number, url, share, True)
            self.running[self.number] = start
            begun.append(start)
        ended = chance.sample(sorted(self.running), min(ends, len(self.running)))
        for number in ended:
            del self.running[number]
        self.history[self.sequence] = set(self.running)
        return Events(self.origin, self.sequence, begun, [], ended, {})

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(self.origin, self.sequence, len(self.running), wire.digest_of(self.running), {})

    def snapshot(self, part: int) -> Iterator[Snapshot]:
        """In parts of so many requests."""
        running = list(self.running.values())
        cuts = list(range(0, len(running), part)) or [0]
        for index, at in enumerate(cuts):
            yield Snapshot(self.origin, self.sequence, self.number + 1, index, at == cuts[-1], running[at : at + part])


class Node:
    """A replica on the simulated network."""

    def __init__(self, network: Network, origin: int) -> None:
        self.own = Origin(origin)
        self.listener = Listener(
            origin,
            lambda other: network.send(self, Ask(origin), other),
            lambda other: self._answer(network, other),
        )
        for url in URLS:
            self.listener.join(url)

    def _answer(self, network: Network, other: int) -> None:
        for part in self.own.snapshot(2):
            network.send(self, part, other)

    @property
    def wanted(self) -> list[tuple[str, Share]]:
        return [(start.url, start.share) for start in self.own.running.values() if start.share is not None]


class Network:
    """Delivers frames mostly in the order of each origin, or not at all, or twice."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.nodes: dict[int, Node] = {}
        self.origins: dict[int, Origin] = {}
        self.drawn = 0
        self.now_s = 100.0
        self.lossy = True
        self._lines: dict[tuple[int, int], list[bytes]] = {}

    def add(self) -> Node:
        self.drawn += 1
        node = self.nodes[self.drawn] = Node(self, self.drawn)
        self.origins[self.drawn] = node.own
        return node

    def send(self, sender: Node, frame: Frame, to: int | None = None) -> None:
        data = wire.encode(frame)
        for origin in self.nodes if to is None else [to]:
            if origin == sender.own.origin or origin not in self.nodes:
                continue
            copies = self.chance.choice([0, 1, 1, 1, 2]) if self.lossy else 1
            self._lines.setdefault((sender.own.origin, origin), []).extend([data] * copies)

    def deliver(self, most: int) -> None:
        """Let some frames arrive."""
        for _ in range(most):
            lines = [line for line in self._lines.items() if line[1]]
            if not lines:
                return
            (_, to), line = self.chance.choice(lines)
            overtakes = self.lossy and self.chance.random() < 0.3
            data = line.pop(self.chance.randrange(min(len(line), 4)) if overtakes else 0)
            if to in self.nodes:
                self.nodes[to].listener.others.hear(data, self.now_s)
                self.check(self.nodes[to])

    def check(self, node: Node) -> None:
        """A replica of which nothing is missing runs what it ran after the last frame of its that arrived."""
        for peer in node.listener.others:
            if peer.sequence is not None:
                assert set(peer.running) == self.origins[peer.origin].history[peer.sequence]

    def quiet(self, seconds: int) -> None:
        """Let everything arrive, and time pass with nothing but heartbeats."""
        self.lossy = False
        for _ in range(seconds):
            self.deliver(10**6)
            self.now_s += 1.0
            for node in list(self.nodes.values()):
                self.send(node, node.own.heartbeat())
            self.deliver(10**6)
            for node in self.nodes.values():
                node.listener.others.look(self.now_s)
