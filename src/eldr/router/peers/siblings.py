"""The other processes of this router on this machine (`--processes`): a bus, questions, and what all must do."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Final

from eldr.router.peers import channel
from eldr.router.peers.bus import Bus, Hear
from eldr.router.peers.channel import Channel, open_channel

log = logging.getLogger("eldr.router")

# How long to wait for the others' answers. They have them at hand.
ANSWER_S: Final = 1.0


class LocalBus(Bus):
    """Carries frames through the parent of the processes."""

    def __init__(self, siblings: Siblings) -> None:
        self._siblings = siblings
        self.up = False

    async def start(self, origin: int, hear: Hear, connected: Callable[[], None]) -> None:
        self._siblings.hear = hear
        self.up = self._siblings.send(channel.HELLO, origin)
        if self.up:
            connected()

    @property
    def backlog_bytes(self) -> int:
        return self._siblings.backlog_bytes

    def publish(self, frame: bytes, to: int | None = None) -> bool:
        return self.up and self._siblings.send(channel.FRAME, to or 0, frame)

    async def close(self) -> None:
        self.up = False


class _Question:
    def __init__(self) -> None:
        self.answers: list[bytes] = []
        self.expected: int | None = None
        self.complete = asyncio.Event()

    def look(self) -> None:
        if self.expected is not None and len(self.answers) >= self.expected:
            self.complete.set()


class Siblings:
    """One process's end of the channel to its parent.

    index: of this process, from 0. count: how many there are.
    bus: carries frames between these processes.
    hear: hears the frames.
    answers: kind of question -> what answers it, given its details: at once, or in several turns of the event loop.
    heard: kind of message -> what hears it.
    gone: called when the parent is gone.
    """

    def __init__(self, index: int, count: int, sock: socket.socket) -> None:
        self.index = index
        self.count = count
        self.bus = LocalBus(self)
        self.hear: Hear = lambda frame: None
        self.answers: dict[bytes, Callable[[bytes], bytes | Coroutine[Any, Any, bytes]]] = {}
        self.heard: dict[bytes, Callable[[bytes], None]] = {}
        self.gone: Callable[[], None] = lambda: None
        self._sock = sock
        self._channel: Channel | None = None
        self._numbers = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        self._answering: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._channel = await open_channel(self._sock, self._heard, self._closed)

    def ready(self) -> None:
        """This process serves, and can do what the others were told."""
        self.send(channel.READY, 0)

    @property
    def backlog_bytes(self) -> int:
        """How much waits for the parent to read it."""
        return 0 if self._channel is None else self._channel.backlog_bytes

    def send(self, kind: int, number: int, data: bytes = b"") -> bool:
        return self._channel is not None and self._channel.send(kind, number, data)

    async def ask(self, kind: bytes, details: bytes = b"") -> list[bytes]:
        """Ask all others. Returns the answers of those that answer in time."""
        number, question = next(self._numbers), _Question()
        self._questions[number] = question
        try:
            if self.send(channel.ASK, number, kind + b"\n" + details):
                async with asyncio.timeout(ANSWER_S):
                    await question.complete.wait()
        except TimeoutError:
            pass
        finally:
            del self._questions[number]
        return question.answers

    def tell(self, kind: bytes, details: bytes) -> None:
        """Tell all others that run now."""
        self.send(channel.TELL, 0, kind + b"\n" + details)

    def keep(self, kind: bytes, topic: bytes, details: bytes) -> None:
        """Tell all others, and those that start later the last of each topic. No topic has a line end."""
        self.send(channel.KEEP, 0, b"\n".join((kind, topic, details)))

    def forget(self, topic: bytes) -> None:
        """What was to be kept of this topic no longer holds for those that start later."""
        self.send(channel.FORGET, 0, topic)

    def close(self) -> None:
        self.gone = lambda: None
        for task in self._answering:
            task.cancel()
        if self._channel is not None:
            self._channel.close()

    def _heard(self, kind: int, number: int, data: bytes) -> None:
        try:
            self._take(kind, number, data)
        except Exception:  # the event loop would close the channel, and this process would end
            log.exception("a message of another process of this router cannot be used")
            if kind == channel.ASK:
                self.send(channel.ANSWER, number)

    def _take(self, kind: int, number: int, data: bytes) -> None:
        if kind == channel.FRAME:
            self.hear(data)
        elif kind == channel.ASK:
            what, _, details = data.partition(b"\n")
            answer = self.answers.get(what)
            found = b"" if answer is None else answer(details)
            if isinstance(found, bytes):
                self.send(channel.ANSWER, number, found)
            else:
                task = asyncio.get_running_loop().create_task(self._answer(number, found))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
        elif kind == channel.TELL:
            what, _, details = data.partition(b"\n")
            hear = self.heard.get(what)
            if hear is not None:
                hear(details)
        elif kind in (channel.ANSWER, channel.EXPECT):
            self._answered(kind, number, data)

    async def _answer(self, number: int, answer: Coroutine[Any, Any, bytes]) -> None:
        found = b""
        try:
            found = await answer
        except Exception:
            log.exception("a question of another process of this router cannot be answered")
        finally:
            self.send(channel.ANSWER, number, found)

    def _answered(self, kind: int, number: int, data: bytes) -> None:
        question = self._questions.get(number)
        if question is not None:
            if kind == channel.EXPECT:
                question.expected = int.from_bytes(data, "little")
            else:
                question.answers.append(data)
            question.look()

    def _closed(self) -> None:
        self.bus.up = False
        self.gone()
