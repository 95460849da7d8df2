"""What is known of other replicas, whatever the bus does to their frames."""

from __future__ import annotations

import asyncio
import random
import tracemalloc
from collections.abc import Iterable, Iterator
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.policies.shares import Share
from eldr.router.config.groups import QueueLimits
from eldr.router.peers import others, wire
from eldr.router.peers.others import MOST_PEERS, PEER_TIMEOUT_S
from eldr.router.peers.wire import Bye, Events, Heartbeat, Level, Snapshot, Start
from eldr.router.placement.admission import Admission, Claim
from tests.router.harness import interpreted, until
from tests.router.peers.network import URLS, D, Listener, Network, Origin, sums_of


def share(chance: random.Random) -> Share:
    codes = np.array([chance.randrange(256) for _ in range(D)], dtype=np.uint8)
    return Share(codes if chance.random() < 0.9 else None, chance.randrange(10**6), chance.random() < 0.5)


def act(network: Network) -> None:
    """One random thing that happens to a fleet."""
    chance = network.chance
    nodes = list(network.nodes.values())
    what = chance.random()
    if not nodes or (what < 0.08 and len(nodes) < 4):
        network.add()
        return
    node = chance.choice(nodes)
    if what < 0.12:  # it is killed, and may come back as another
        del network.nodes[node.own.origin]
        if chance.random() < 0.5:
            network.send(node, Bye(node.own.origin))
    elif what < 0.7:
        starts = [(chance.choice(URLS), share(chance)) for _ in range(chance.randrange(4))]
        network.send(node, node.own.events(starts, chance.randrange(4), chance))
    elif what < 0.8:
        network.send(node, node.own.heartbeat())
    elif what < 0.85:  # a worker leaves here and comes back
        url = chance.choice(URLS)
        node.listener.leave(url)
        network.deliver(3)
        node.listener.join(url)
    elif what < 0.95:
        network.deliver(chance.randrange(20))
    else:
        network.now_s += chance.uniform(0, 4)
        for each in nodes:
            each.listener.others.look(network.now_s)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(20, 150))
def test_after_a_quiet_time_every_replica_has_the_same_picture(seed: int, steps: int) -> None:
    network = Network(random.Random(seed))
    for _ in range(3):
        network.add()
    for _ in range(steps):
        act(network)
    network.quiet(12)
    for node in network.nodes.values():
        running = [each for other in network.nodes.values() if other is not node for each in other.wanted]
        assert node.listener.policy.sums == sums_of(running)
        counts = dict.fromkeys(URLS, 0)
        for url, _ in running:
            counts[url] += 1
        assert node.listener.load == counts
        assert len(node.listener.others) == node.listener.others.synced == len(network.nodes) - 1


def alone() -> tuple[Listener, list[int]]:
    """A listener, and the origins that it asks."""
    asked: list[int] = []
    listener = Listener(99, asked.append, lambda origin: None)
    for url in URLS:
        listener.join(url)
    return listener, asked


def test_nobody_is_asked_while_nothing_is_missing() -> None:
    listener, asked = alone()
    origin, chance = Origin(1), random.Random(1)
    for _ in range(5):
        listener.others.hear(wire.encode(origin.events([(URLS[0], share(chance))], 0, chance)), 1.0)
        listener.others.hear(wire.encode(origin.heartbeat()), 1.0)
    assert asked == []
    assert listener.load == {URLS[0]: 5, URLS[1]: 0, URLS[2]: 0}


def test_a_gap_asks_once_a_second_and_keeps_what_is_known() -> None:
    listener, asked = alone()
    origin, chance = Origin(1), random.Random(1)
    listener.others.hear(wire.encode(origin.events([(URLS[0], share(chance))], 0, chance)), 1.0)
    origin.events([(URLS[0], share(chance))], 0, chance)  # lost
    for at_s in (2.0, 2.1, 2.9, 3.1):
        listener.others.hear(wire.encode(origin.events([(URLS[1], share(chance))], 0, chance)), at_s)
    assert asked == [1, 1]
    assert listener.load == {URLS[0]: 1, URLS[1]: 4, URLS[2]: 0}
    assert (listener.counters.gaps, listener.others.synced) == (1, 0)
    for part in origin.snapshot(2):
        listener.others.hear(wire.encode(part), 3.2)
    assert listener.load == {URLS[0]: 2, URLS[1]: 4, URLS[2]: 0}
    assert (listener.counters.resyncs, listener.others.synced) == (1, 1)


