"""Who waits, who is refused and who goes first."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.router.config.groups import QueueLimits
from eldr.router.fleet.groups import Served
from eldr.router.fleet.workers import Fleet, Worker
from eldr.router.http.errors import ApiError
from eldr.router.placement.admission import PRIORITIES, Admission, Claim, NoWorkerError
from eldr.router.placement.fair_queue import MAX_COST, FairQueue, QueueFullError
from tests.router.harness import ASK, on_uvloop, running, until

# The queue.


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2 * MAX_COST)), max_size=60), st.data())
def test_nothing_is_lost_and_a_clients_items_keep_their_order(
    pushed: list[tuple[str, int]], data: st.DataObject
) -> None:
    queue: FairQueue[tuple[Any, int]] = FairQueue(2**31)
    for number, (client, cost) in enumerate(pushed):
        assert queue.push((client, number), client.encode(), cost) is None
    left: set[Any] = {(client, number) for number, (client, _) in enumerate(pushed)}
    for item in data.draw(st.sets(st.sampled_from(sorted(left)))) if left else ():
        assert queue.remove(item, item[0].encode())
        assert not queue.remove(item, item[0].encode())
        left.discard(item)
    popped = []
    while (item := queue.pop()) is not None:
        popped.append(item)
        assert len(queue) == len(left) - len(popped)
    assert set(popped) == left
    assert len(popped) == len(left)
    for client in "abc":
        own = [number for name, number in popped if name == client]
        assert own == sorted(own)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, MAX_COST), min_size=60, max_size=60), min_size=2, max_size=4),
    st.integers(10, 60),
)
def test_clients_that_always_wait_get_the_same_cost_through(costs: list[list[int]], pops: int) -> None:
    """The bound of start-time fair queuing: two clients differ by their largest items at most."""
    queue: FairQueue[tuple[Any, int]] = FairQueue(2**31)
    for client, own in enumerate(costs):
        for number, cost in enumerate(own):
            queue.push((client, number), b"%d" % client, cost)
    served = Counter(dict.fromkeys(range(len(costs)), 0))
    for _ in range(pops):
        item = queue.pop()
        assert item is not None
        client, number = item
        served[client] += costs[client][number]
    assert max(served.values()) - min(served.values()) <= 2 * MAX_COST


def test_a_flood_of_one_client_does_not_keep_another_waiting() -> None:
    queue: FairQueue[Any] = FairQueue(1000)
    for number in range(900):
        queue.push(number, b"flood", 500)
    queue.push("late", b"other", 500)
    assert "late" in [queue.pop() for _ in range(2)]


def test_a_client_that_asks_one_by_one_is_not_ahead_of_one_that_queues() -> None:
    """What it got before still counts when it comes back, so that it gets no more than the other."""
    queue: FairQueue[Any] = FairQueue(1000)
    for number in range(100):
        queue.push(number, b"queues", 100)
    queue.push("again", b"one by one", 1000)
    popped = []
    for _ in range(50):
        popped.append(queue.pop())
        if popped[-1] == "again":
            queue.push("again", b"one by one", 1000)
    assert popped.count("again") == 5


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("aaaaabbc"), min_size=1, max_size=80), st.integers(1, 12))
def test_a_full_queue_gives_way_to_clients_with_less_than_their_share(clients: list[str], limit: int) -> None:
    """Against a plain model: per client a list, the longest of which loses its newest item."""
    queue: FairQueue[Any] = FairQueue(limit)
    model: dict[Any, Any] = {}
    for number, client in enumerate(clients):
        own = len(model.get(client, ()))
        try:
            displaced = queue.push((client, number), client.encode(), 1)
        except QueueFullError:
            assert sum(map(len, model.values())) == limit
            # Only who has as much as anybody, less one, is refused; or more than an even share.
            assert own + 1 >= max(map(len, model.values())) or own + 1 > limit / len(model)
            continue
        if displaced is not None:
            assert sum(map(len, model.values())) == limit
            loser = displaced[0]
            assert len(model[loser]) == max(map(len, model.values())) > own + 1
            assert model[loser].pop() == displaced
        model.setdefault(client, deque()).append((client, number))
        model = {name: items for name, items in model.items() if items}
        assert len(queue) == sum(map(len, model.values())) <= limit


# Admission.


def served_by(slots: int) -> Served:
    """A model on one worker with so many slots."""
    fleet = Fleet()
    fleet.set_healthy(fleet.add("http://d:1", "decode", slots), True)
    return fleet.groups[0].whole


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


@on_uvloop
async def test_higher_priorities_go_first_and_each_has_its_own_bound() -> None:
    admission = Admission(QueueLimits(100, 2, 60.0, 0.0))
    served = served_by(1)
    await admission.enter(Claim(b"", 1, 1), served)
    order, tasks = [], []

    async def wait(number: int, priority: int) -> None:
        await admission.enter(Claim(b"c", priority, 1), served)
        order.append((PRIORITIES[priority], number))

    for number in range(3):
        for priority in (2, 1, 0):
            tasks.append(asyncio.create_task(wait(number, priority)))
            await settle()
    assert admission.queued_by_priority == {"high": 2, "normal": 2, "low": 2}
    for _ in range(6):
        admission.leave(served)
        await settle()
    assert order == [(name, number) for name in PRIORITIES for number in range(2)]
    refused = [task.exception() for task in tasks[-3:]]
    assert [error.status for error in refused] == [429] * 3
    assert all(1 <= error.retry_after_s <= 60 for error in refused)
    assert admission.refusals == {"full": 3}


@on_uvloop
async def test_who_waits_too_long_is_told_so_and_holds_no_place() -> None:
    admission = Admission(QueueLimits(100, 10, 0.05, 0.0))
    served = served_by(1)
    await admission.enter(Claim(b"", 1, 1), served)
    with pytest.raises(ApiError) as caught:
        await admission.enter(Claim(b"", 1, 1), served)
    assert (caught.value.status, admission.queued, admission.admitted) == (503, 0, 1)
    admission.leave(served)
    await admission.enter(Claim(b"", 1, 1), served)
    assert admission.admitted == 1


@on_uvloop
async def test_the_newest_of_the_longest_gives_way() -> None:
    admission = Admission(QueueLimits(100, 3, 60.0, 0.0))
    served = served_by(1)
    await admission.enter(Claim(b"", 1, 1), served)
    flood = [asyncio.create_task(admission.enter(Claim(b"flood", 1, 1), served)) for _ in range(3)]
    await settle()
    other = asyncio.create_task(admission.enter(Claim(b"other", 1, 1), served))
    await settle()
    assert isinstance(flood[2].exception(), ApiError)
    assert (admission.queued, admission.refusals) == (3, {"displaced": 1})
    for _ in range(3):
        admission.leave(served)
        await settle()
    await asyncio.gather(other, *flood[:2])


@on_uvloop
async def test_no_more_streams_than_allowed_however_large_the_fleet() -> None:
    admission = Admission(QueueLimits(3, 10, 60.0, 0.0))
    served = served_by(1000)
    tasks = [asyncio.create_task(admission.enter(Claim(b"", 1, 1), served)) for _ in range(5)]
    await settle()
    assert (admission.admitted, admission.queued) == (3, 2)
    admission.set_limits(QueueLimits(5, 10, 60.0, 0.0))
    await asyncio.gather(*tasks)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("enter"), st.sampled_from([b"a", b"b", b"c"]), st.integers(0, 2)),
            st.tuples(st.just("leave"), st.just(b""), st.just(0)),
            st.tuples(st.just("cancel"), st.just(b""), st.integers(0, 50)),
            st.tuples(st.just("slots"), st.just(b""), st.integers(0, 4)),
            st.tuples(st.just("settle"), st.just(b""), st.just(0)),
        ),
        max_size=60,
    ),
    st.sampled_from([0.0, 60.0]),
)
def test_whatever_happens_every_request_ends_once_and_none_is_counted_twice(
    steps: list[tuple[str, bytes, int]], worker_wait_s: float
) -> None:
    async def run() -> None:
        fleet = Fleet()
        worker = fleet.add("http://d:1", "decode", 2)
        fleet.set_healthy(worker, True)
        admission = Admission(QueueLimits(100, 3, 60.0, worker_wait_s))
        served = fleet.groups[0].whole
        tasks, inside = [], 0
        for what, client, number in steps:
            if what == "enter":
                tasks.append(asyncio.create_task(admission.enter(Claim(client, number, 1), served)))
            elif what == "leave":
                await settle()
                inside = admission.admitted
                if inside:
                    admission.leave(served)
            elif what == "cancel" and tasks:
                tasks[number % len(tasks)].cancel()
            elif what == "slots":
                fleet.set_limit(worker, max(1, number))
                fleet.set_healthy(worker, number > 0)
                admission.changed()
            else:
                await settle()
            assert admission.queued == sum(admission.queued_by_priority.values()) >= 0
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert admission.queued == 0
        allowed = (type(None), asyncio.CancelledError, ApiError, NoWorkerError)
        assert all(isinstance(result, allowed) for result in results)

    asyncio.run(run())


@on_uvloop
async def test_a_full_queue_answers_429_with_retry_after() -> None:
    async with running(max_inflight=1, max_queued=1, queue_timeout_s=30) as s:
        s.decode[0].token_gap_s = 0.2
        first = asyncio.create_task(s.post())
        await until(lambda: s.decode[0].running == 1, "it runs")
        second = asyncio.create_task(s.post())
        await until(lambda: s.router.services.admission.queued == 1, "it waits")
        third = await s.post()
        assert (third.status, third.error["type"]) == (429, "RateLimitError")
        assert int(third.headers["retry-after"]) >= 1
        urgent = asyncio.create_task(s.post(headers={"x-eldr-priority": "high"}))
        await until(lambda: s.router.services.admission.queued == 2, "another priority has room")
        assert await s.metric("eldr_queued", priority="high") == 1
        assert [(await task).status for task in (first, second, urgent)] == [200] * 3
        assert await s.metric("eldr_queue_refusals_total", reason="full") == 1


@on_uvloop
async def test_a_wait_that_is_too_long_ends_with_503() -> None:
    async with running(max_inflight=1, queue_timeout_s=0.1) as s:
        s.decode[0].token_gap_s = 1.0
        first = asyncio.create_task(s.post())
        await until(lambda: s.decode[0].running == 1, "it runs")
        answer = await s.post()
        assert (answer.status, int(answer.headers["retry-after"]) >= 1) == (503, True)
        assert len(s.prefill[0].generated) == 1
        first.cancel()


@pytest.mark.parametrize(
    ("headers", "body", "name"),
    [({}, {}, "normal"), ({"x-eldr-priority": "low"}, {}, "low"), ({}, {"priority": -1}, "high"),
     ({}, {"priority": 7}, "low"), ({}, {"priority": "x"}, "normal"),
     ({"x-eldr-priority": "high"}, {"priority": 9}, "high")],
)  # fmt: skip
@on_uvloop
async def test_priorities_of_requests(headers: dict[str, str], body: dict[str, Any], name: str) -> None:
    async with running(max_inflight=1) as s:
        s.decode[0].token_gap_s = 0.05
        first = asyncio.create_task(s.post())
        await until(lambda: s.decode[0].running == 1, "it runs")
        second = asyncio.create_task(s.post({**ASK, **body}, headers=headers))
        await until(lambda: s.router.services.admission.queued == 1, "it waits")
        assert s.router.services.admission.queued_by_priority[name] == 1
        assert [(await task).status for task in (first, second)] == [200, 200]


@on_uvloop
async def test_an_unknown_priority_is_refused() -> None:
    async with running() as s:
        answer = await s.post(headers={"x-eldr-priority": "urgent"})
        assert answer.status == 400
        assert "high, normal, low" in answer.error["message"]


@on_uvloop
async def test_one_clients_flood_leaves_others_their_turn() -> None:
    async with running(max_inflight=1, client_header="X-Tenant") as s:
        s.decode[0].token_gap_s = 0.2  # until all of them have come
        done = []

        async def ask(tenant: str) -> None:
            assert (await s.post(headers={"x-tenant": tenant})).status == 200
            done.append(tenant)

        flood = [asyncio.create_task(ask("flood")) for _ in range(20)]
        await until(lambda: s.router.services.admission.queued == 19, "they wait")
        s.decode[0].token_gap_s = 0.01
        other = [asyncio.create_task(ask("other")) for _ in range(3)]
        await asyncio.gather(*flood, *other)
        assert max(place for place, tenant in enumerate(done) if tenant == "other") < 9


def test_admission_under_random_load_and_cancellation() -> None:
    async def run() -> None:
        fleet = Fleet()
        worker = fleet.add("http://d:1", "decode", 5)
        fleet.set_healthy(worker, True)
        admission = Admission(QueueLimits(2**31, 2**31, 60.0, 0.0))
        served = fleet.groups[0].whole
        rng = random.Random(0)
        inside, most = 0, 0
        entered = []

        async def request(n: int) -> None:
            nonlocal inside, most
            await admission.enter(Claim(b"", 1, 1), served)
            inside += 1
            most = max(most, inside)
            entered.append(n)
            try:
                await asyncio.sleep(rng.random() / 1000)
            finally:
                inside -= 1
                admission.leave(served)

        tasks = []
        for n in range(2000):
            tasks.append(asyncio.create_task(request(n)))
            if rng.random() < 0.3:
                tasks[rng.randrange(len(tasks))].cancel()
            if rng.random() < 0.2:
                await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert most == 5
        assert entered == sorted(entered)
        assert (admission.admitted, admission.queued) == (0, 0)

    asyncio.run(run())


def test_nobody_is_admitted_to_an_empty_fleet() -> None:
    async def run() -> None:
        with pytest.raises(NoWorkerError):
            await Admission(QueueLimits(1, 1, 1.0, 60.0)).enter(Claim(b"", 1, 1), Fleet().groups[0].whole)

    asyncio.run(run())


# Names that only some workers serve.

NAMES = {"base": "abc", "x": "ab", "y": "bc", "z": "c"}


def fleet_with_adapters(slots: int) -> tuple[Fleet, dict[str, Worker]]:
    """Three decode workers, of which each serves the base model and some adapters."""
    fleet = Fleet()
    workers = {url: fleet.add(url, "decode", slots) for url in "abc"}
    for url, worker in workers.items():
        cards = [{"id": name, "parent": None if name == "base" else "base"} for name in NAMES if url in NAMES[name]]
        fleet.set_models(worker, cards, 0.0)
        fleet.set_healthy(worker, True)
    return fleet, workers


class Asked:
    """A request in the tests below, from its way into the queue to its end."""

    def __init__(self, admission: Admission, name: str, served: Served, client: bytes) -> None:
        self.name = name
        self.served = served
        self.task = asyncio.create_task(admission.enter(Claim(client, 1, 1), served))
        self.worker: Worker | None = None

    @property
    def waits(self) -> bool:
        return not self.task.done()


def is_short(asked: list[Asked], free: dict[str, int]) -> bool:
    """Whether some set of names has more admitted requests without a worker than free slots (Hall's theorem)."""
    promised = Counter(each.name for each in asked if not each.waits and each.worker is None)
    for size in range(1, len(NAMES) + 1):
        for names in combinations(NAMES, size):
            usable = {url for name in names for url in NAMES[name]}
            if sum(promised[name] for name in names) > sum(free[url] for url in usable):
                return True
    return False


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["enter", "enter", "place", "fail", "end"]), st.sampled_from(sorted(NAMES)),
                  st.integers(0, 50)), max_size=60,
    ),
    st.integers(1, 3),
)  # fmt: skip
def test_admitted_requests_always_find_a_slot_and_nobody_waits_who_could_start(
    steps: list[tuple[str, str, int]], slots: int
) -> None:
    async def run() -> None:
        fleet, workers = fleet_with_adapters(slots)
        admission = Admission(QueueLimits(1000, 1000, 60.0, 0.0))
        asked: list[Asked] = []

        def free() -> dict[str, int]:
            return {url: worker.max_inflight - worker.in_flight for url, worker in workers.items()}

        def place(each: Asked, number: int) -> None:
            usable = admission.usable(each.served)
            eligible = [url for url in fleet.eligible if usable is None or url in usable]
            assert eligible, "it was promised a slot"
            assert set(eligible) <= set(NAMES[each.name])
            each.worker = workers[eligible[number % len(eligible)]]
            each.served.release()
            fleet.started(each.worker)

        def unplace(each: Asked) -> None:
            assert each.worker is not None
            fleet.finished(each.worker)
            each.served.promise()
            each.worker = None

        for what, name, number in steps:
            unplaced = [each for each in asked if not each.waits and each.worker is None]
            placed = [each for each in asked if each.worker is not None]
            if what == "enter":
                served = fleet.served(name)
                assert served is not None
                asked.append(Asked(admission, name, served, b"%d" % (number % 3)))
            elif what == "place" and unplaced:
                place(unplaced[number % len(unplaced)], number)
            elif what == "fail" and placed:
                unplace(placed[number % len(placed)])
                admission.changed()
            elif what == "end" and placed:
                each = placed[number % len(placed)]
                unplace(each)
                asked.remove(each)
                admission.leave(each.served)
            await settle()
            assert not is_short(asked, free())
            for each in (each for each in asked if each.waits):
                could = Asked.__new__(Asked)
                could.name, could.worker, could.task = each.name, None, unplaced_task()
                assert is_short([*asked, could], free()), f"{each.name} waits and has room"
            assert admission.queued == sum(each.waits for each in asked)
        for _ in range(len(asked)):  # everybody gets a turn
            for each in [each for each in asked if not each.waits]:
                if each.worker is None:
                    place(each, 0)
                unplace(each)
                asked.remove(each)
                admission.leave(each.served)
            await settle()
        assert not asked
        assert (admission.admitted, admission.queued, fleet.groups[0].promised) == (0, 0, 0)

    def unplaced_task() -> asyncio.Task[None]:
        return done

    done: asyncio.Task[None]

    async def with_done() -> None:
        nonlocal done
        done = asyncio.create_task(settle())
        await done
        await run()

    asyncio.run(with_done())


