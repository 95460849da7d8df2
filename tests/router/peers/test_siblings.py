"""The processes of one router, which talk through their parent."""

from __future__ import annotations

import asyncio
import socket

import pytest

from eldr.router.peers.hub import Hub
from eldr.router.peers.siblings import Siblings
from tests.router.harness import on_uvloop, until


async def connected(hub: Hub, index: int) -> tuple[Siblings, list[bytes]]:
    """One more process, and the changes that it hears of."""
    ours, theirs = socket.socketpair()
    await hub.attach(ours)
    siblings, heard = Siblings(index, 2, theirs), list[bytes]()
    siblings.heard[b"change"] = heard.append
    await siblings.start()
    return siblings, heard


@on_uvloop
async def test_who_starts_later_is_told_the_last_of_each_topic_unless_it_is_forgotten() -> None:
    hub = Hub()
    one, _ = await connected(hub, 0)
    for topic, details in ((b"a", b"a1"), (b"b", b"b1"), (b"c", b"c1"), (b"a", b"a2"), (b"c", b"c2")):
        one.keep(b"change", topic, details)
    one.forget(b"c")
    one.forget(b"unknown")
    one.keep(b"change", b"d", b"d1")
    other, heard = await connected(hub, 1)
    one.ready()
    await one.ask(b"anything")  # the parent has heard all of it
    other.ready()
    await until(lambda: heard == [b"b1", b"a2", b"d1"], "it is told")
    one.close()
    other.close()


@on_uvloop
async def test_what_fails_at_a_message_ends_no_process(caplog: pytest.LogCaptureFixture) -> None:
    hub = Hub()
    both: list[Siblings] = []
    for index in range(2):
        ours, theirs = socket.socketpair()
        await hub.attach(ours)
        both.append(Siblings(index, 2, theirs))
        await both[index].start()
    one, other = both
    ended: list[int] = []
    heard: list[bytes] = []

    def fail(details: bytes) -> bytes:
        raise ValueError(details)

    async def later(details: bytes) -> bytes:
        await asyncio.sleep(0)
        return details if details == b"good" else fail(details)

    def change(details: bytes) -> None:
        if details == b"bad":
            fail(details)
        heard.append(details)

    other.gone = lambda: ended.append(other.index)
    other.answers[b"question"] = fail
    other.answers[b"another"] = lambda details: details
    other.answers[b"slow"] = later
    other.heard[b"change"] = change
    other.ready()
    await other.ask(b"anything")  # the parent has heard that it is ready
    assert await one.ask(b"question") == [b""]
    assert await one.ask(b"slow", b"bad") == [b""]
    assert await one.ask(b"slow", b"good") == [b"good"]
    one.tell(b"change", b"bad")
    one.tell(b"change", b"good")
    await until(lambda: heard == [b"good"], "the next one is heard")
    assert await one.ask(b"another", b"x") == [b"x"]
    assert ended == []
    assert caplog.text.count("cannot be used") == 2
    assert caplog.text.count("cannot be answered") == 1
    for each in both:
        each.close()