def test_a_heartbeat_that_does_not_fit_asks_for_all_again() -> None:
    listener, asked = alone()
    origin, chance = Origin(1), random.Random(1)
    listener.others.hear(wire.encode(origin.events([(URLS[0], share(chance))], 0, chance)), 1.0)
    listener.others.hear(wire.encode(Heartbeat(1, 1, 1, 2, {})), 1.0)
    assert asked == [1]


def test_a_replica_that_is_silent_loses_its_requests_and_gets_them_back() -> None:
    listener, asked = alone()
    origin, chance = Origin(1), random.Random(1)
    listener.others.hear(wire.encode(origin.events([(URLS[0], share(chance))], 0, chance)), 0.0)
    now_s = 0.0
    for now_s in (1.0, 2.0, 3.0, 4.0, PEER_TIMEOUT_S):
        listener.others.look(now_s)
    assert listener.load[URLS[0]] == 1
    listener.others.look(PEER_TIMEOUT_S + 0.1)
    assert (listener.load[URLS[0]], len(listener.others), listener.counters.expired) == (0, 0, 1)
    listener.others.hear(wire.encode(origin.heartbeat()), now_s)  # it only hung
    assert asked == [1]
    for part in origin.snapshot(2):
        listener.others.hear(wire.encode(part), now_s)
    assert listener.load[URLS[0]] == 1


def test_a_router_that_stood_still_forgets_nobody_for_that() -> None:
    listener, _ = alone()
    origin, chance = Origin(1), random.Random(1)
    listener.others.look(10.0)
    listener.others.hear(wire.encode(origin.events([(URLS[0], share(chance))], 0, chance)), 10.5)
    listener.others.look(60.0)
    assert listener.load[URLS[0]] == 1
    for now_s in (61.0, 62.0, 63.0, 64.0, 65.0, 66.0):
        listener.others.look(now_s)
    assert listener.load[URLS[0]] == 0


def test_what_others_need_of_a_model() -> None:
    listener, _ = alone()
    group = listener.fleet.groups[0]
    listener.others.hear(wire.encode(Events(1, 1, [], [], [], {"": Level(3, True)})), 1.0)
    listener.others.hear(wire.encode(Events(2, 1, [], [], [], {"": Level(4, False), "other": Level(9, True)})), 1.0)
    assert (group.promised_elsewhere, group.waiting_elsewhere) == (7, 1)
    listener.others.hear(wire.encode(Events(1, 2, [], [], [], {"": Level(0, False)})), 1.0)
    assert (group.promised_elsewhere, group.waiting_elsewhere) == (4, 0)
    listener.others.hear(wire.encode(Bye(2)), 1.0)
    assert (group.promised_elsewhere, group.waiting_elsewhere) == (0, 0)


# What makes room.


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


def full_of(listener: Listener, slots: int) -> Events:
    """The frame of a replica that has filled every worker, of which each has so many slots."""
    for worker in listener.fleet.workers("decode").values():
        listener.fleet.set_limit(worker, slots)
    return Events(1, 1, [Start(n, URLS[n % 3], None, True) for n in range(1, 3 * slots + 1)], [], [], {})


