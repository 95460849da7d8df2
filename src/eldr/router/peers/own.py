"""What this replica tells the others: its own running requests, as they start and end, and all of them when asked."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Final

from eldr.learning.lessons import Lesson
from eldr.policies.shares import Share
from eldr.router.fleet.workers import Fleet
from eldr.router.peers import wire
from eldr.router.peers.bus import Bus
from eldr.router.peers.others import PeerCounters
from eldr.router.peers.wire import Bye, Events, Heartbeat, Level, Snapshot, Start
from eldr.router.placement.admission import Admission
from eldr.router.placement.sharing import Sharing

# Events are collected for so long, and sent in one frame: a frame costs more than what is in it.
BATCH_S: Final = 0.004
# Several replicas that ask for a snapshot within this time get one together.
SNAPSHOT_WAIT_S: Final = 0.05
# The next part of a snapshot waits until no more than this waits to be sent.
SNAPSHOT_BACKLOG_BYTES: Final = 4 * 2**20
# So many lessons are shared between two heartbeats. Models are learned from the last thousand, and a sample will do.
LESSONS_PER_BEAT: Final = 32


class Own(Sharing):
    """Numbers this replica's requests and frames, and sends them.

    Nothing waits for the bus, and nothing piles up before it: what cannot be sent is lost, others find that out by the
    frames' numbers, and ask for a snapshot.
    """

    def __init__(self, origin: int, bus: Bus, fleet: Fleet, admission: Admission, counters: PeerCounters) -> None:
        self._origin = origin
        self._bus = bus
        self._fleet = fleet
        self._admission = admission
        self._counters = counters
        self._running: dict[int, Start] = {}
        self._digest = 0
        self._last_number = 0
        self._sequence = 0
        self._starts: list[Start] = []
        self._computed: list[int] = []
        self._ended: list[int] = []
        self._bytes = 0
        self._lessons_left = LESSONS_PER_BEAT
        self._levels: dict[str, Level] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._asking: set[int] = set()
        self._answering: asyncio.Task[None] | None = None
        self._closed = False

    # What happens to requests.

    def started(self, url: str, share: Share | None) -> int:
        if len(url) > wire.MOST_URL_BYTES:
            return 0  # nobody would believe it
        self._last_number = number = self._last_number + 1
        start = Start(number, url, share, share is None or not share.computes_prompt)
        self._running[number] = start
        self._digest += number
        self._starts.append(start)
        self._bytes += wire.start_bytes(start)
        if self._bytes > wire.FULL_FRAME_BYTES:
            self._flush()
        elif self._timer is None:
            self._schedule()
        return number

    def prompt_computed(self, number: int) -> None:
        start = self._running.get(number)
        if start is not None and not start.computed:
            self._running[number] = start._replace(computed=True)
            self._computed.append(number)
            if self._timer is None:
                self._schedule()

    def ended(self, number: int) -> None:
        if self._running.pop(number, None) is None:
            return
        self._digest -= number
        self._ended.append(number)
        if self._timer is None:
            self._schedule()

    def learned(self, model: str, lesson: Lesson) -> None:
        words = lesson.asked.words
        fits = len(wire.text_bytes(model)) <= wire.MOST_NAME_BYTES and len(lesson.profile) <= wire.MOST_CODES
        if self._lessons_left and fits and (words is None or len(words) <= wire.MOST_WORDS) and self._bus.up:
            self._lessons_left -= 1
            self._send(wire.encode(wire.Taught(self._origin, model, lesson)))

    def admission_changed(self) -> None:
        if self._timer is None:
            self._schedule()

    def _schedule(self) -> None:
        if not self._closed:
            self._timer = asyncio.get_running_loop().call_later(BATCH_S, self._flush)

    # Frames.

    def _flush(self) -> None:
        """Send what has happened since the last frame."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        levels = self._current_levels()
        before = self._levels
        changed = {name: level for name, level in levels.items() if before.get(name) != level}
        changed |= {name: Level(0, False) for name in before if name not in levels}
        if not (self._starts or self._computed or self._ended or changed):
            return
        self._sequence += 1
        frame = Events(self._origin, self._sequence, self._starts, self._computed, self._ended, changed)
        self._starts, self._computed, self._ended, self._bytes, self._levels = [], [], [], 0, levels
        if self._bus.up:
            self._send(wire.encode(frame))
        else:
            self._counters.lost += 1

    def _current_levels(self) -> dict[str, Level]:
        levels: dict[str, Level] = {}
        for group in self._fleet.groups:
            level = Level(max(group.promised, 0), self._admission.waits_for_slots(group))
            name = group.name
            if any(level) and len(levels) < wire.MOST_GROUPS and len(wire.text_bytes(name)) <= wire.MOST_NAME_BYTES:
                levels[name] = level
        return levels

    def _send(self, data: bytes, to: int | None = None) -> bool:
        if not self._bus.publish(data, to):
            self._counters.lost += 1
            return False
        self._counters.sent += 1
        self._counters.sent_bytes += len(data)
        return True

    def beat(self) -> None:
        """Send a sign of life."""
        self._flush()
        self._lessons_left = LESSONS_PER_BEAT
        if self._bus.up:
            frame = Heartbeat(
                self._origin, self._sequence, len(self._running), self._digest % 2**64, self._current_levels()
            )
            self._send(wire.encode(frame))

    def ask(self, origin: int | None) -> None:
        """Ask a replica for a snapshot, or all of them."""
        self._send(wire.encode(wire.Ask(self._origin)), origin)

    def asked(self, origin: int) -> None:
        """A replica asks for a snapshot. It may be asked for in anybody's name, so all that is kept is one task."""
        self._asking.add(origin)
        if len(self._asking) > 2:
            self._asking = set(itertools.islice(self._asking, 2))  # two are as good as all
        if self._answering is None and not self._closed:
            self._answering = asyncio.get_running_loop().create_task(self._answer())

    async def _answer(self) -> None:
        await asyncio.sleep(SNAPSHOT_WAIT_S)
        to = self._asking.pop() if len(self._asking) == 1 else None
        self._asking.clear()
        try:
            self._flush()
            for part in self._snapshot():
                if not self._send(part, to):
                    break
                await asyncio.sleep(0)
                while self._bus.backlog_bytes > SNAPSHOT_BACKLOG_BYTES:
                    await asyncio.sleep(BATCH_S)
        finally:
            self._answering = None

    def _snapshot(self) -> Iterator[bytes]:
        """All that runs now, in frames. Requests may start and end between two of them."""
        sequence, next_number = self._sequence, self._last_number + 1
        running = list(self._running.values())
        index = at = 0
        while True:
            begin, size = at, 0
            while at < len(running) and size < wire.FULL_FRAME_BYTES:
                size += wire.start_bytes(running[at])
                at += 1
            last = at >= len(running)
            yield wire.encode(Snapshot(self._origin, sequence, next_number, index, last, running[begin:at]))
            if last:
                return
            index += 1

    def close(self) -> None:
        """Say goodbye. Requests that still run are no longer this replica's."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._answering is not None:
            self._answering.cancel()
        if self._bus.up:
            self._send(wire.encode(Bye(self._origin)))