@on_uvloop
async def test_a_flood_for_one_adapter_does_not_starve_others_on_its_worker() -> None:
    fleet, workers = fleet_with_adapters(1)
    admission = Admission(QueueLimits(1000, 1000, 60.0, 0.0))
    order: list[str] = []

    async def ask(name: str, client: bytes) -> None:
        served = fleet.served(name)
        assert served is not None
        await admission.enter(Claim(client, 1, 10), served)
        usable = admission.usable(served)
        url = next(url for url in fleet.eligible if usable is None or url in usable)
        served.release()
        fleet.started(workers[url])
        await asyncio.sleep(0)
        fleet.finished(workers[url])
        served.promise()
        order.append(name + client.decode())
        admission.leave(served)

    flood = [asyncio.create_task(ask(name, b"1")) for _ in range(60) for name in ("base", "z")]
    await asyncio.sleep(0)
    others = [asyncio.create_task(ask("z", b"2")) for _ in range(4)]
    await asyncio.gather(*flood, *others)
    assert max(at for at, who in enumerate(order) if who == "z2") < 60


# Replicas that wait for the same slots.


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.booleans(), st.lists(st.integers(0, 5), min_size=3, max_size=3)),
        min_size=1,
        max_size=4,
    )
)
def test_where_all_replicas_wait_one_may_take_a_slot_that_is_free(fleet: list[tuple[int, bool, list[int]]]) -> None:
    """fleet: of each worker its limit, whether it drains, and what each of three replicas runs there."""

    async def run() -> list[int]:
        """How many requests each replica admits, of one that arrives."""
        admitted = []
        for replica in range(3):
            known = Fleet()
            for number, (limit, drains, runs) in enumerate(fleet):
                worker = known.add(f"http://d{number}", "decode", limit)
                known.set_healthy(worker, True)
                for _ in range(runs[replica]):
                    known.started(worker)
                known.set_elsewhere(worker, sum(runs) - runs[replica])
                known.set_draining(worker, drains)
            served, admission = known.groups[0].whole, Admission(QueueLimits(1000, 1000, 60.0, 60.0))
            served.group.waiting_elsewhere = 2
            task = asyncio.create_task(admission.enter(Claim(b"", 1, 1), served))
            await settle()
            admitted.append(admission.admitted)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return admitted

    free = any(not drains and sum(runs) < limit for limit, drains, runs in fleet)
    assert any(asyncio.run(run())) == free
