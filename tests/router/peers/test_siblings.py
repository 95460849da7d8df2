"""The processes of one router, which talk through their parent."""

from __future__ import annotations

import socket

import pytest

from eldr.router.peers.hub import Hub
from eldr.router.peers.siblings import Siblings
from tests.router.harness import on_uvloop, until


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

    def change(details: bytes) -> None:
        if details == b"bad":
            fail(details)
        heard.append(details)

    other.gone = lambda: ended.append(other.index)
    other.answers[b"question"] = fail
    other.answers[b"another"] = lambda details: details
    other.heard[b"change"] = change
    other.ready()
    await other.ask(b"anything")  # the parent has heard that it is ready
    assert await one.ask(b"question") == [b""]
    one.tell(b"change", b"bad")
    one.tell(b"change", b"good")
    await until(lambda: heard == [b"good"], "the next one is heard")
    assert await one.ask(b"another", b"x") == [b"x"]
    assert ended == []
    assert caplog.text.count("cannot be used") == 2
    for each in both:
        each.close()