def test_only_what_makes_room_wakes_requests_that_wait_for_a_worker() -> None:
    async def run() -> None:
        listener, _ = alone()
        listener.others.hear(wire.encode(full_of(listener, 2)), 1.0)
        served = listener.fleet.groups[0].whole
        waits = asyncio.create_task(listener.admission.until_changed(served, "decode"))
        await settle()
        takes_none: list[Events | Heartbeat] = [
            Events(1, 2, [Start(7, URLS[0], None, True)], [], [], {}),  # beyond the limit
            Events(1, 3, [], [], [7], {}),  # the worker is as full as before
            Events(1, 4, [Start(8, "http://unknown", None, True)], [], [9999], {"": Level(3, True)}),
            Events(1, 5, [], [], [8], {"": Level(0, False)}),
            Heartbeat(1, 5, 6, 21, {}),
        ]
        for frame in takes_none:
            listener.others.hear(wire.encode(frame), 1.0)
            await settle()
            assert not waits.done(), frame
        listener.others.hear(wire.encode(Events(1, 6, [], [], [1], {})), 1.0)
        await settle()
        assert waits.done()
        assert waits.result()

    asyncio.run(run())


Change = tuple[str, int, int]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["start", "end", "level", "bye"]), st.integers(1, 2), st.integers(0, 11))),
    st.integers(1, 3),
)
def test_nobody_waits_who_has_room_whatever_other_replicas_tell(changes: list[Change], slots: int) -> None:
    async def run() -> None:
        listener, _ = alone()
        listener.others.hear(wire.encode(full_of(listener, slots)), 1.0)
        group = listener.fleet.groups[0]
        running = {1: list(range(1, 3 * slots + 1)), 2: []}
        sequence, number = {1: 1, 2: 0}, 1000
        asked = [asyncio.create_task(listener.admission.enter(Claim(b"", 1, 1), group.whole)) for _ in range(6)]
        await settle()
        for what, origin, detail in changes:
            frame = Events(origin, sequence[origin] + 1, [], [], [], {})
            if what == "start":
                number += 1
                running[origin].append(number)
                frame = frame._replace(starts=[Start(number, URLS[detail % 3], None, True)])
            elif what == "end" and running[origin]:
                frame = frame._replace(ended=[running[origin].pop(detail % len(running[origin]))])
            elif what == "level":
                frame = frame._replace(levels={"": Level(detail // 2, detail % 2 > 0)})
            if what == "bye":
                listener.others.hear(wire.encode(Bye(origin)), 1.0)
                sequence[origin], running[origin] = 0, []
            else:
                listener.others.hear(wire.encode(frame), 1.0)
                sequence[origin] += 1
            await settle()
            # One more request that arrives now has no room either, unless nobody waits.
            fresh = Admission(QueueLimits())
            probe = asyncio.create_task(fresh.enter(Claim(b"", 1, 1), group.whole))
            await settle()
            if probe.done():
                fresh.leave(group.whole)
                assert all(task.done() for task in asked)
            probe.cancel()
            await asyncio.gather(probe, return_exceptions=True)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(run())


class Waiting:
    """A replica that runs its half of four slots and has three requests waiting, and another that waits too.

    The other's requests run at two of the three workers.
    """

    def __init__(self) -> None:
        self.listener, _ = alone()
        self._sequence = 0
        for url, worker in self.listener.fleet.workers("decode").items():
            self.listener.fleet.set_limit(worker, 2 if url == URLS[0] else 1)
        self.group = self.listener.fleet.groups[0]
        for _ in range(2):
            self.listener.fleet.started(self.listener.fleet.workers("decode")[URLS[0]])

    def hear(self, starts: list[Start], ended: list[int]) -> None:
        self._sequence += 1
        levels = {"": Level(0, True)} if self._sequence == 1 else {}
        self.listener.others.hear(wire.encode(Events(1, self._sequence, starts, [], ended, levels)), 1.0)

    async def ask(self, count: int) -> list[asyncio.Task[None]]:
        tasks = [
            asyncio.create_task(self.listener.admission.enter(Claim(b"", 1, 1), self.group.whole)) for _ in range(count)
        ]
        await settle()
        return tasks


async def end_of(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_slots_that_another_has_the_right_to_and_cannot_reach_are_used() -> None:
    async def run() -> None:
        waiting = Waiting()
        waiting.hear([], [])
        tasks = await waiting.ask(3)
        assert not any(task.done() for task in tasks), "the other has the better right"
        await until(lambda: sum(task.done() for task in tasks) == 2, "it does not take them")
        await asyncio.sleep(0.3)
        assert waiting.group.room == 0
        assert sum(task.done() for task in tasks) == 2
        await end_of(tasks)

    asyncio.run(run())


def test_slots_that_another_takes_again_and_again_are_left_to_it() -> None:
    async def run() -> None:
        waiting, loop = Waiting(), asyncio.get_running_loop()
        waiting.hear([Start(1, URLS[1], None, True)], [])
        numbers = count(2)
        number = next(numbers)
        waiting.hear([Start(number, URLS[2], None, True)], [])
        tasks = await waiting.ask(1)
        turns = 0

        def turn() -> None:
            """One of the other's requests ends, and some milliseconds later it has started the next."""
            waiting.hear([], [number])
            assert waiting.group.room == 1
            loop.call_later(0.01, start_next)

        def start_next() -> None:
            nonlocal number, turns
            number = next(numbers)
            waiting.hear([Start(number, URLS[2], None, True)], [])
            turns += 1
            if turns < 40:
                loop.call_later(0.01, turn)

        loop.call_later(0.01, turn)
        await until(lambda: turns == 40, "they run")
        assert not tasks[0].done()
        waiting.hear([], [number])
        await until(lambda: tasks[0].done(), "and the slot stays free")
        await end_of(tasks)

    asyncio.run(run())


def test_requests_at_a_worker_that_joins_later_count_from_then_on() -> None:
    listener, _ = alone()
    given_share = Share(np.arange(D, dtype=np.uint8), 7)
    listener.others.hear(wire.encode(Events(1, 1, [Start(1, "http://new", given_share, True)], [], [], {})), 1.0)
    assert listener.policy.told == []
    listener.join("http://new")
    assert listener.load["http://new"] == 1
    assert listener.policy.sums == {"http://new": (1, 7, *range(D))}
    listener.leave("http://new")
    assert listener.policy.told == []
    listener.others.hear(wire.encode(Events(1, 2, [], [], [1], {})), 1.0)
    listener.join("http://new")
    assert listener.load["http://new"] == 0


# What cannot be believed.


@pytest.mark.parametrize(
    "data", [b"", b"EL", b"x" * 100, wire.encode(Bye(1))[:-1], b"EL\x09" + wire.encode(Bye(1))[3:]]
)
def test_what_is_no_frame_is_counted(data: bytes) -> None:
    listener, asked = alone()
    listener.others.hear(data, 1.0)
    assert (listener.counters.refused, len(listener.others), asked) == (1, 0, [])


def test_more_replicas_than_there_can_be_are_refused() -> None:
    listener, _ = alone()
    for origin in range(1, 3 * MOST_PEERS):
        if origin != 99:
            listener.others.hear(wire.encode(Heartbeat(origin, 0, 0, 0, {})), 1.0)
    assert len(listener.others) == MOST_PEERS


def test_its_own_frames_say_nothing_to_a_router() -> None:
    listener, _ = alone()
    listener.others.hear(wire.encode(Events(99, 1, [Start(1, URLS[0], None, True)], [], [], {})), 1.0)
    assert (listener.load[URLS[0]], len(listener.others)) == (0, 0)


def test_a_snapshot_that_nobody_needs_changes_nothing() -> None:
    listener, _ = alone()
    origin, chance = Origin(1), random.Random(1)
    listener.others.hear(wire.encode(origin.events([(URLS[0], share(chance))], 0, chance)), 1.0)
    listener.others.hear(wire.encode(Snapshot(1, 1, 9, 0, True, [])), 1.0)
    assert listener.load[URLS[0]] == 1


def kept_bytes(frames: Iterable[wire.Frame]) -> int:
    """What a listener keeps that has heard these frames, which are encoded one by one."""
    listener, _ = alone()
    tracemalloc.start()
    try:
        for frame in frames:
            listener.others.hear(wire.encode(frame), 1.0)
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


@interpreted
def test_snapshots_without_an_end_take_no_more_memory_than_profiles_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "MOST_PROFILE_BYTES", 2**22)
    codes = np.zeros(2**18, dtype=np.uint8)

    def frames() -> Iterator[wire.Frame]:
        for origin in (1, 2):
            for part in range(40):
                starts = [Start(2 * part + each, URLS[0], Share(codes, 1), True) for each in (1, 2)]
                yield Snapshot(origin, 5, 10**6, part, False, starts)

    assert kept_bytes(frames()) < 3 * 2**22  # they are 40 MiB


def test_the_ends_of_replicas_without_snapshots_are_not_remembered_for_ever() -> None:
    def frames() -> Iterator[wire.Frame]:
        for origin in (1, 2, 3, 4):
            yield Heartbeat(origin, 9, 1, 1, {})
            yield Events(origin, 10, [], [], range(1, 100_001), {})

    assert kept_bytes(frames()) < 2**23  # they are 30 MiB


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 6), st.integers(0, 2**32)), max_size=60))
def test_contradictory_frames_leave_sound_sums(history: list[tuple[int, int, int]]) -> None:
    """Starts that were there, ends of nothing, sequences from anywhere: load and policy agree, and all ends."""
    listener, _ = alone()
    times = count(1)
    for origin, kind, seed in history:
        chance = random.Random(seed)
        starts = [Start(chance.randrange(1, 9), chance.choice(URLS), share(chance), True) for _ in range(3)]
        if kind < 4:
            frame: wire.Frame = Events(origin, chance.randrange(9), starts, [], [chance.randrange(9)], {})
        elif kind == 4:
            frame = Heartbeat(origin, chance.randrange(9), chance.randrange(9), chance.randrange(9), {})
        else:
            frame = Snapshot(origin, chance.randrange(9), 9, chance.randrange(2), chance.random() < 0.5, starts)
        listener.others.hear(wire.encode(frame), next(times) / 100)
        told = listener.policy.sums
        assert {url: load for url, load in listener.load.items() if load} == {url: told[url][0] for url in told}
    for origin in (1, 2, 3):
        listener.others.hear(wire.encode(Bye(origin)), 2.0)
    assert set(listener.load.values()) == {0}
    assert listener.policy.told == []
    assert listener.elsewhere.running == 0


