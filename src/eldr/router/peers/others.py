"""What is known of the other replicas: what each runs, whether anything was missed, and when it was last heard.

Every replica is the authority on its own requests. Its frames of events are numbered. Whoever misses one keeps what it
knows, and asks for a snapshot: all that the origin ran after a certain frame. Meanwhile further frames arrive, so the
snapshot is merged with them: numbers of requests grow, and no request ends before it starts. Therefore a request runs
if the snapshot or a later start names it, and no end does.

No clock and no IO: time is an argument.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Final

from eldr.policies.shares import Share
from eldr.router.peers import wire
from eldr.router.peers.wire import Ask, Bye, Events, FrameError, Heartbeat, Level, Snapshot, Start, Taught
from eldr.router.placement.elsewhere import Elsewhere, RunningElsewhere

# A replica that was not heard for so long has lost its requests here. It says something every HEARTBEAT_S.
PEER_TIMEOUT_S: Final = 5.0
HEARTBEAT_S: Final = 1.0
# How long to wait for a snapshot before asking again.
ASK_AGAIN_S: Final = 1.0
# What frames may make this process keep: so many replicas, requests of one and of all, and bytes of profiles. Requests
# beyond that many bytes still count as load. Snapshots of which parts are missing get as much again.
MOST_PEERS: Final = 256
MOST_RUNNING: Final = 2**16
MOST_RUNNING_OF_ALL: Final = 2**18
MOST_PROFILE_BYTES: Final = 2**29
# How many ended requests of one and of all to remember while snapshots are on their way.
MOST_ENDED: Final = 2**16
MOST_ENDED_OF_ALL: Final = 2**20


class PeerCounters:
    """What happened between the replicas.

    received: frames, by kind. sent: frames and lost ones.
    refused: frames that could not be believed.
    gaps: how often something was missed.
    resyncs: snapshots that were taken over.
    expired: replicas that were not heard any more.
    """

    def __init__(self) -> None:
        self.received: defaultdict[str, int] = defaultdict(int)
        self.sent = 0
        self.sent_bytes = 0
        self.lost = 0
        self.refused = 0
        self.gaps = 0
        self.resyncs = 0
        self.expired = 0


class _Arriving:
    """A snapshot of which the first parts are there."""

    def __init__(self, sequence: int) -> None:
        self.sequence: Final = sequence
        self.parts = 0
        self.starts: dict[int, Start] = {}
        self.profile_bytes = 0


class Peer:
    """One other replica.

    heard_s: when it was last heard.
    sequence: of the last frame of events up to which nothing was missed. None if something was.
    running: number -> request.
    levels: name of a base model -> what it needs there.

    While something is missing, the frames from `first` to `latest` have been heard without a gap between them, and
    `ended` and `computed` are the requests that they named. There are none if `latest` is less than `first`.
    """

    def __init__(self, origin: int) -> None:
        self.origin: Final = origin
        self.heard_s = 0.0
        self.sequence: int | None = 0
        self.running: dict[int, RunningElsewhere] = {}
        self.digest = 0
        self.levels: dict[str, Level] = {}
        self.first = self.latest = 0
        self.ended: set[int] = set()
        self.computed: set[int] = set()
        self.arriving: _Arriving | None = None
        self.asked_s = -math.inf

    @property
    def remembers(self) -> int:
        """How many numbers it remembers until a snapshot is there."""
        return len(self.ended) + len(self.computed)

    def miss(self, next_sequence: int) -> None:
        """Something was missed. next_sequence: the frame from which on all is heard again."""
        self.sequence = None
        self.first, self.latest = next_sequence, next_sequence - 1
        self.ended.clear()
        self.computed.clear()
        self.arriving = None


class Others:
    """The other replicas of a fleet.

    origin: of this one, whose frames may come back.
    ask: asks an origin for a snapshot. asked: called with an origin that asks this one.
    """

    def __init__(
        self,
        origin: int,
        elsewhere: Elsewhere,
        ask: Callable[[int], None],
        asked: Callable[[int], None],
        counters: PeerCounters,
    ) -> None:
        self._origin = origin
        self._elsewhere = elsewhere
        self._ask = ask
        self._asked = asked
        self._counters = counters
        self._peers: dict[int, Peer] = {}
        self._profile_bytes = 0
        self._looked_s = 0.0

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def __len__(self) -> int:
        return len(self._peers)

    @property
    def synced(self) -> int:
        """How many of them are known completely."""
        return sum(peer.sequence is not None for peer in self._peers.values())

    # Frames.

    def hear(self, data: bytes, now_s: float) -> None:
        """Take note of a frame. One that cannot be believed is counted and dropped."""
        try:
            frame = wire.decode(data)
        except FrameError:
            self._counters.refused += 1
            return
        if frame.origin == self._origin:
            return
        self._counters.received[type(frame).__name__.lower()] += 1
        if isinstance(frame, Ask):
            self._asked(frame.origin)
            return
        if isinstance(frame, Bye):
            self._forget(frame.origin)
            return
        peer = self._peers.get(frame.origin)
        if isinstance(frame, Taught):
            if peer is not None:
                self._elsewhere.learned(frame.model, frame.lesson)
            return
        if peer is None:
            if len(self._peers) >= MOST_PEERS:
                self._counters.refused += 1
                return
            peer = self._peers[frame.origin] = Peer(frame.origin)
        peer.heard_s = now_s
        if isinstance(frame, Events):
            self._events(peer, frame)
        elif isinstance(frame, Heartbeat):
            self._heartbeat(peer, frame)
        else:
            peer.asked_s = now_s  # it is on its way
            self._snapshot(peer, frame)
        if peer.sequence is None and now_s - peer.asked_s >= ASK_AGAIN_S:
            peer.asked_s = now_s
            self._ask(peer.origin)
        self._elsewhere.admit()

    def look(self, now_s: float) -> None:
        """Forget who was not heard for too long. To be called at least every HEARTBEAT_S.

        If this process itself stood still, it has not listened. So that time does not count.
        """
        stood_s = now_s - self._looked_s - 2 * HEARTBEAT_S if self._looked_s else 0.0
        self._looked_s = now_s
        for peer in list(self._peers.values()):
            if stood_s > 0:
                peer.heard_s = min(peer.heard_s + stood_s, now_s)
            if now_s - peer.heard_s > PEER_TIMEOUT_S:
                self._counters.expired += 1
                self._forget(peer.origin)

    def _forget(self, origin: int) -> None:
        peer = self._peers.pop(origin, None)
        if peer is not None:
            for number in list(peer.running):
                self._end(peer, number)
            self._level()
            self._elsewhere.admit()

    # Events.

    def _events(self, peer: Peer, frame: Events) -> None:
        if peer.sequence is not None:
            if frame.sequence <= peer.sequence:
                return  # it came twice
            if frame.sequence == peer.sequence + 1:
                peer.sequence = frame.sequence
                self._apply(peer, frame)
                return
            self._missed(peer, frame.sequence)
        elif frame.sequence <= peer.latest:
            return
        elif frame.sequence != peer.latest + 1:
            peer.miss(frame.sequence)
        peer.latest = frame.sequence
        peer.ended.update(frame.ended)
        peer.computed.update(frame.computed)
        if peer.remembers > MOST_ENDED or sum(each.remembers for each in self) > MOST_ENDED_OF_ALL:
            peer.miss(frame.sequence + 1)
        self._apply(peer, frame)

    def _missed(self, peer: Peer, next_sequence: int) -> None:
        if peer.sequence is not None and (peer.sequence or peer.running):  # else it is only new here
            self._counters.gaps += 1
        peer.miss(next_sequence)

    def _apply(self, peer: Peer, frame: Events) -> None:
        for start in frame.starts:
            self._start(peer, start)
        for number in frame.computed:
            running = peer.running.get(number)
            if running is not None:
                self._elsewhere.prompt_computed(running)
        for number in frame.ended:
            self._end(peer, number)
        if frame.levels:
            peer.levels = {name: level for name, level in {**peer.levels, **frame.levels}.items() if any(level)}
            if len(peer.levels) > wire.MOST_GROUPS:
                peer.levels = {}
            self._level()

    def _heartbeat(self, peer: Peer, frame: Heartbeat) -> None:
        if frame.levels != peer.levels:
            peer.levels = {name: level for name, level in frame.levels.items() if any(level)}
            self._level()
        if peer.sequence is None:
            if frame.sequence > peer.latest:
                peer.miss(frame.sequence + 1)
        elif frame.sequence >= peer.sequence:
            checks = (frame.sequence, frame.running, frame.digest) == (peer.sequence, len(peer.running), peer.digest)
            if not checks:
                self._missed(peer, frame.sequence + 1)

    # Snapshots.

    def _snapshot(self, peer: Peer, frame: Snapshot) -> None:
        if peer.sequence == 0 and not peer.running and frame.sequence:
            peer.miss(frame.sequence + 1)  # it is new here, and everybody was asked
        if peer.sequence is not None:
            return  # somebody else asked for it
        arriving = peer.arriving
        if arriving is None or arriving.sequence != frame.sequence:
            if frame.part:
                return
            arriving = peer.arriving = _Arriving(frame.sequence)
        if frame.part != arriving.parts:
            return  # it came twice, or one was lost: then all are asked for again
        arriving.parts += 1
        for start in frame.starts:
            number = start.number
            if number < frame.next_number and number not in peer.ended and number not in arriving.starts:
                arriving.starts[number] = start
                arriving.profile_bytes += _profile_bytes(start.share)
        if self._is_too_much(arriving):
            self._counters.refused += 1
            peer.arriving = None
        elif frame.last:
            peer.arriving = None
            # All frames after the snapshot must have been heard: those between `first` and `latest`, if any.
            if peer.first <= frame.sequence + 1:
                self._merge(peer, arriving, frame.next_number)

    def _is_too_much(self, arriving: _Arriving) -> bool:
        """Whether the snapshots that arrive, this one among them, take more memory than they may."""
        all_arriving = [peer.arriving for peer in self._peers.values() if peer.arriving is not None]
        return (
            len(arriving.starts) > MOST_RUNNING
            or sum(len(each.starts) for each in all_arriving) > MOST_RUNNING_OF_ALL
            or sum(each.profile_bytes for each in all_arriving) > MOST_PROFILE_BYTES
        )

    def _merge(self, peer: Peer, snapshot: _Arriving, next_number: int) -> None:
        """Let this peer run what is in its snapshot and has not ended, and what it started later."""
        found = snapshot.starts
        for number in [number for number in peer.running if number < next_number and number not in found]:
            self._end(peer, number)
        for number, start in found.items():
            if number not in peer.ended:
                self._start(peer, start)
                if start.computed or number in peer.computed:
                    running = peer.running.get(number)
                    if running is not None:
                        self._elsewhere.prompt_computed(running)
        peer.sequence = max(snapshot.sequence, peer.latest)
        peer.ended.clear()
        peer.computed.clear()
        self._counters.resyncs += 1

    # Requests.

    def _start(self, peer: Peer, start: Start) -> None:
        if start.number in peer.running:
            return
        if len(peer.running) >= MOST_RUNNING or self._elsewhere.running >= MOST_RUNNING_OF_ALL:
            self._counters.refused += 1
            return
        share, size = start.share, _profile_bytes(start.share)
        if self._profile_bytes + size > MOST_PROFILE_BYTES:
            share, size = None, 0
        self._profile_bytes += size
        running = RunningElsewhere(start.url, share, start.computed)
        peer.running[start.number] = running
        peer.digest = (peer.digest + start.number) % 2**64
        self._elsewhere.started(running)

    def _end(self, peer: Peer, number: int) -> None:
        running = peer.running.pop(number, None)
        if running is None:
            return
        peer.digest = (peer.digest - number) % 2**64
        self._profile_bytes -= _profile_bytes(running.share)
        self._elsewhere.ended(running)

    def _level(self) -> None:
        needs: dict[str, tuple[int, int]] = {}
        for peer in self._peers.values():
            for name, level in peer.levels.items():
                promised, waiting = needs.get(name, (0, 0))
                needs[name] = promised + level.promised, waiting + level.waits
        self._elsewhere.need(needs)


def _profile_bytes(share: Share | None) -> int:
    return 0 if share is None or share.codes is None else len(share.codes)
