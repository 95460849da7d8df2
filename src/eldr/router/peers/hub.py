"""The parent's part of what the processes of one machine exchange: it passes messages on, and reads none of them."""

from __future__ import annotations

import itertools
import socket
from typing import Final

from eldr.router.peers import channel, wire
from eldr.router.peers.channel import Channel, open_channel

# How many things to remember for processes that start later.
MOST_KEPT: Final = 4096
# How many questions may be open.
MOST_QUESTIONS: Final = 1024


class _Link:
    """The channel to one process.

    origin: as which it is known. 0 before it says so.
    ready: whether it can be asked and told things.
    """

    def __init__(self) -> None:
        self.channel: Channel | None = None
        self.origin = 0
        self.ready = False

    def send(self, kind: int, number: int, data: bytes) -> None:
        if self.channel is not None:
            self.channel.send(kind, number, data)


class Hub:
    """Connects the processes of one machine."""

    def __init__(self) -> None:
        self._links: dict[_Link, None] = {}
        self._kept: dict[bytes, bytes] = {}
        self._numbers = itertools.count(1)
        self._questions: dict[int, tuple[_Link, int]] = {}

    async def attach(self, sock: socket.socket) -> None:
        """Connect one more process. sock: the parent's end."""
        link = _Link()
        link.channel = await open_channel(
            sock, lambda kind, number, data: self._hear(link, kind, number, data), lambda: self._leave(link)
        )
        self._links[link] = None

    def _others(self, link: _Link) -> list[_Link]:
        return [other for other in self._links if other is not link]

    def _leave(self, link: _Link) -> None:
        """A process has ended, however. What it ran has ended too."""
        self._links.pop(link, None)
        if link.origin:
            for other in self._links:
                other.send(channel.FRAME, 0, wire.encode(wire.Bye(link.origin)))

    def _hear(self, link: _Link, kind: int, number: int, data: bytes) -> None:
        if kind == channel.HELLO:
            link.origin = number
        elif kind == channel.FRAME:
            for other in self._others(link):
                if number in (0, other.origin):
                    other.send(channel.FRAME, 0, data)
        elif kind == channel.ASK:
            self._ask(link, number, data)
        elif kind == channel.ANSWER:
            asker, its_number = self._questions.get(number, (None, 0))
            if asker is not None:
                asker.send(channel.ANSWER, its_number, data)
        elif kind == channel.TELL:
            self._tell(link, data)
        elif kind == channel.KEEP:
            what, _, rest = data.partition(b"\n")
            topic, _, details = rest.partition(b"\n")
            message = what + b"\n" + details
            self._kept.pop(topic, None)
            self._kept[topic] = message
            while len(self._kept) > MOST_KEPT:
                del self._kept[next(iter(self._kept))]
            self._tell(link, message)
        elif kind == channel.FORGET:
            self._kept.pop(data, None)
        elif kind == channel.READY:
            link.ready = True
            for message in self._kept.values():
                link.send(channel.TELL, 0, message)

    def _tell(self, link: _Link, message: bytes) -> None:
        for other in self._others(link):
            if other.ready:
                other.send(channel.TELL, 0, message)

    def _ask(self, link: _Link, its_number: int, data: bytes) -> None:
        asked = [other for other in self._others(link) if other.ready]
        number = next(self._numbers)
        self._questions[number] = link, its_number
        while len(self._questions) > MOST_QUESTIONS:
            del self._questions[next(iter(self._questions))]
        link.send(channel.EXPECT, its_number, len(asked).to_bytes(4, "little"))
        for other in asked:
            other.send(channel.ASK, number, data)