def test_a_snapshot_from_before_the_gap_is_not_enough() -> None:
    listener, asked = alone()
    origin, chance = Origin(1), random.Random(1)
    for at_s in range(3):
        listener.others.hear(wire.encode(origin.events([(URLS[0], share(chance))], 0, chance)), float(at_s))
    old = list(origin.snapshot(9))
    for _ in range(2):  # lost
        origin.events([(URLS[1], share(chance))], 0, chance)
    listener.others.hear(wire.encode(origin.events([(URLS[2], share(chance))], 0, chance)), 4.0)
    for part in old:
        listener.others.hear(wire.encode(part), 4.1)
    assert (listener.others.synced, listener.load) == (0, {URLS[0]: 3, URLS[1]: 0, URLS[2]: 1})
    for part in origin.snapshot(9):
        listener.others.hear(wire.encode(part), 4.2)
    assert (listener.others.synced, listener.load) == (1, {URLS[0]: 3, URLS[1]: 2, URLS[2]: 1})
    assert asked == [1]


def test_a_newcomer_that_asked_everybody_takes_the_snapshot() -> None:
    listener, asked = alone()
    origin, chance = Origin(1), random.Random(1)
    for _ in range(3):
        origin.events([(URLS[0], share(chance))], 0, chance)
    for part in origin.snapshot(2):
        listener.others.hear(wire.encode(part), 1.0)
    listener.others.hear(wire.encode(origin.events([(URLS[1], share(chance))], 0, chance)), 1.1)
    assert (listener.load, listener.others.synced) == ({URLS[0]: 3, URLS[1]: 1, URLS[2]: 0}, 1)
    assert asked == []
