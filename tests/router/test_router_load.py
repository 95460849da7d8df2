"""Who waits, who is refused and who goes first; what vLLM says of its load; data-parallel ranks."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter, deque

import pytest
from fake_worker import FakeWorker
from harness import ASK, Scripted, on_uvloop, running, until
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.errors import EldrError
from eldr.router.app import Router
from eldr.router.config.groups import QueueLimits
from eldr.router.config.settings import RouterConfig
from eldr.router.fleet.load_watch import Capacity, EngineLoad, parse_active_experts, parse_load
from eldr.router.fleet.workers import Fleet
from eldr.router.http.errors import ApiError
from eldr.router.placement.admission import PRIORITIES, Admission, Claim, NoWorkerError
from eldr.router.placement.fair_queue import MAX_COST, FairQueue, QueueFullError

# The queue.


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2 * MAX_COST)), max_size=60), st.data())
def test_nothing_is_lost_and_a_clients_items_keep_their_order(pushed, data):
    queue = FairQueue(2**31)
    for number, (client, cost) in enumerate(pushed):
        assert queue.push((client, number), client.encode(), cost) is None
    left = {(client, number) for number, (client, _) in enumerate(pushed)}
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
def test_clients_that_always_wait_get_the_same_cost_through(costs, pops):
    """The bound of start-time fair queuing: two clients differ by their largest items at most."""
    queue = FairQueue(2**31)
    for client, own in enumerate(costs):
        for number, cost in enumerate(own):
            queue.push((client, number), b"%d" % client, cost)
    served = Counter(dict.fromkeys(range(len(costs)), 0))
    for _ in range(pops):
        client, number = queue.pop()
        served[client] += costs[client][number]
    assert max(served.values()) - min(served.values()) <= 2 * MAX_COST


def test_a_flood_of_one_client_does_not_keep_another_waiting():
    queue = FairQueue(1000)
    for number in range(900):
        queue.push(number, b"flood", 500)
    queue.push("late", b"other", 500)
    assert "late" in [queue.pop() for _ in range(2)]


def test_a_client_that_asks_one_by_one_is_not_ahead_of_one_that_queues():
    """What it got before still counts when it comes back, so that it gets no more than the other."""
    queue = FairQueue(1000)
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
def test_a_full_queue_gives_way_to_clients_with_less_than_their_share(clients, limit):
    """Against a plain model: per client a list, the longest of which loses its newest item."""
    queue, model = FairQueue(limit), {}
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


def fleet_of(slots):
    fleet = Fleet()
    if slots:
        fleet.set_healthy(fleet.add("http://d:1", "decode", slots), True)
    return fleet


async def settle():
    for _ in range(3):
        await asyncio.sleep(0)


@on_uvloop
async def test_higher_priorities_go_first_and_each_has_its_own_bound():
    admission = Admission(fleet_of(1), QueueLimits(100, 2, 60.0, 0.0))
    await admission.enter(Claim(b"", 1, 1))
    order, tasks = [], []

    async def wait(number, priority):
        await admission.enter(Claim(b"c", priority, 1))
        order.append((PRIORITIES[priority], number))

    for number in range(3):
        for priority in (2, 1, 0):
            tasks.append(asyncio.create_task(wait(number, priority)))
            await settle()
    assert admission.queued_by_priority == {"high": 2, "normal": 2, "low": 2}
    for _ in range(6):
        admission.leave()
        await settle()
    assert order == [(name, number) for name in PRIORITIES for number in range(2)]
    refused = [task.exception() for task in tasks[-3:]]
    assert [error.status for error in refused] == [429] * 3
    assert all(1 <= error.retry_after_s <= 60 for error in refused)
    assert admission.refusals == {"full": 3}


@on_uvloop
async def test_who_waits_too_long_is_told_so_and_holds_no_place():
    admission = Admission(fleet_of(1), QueueLimits(100, 10, 0.05, 0.0))
    await admission.enter(Claim(b"", 1, 1))
    with pytest.raises(ApiError) as caught:
        await admission.enter(Claim(b"", 1, 1))
    assert (caught.value.status, admission.queued, admission.admitted) == (503, 0, 1)
    admission.leave()
    await admission.enter(Claim(b"", 1, 1))
    assert admission.admitted == 1


@on_uvloop
async def test_the_newest_of_the_longest_gives_way():
    admission = Admission(fleet_of(1), QueueLimits(100, 3, 60.0, 0.0))
    await admission.enter(Claim(b"", 1, 1))
    flood = [asyncio.create_task(admission.enter(Claim(b"flood", 1, 1))) for _ in range(3)]
    await settle()
    other = asyncio.create_task(admission.enter(Claim(b"other", 1, 1)))
    await settle()
    assert isinstance(flood[2].exception(), ApiError)
    assert (admission.queued, admission.refusals) == (3, {"displaced": 1})
    for _ in range(3):
        admission.leave()
        await settle()
    await asyncio.gather(other, *flood[:2])


@on_uvloop
async def test_no_more_streams_than_allowed_however_large_the_fleet():
    admission = Admission(fleet_of(1000), QueueLimits(3, 10, 60.0, 0.0))
    tasks = [asyncio.create_task(admission.enter(Claim(b"", 1, 1))) for _ in range(5)]
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
def test_whatever_happens_every_request_ends_once_and_none_is_counted_twice(steps, worker_wait_s):
    async def run():
        fleet = Fleet()
        worker = fleet.add("http://d:1", "decode", 2)
        fleet.set_healthy(worker, True)
        admission = Admission(fleet, QueueLimits(100, 3, 60.0, worker_wait_s))
        tasks, inside = [], 0
        for what, client, number in steps:
            if what == "enter":
                tasks.append(asyncio.create_task(admission.enter(Claim(client, number, 1))))
            elif what == "leave":
                await settle()
                inside = admission.admitted
                if inside:
                    admission.leave()
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
async def test_a_full_queue_answers_429_with_retry_after():
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
async def test_a_wait_that_is_too_long_ends_with_503():
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
async def test_priorities_of_requests(headers, body, name):
    async with running(max_inflight=1) as s:
        s.decode[0].token_gap_s = 0.05
        first = asyncio.create_task(s.post())
        await until(lambda: s.decode[0].running == 1, "it runs")
        second = asyncio.create_task(s.post({**ASK, **body}, headers=headers))
        await until(lambda: s.router.services.admission.queued == 1, "it waits")
        assert s.router.services.admission.queued_by_priority[name] == 1
        assert [(await task).status for task in (first, second)] == [200, 200]


@on_uvloop
async def test_an_unknown_priority_is_refused():
    async with running() as s:
        answer = await s.post(headers={"x-eldr-priority": "urgent"})
        assert answer.status == 400
        assert "high, normal, low" in answer.error["message"]


@on_uvloop
async def test_one_clients_flood_leaves_others_their_turn():
    async with running(max_inflight=1, client_header="X-Tenant") as s:
        s.decode[0].token_gap_s = 0.01
        done = []

        async def ask(tenant):
            assert (await s.post(headers={"x-tenant": tenant})).status == 200
            done.append(tenant)

        flood = [asyncio.create_task(ask("flood")) for _ in range(20)]
        await until(lambda: s.router.services.admission.queued == 19, "they wait")
        other = [asyncio.create_task(ask("other")) for _ in range(3)]
        await asyncio.gather(*flood, *other)
        assert max(place for place, tenant in enumerate(done) if tenant == "other") < 9


# What engines say.

METRICS = """# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="{engine}",model_name="tiny"}} {waiting}
vllm:num_requests_waiting_by_reason{{engine="{engine}",model_name="tiny",reason="capacity"}} {capacity}
vllm:num_requests_waiting_by_reason{{engine="{engine}",model_name="tiny",reason="deferred"}} 9.0
vllm:kv_cache_usage_perc{{engine="{engine}",model_name="tiny"}} {kv}
vllm:e2e_request_latency_seconds_bucket{{engine="{engine}",le="0.3",model_name="tiny"}} 12.0
"""


def said(waiting=0, kv=0.5, engine=0):
    return METRICS.format(engine=engine, waiting=waiting + 9, capacity=waiting, kv=kv)


def test_load_is_read_from_the_exposition():
    both = parse_load((said(3, 0.25) + said(0, 1e-3, engine=1)).encode())
    assert both == {0: EngineLoad(3, 0.25), 1: EngineLoad(0, 0.001)}
    older = "\n".join(line for line in said(3).splitlines() if "by_reason" not in line)
    assert parse_load(older.encode()) == {0: EngineLoad(12, 0.5)}
    assert parse_load(b"go_goroutines 7\n") == {}
    assert parse_load(b"vllm:num_requests_waiting{} 3") == {0: EngineLoad(3, 0.0)}
    assert parse_load(b"a_vllm:num_requests_waiting{} 3\n# vllm:num_requests_waiting{} 3\n") == {}


@pytest.mark.parametrize("value", ["1e999", "-1e999", "1e", "+", "nan", "3 4", ""])
def test_what_is_no_number_is_passed_over(value):
    assert parse_load(f"vllm:num_requests_waiting{{}} {value}\n".encode()) == {}
    assert parse_active_experts(f"vllm:eldr_active_experts_sum{{}} {value}\n".encode(), 0) is None


def test_active_experts_are_read_of_one_engine():
    line = 'vllm:eldr_active_experts_{}{{engine="{}",model_name="tiny"}} {}\n'
    text = "".join(
        line.format(name, engine, value + engine) for engine in (0, 1) for name, value in (("sum", 50), ("count", 4))
    )
    assert parse_active_experts(text.encode(), 1) == (51.0, 5.0)
    assert parse_active_experts(text.encode(), 2) is None


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200)
    | st.text(max_size=100).map(lambda t: f"vllm:num_requests_waiting{{{t}}} {t}".encode())
    | st.from_regex(r'vllm:num_requests_waiting\{engine="[0-9]{1,30}"\} [0-9.eE+-]+\n', fullmatch=True).map(str.encode)
)
def test_any_text_is_read_without_harm(text):
    parse_load(text)


def test_what_waits_in_an_engine_lowers_its_limit_and_room_raises_it_again():
    capacity = Capacity(256)
    queued = EngineLoad(40, 1.0)
    assert capacity.heard(queued, 100) == 256  # one look may be chance
    assert capacity.heard(queued, 100) == 60
    assert capacity.heard(EngineLoad(0, 0.95), 60) == 60  # nothing waits, and nothing is free
    assert capacity.heard(EngineLoad(0, 0.5), 30) == 60  # the limit does not bind
    limits = [capacity.heard(EngineLoad(0, 0.5), 256) for _ in range(40)]
    assert limits[0] == 67
    assert limits == sorted(limits)
    assert limits[-1] == 256


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 300),
    st.lists(st.tuples(st.integers(0, 400), st.floats(0, 1), st.integers(0, 300)), max_size=50),
)
def test_a_learned_limit_stays_between_one_and_the_configured(most, looks):
    capacity = Capacity(most)
    for waiting, kv_usage, in_flight in looks:
        assert 1 <= capacity.heard(EngineLoad(waiting, kv_usage), in_flight) <= most


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 256))
def test_the_limit_finds_what_an_engine_can_run(room, most):
    """An engine that runs `room` requests under endless demand: in the end nearly as many are sent, hardly more."""
    capacity, sent = Capacity(most), []
    for _ in range(300):
        in_flight = capacity.limit
        sent.append(in_flight)
        waiting = max(0, in_flight - room)
        capacity.heard(EngineLoad(waiting, min(1.0, 0.8 * in_flight / room)), in_flight)
    wanted = min(room, most)
    assert all(wanted <= limit <= wanted + max(1, wanted // 8) for limit in sent[-100:])


@on_uvloop
async def test_a_worker_with_a_queue_of_its_own_gets_less():
    async with running(decode=2, max_inflight=8, load_interval_s=0.05) as s:
        s.decode[0].metrics = said(0)
        fleet = s.router.services.fleet
        first = fleet.workers("decode")[s.decode[0].url]
        for worker in s.decode:
            worker.token_gap_s = 0.2
        tasks = [asyncio.create_task(s.post()) for _ in range(12)]
        await until(lambda: sum(worker.running for worker in s.decode) == 12, "all run")
        s.decode[0].metrics = said(4, 0.97)
        await until(lambda: first.max_inflight < 8, "the limit falls")
        assert fleet.decode_slots == 8 + first.max_inflight
        assert first.max_inflight == 2
        assert await s.metric("eldr_worker_waiting", worker=s.decode[0].url) == 4
        assert await s.metric("eldr_worker_kv_usage_ratio", worker=s.decode[0].url) == 0.97
        assert await s.metric("eldr_inflight_limit", worker=s.decode[0].url) == 2
        assert {(await task).status for task in tasks} == {200}


# Data parallelism.


@on_uvloop
async def test_ranks_of_one_server_are_workers_of_their_own():
    prefill, decode = await FakeWorker("prefill").start(), await FakeWorker("decode").start()
    decode.metrics = said(engine=0) + said(engine=1)
    policy = Scripted()
    router = Router(RouterConfig.of(prefill=(prefill.url,), decode=(decode.url + "#dp=2",), port=0), policy)
    await router.start()
    try:
        assert policy.heard == [("joined", f"{decode.url}#rank=0"), ("joined", f"{decode.url}#rank=1")]
        for number in (1, 0, 1):
            policy._choose = lambda request, in_flight, number=number: f"{decode.url}#rank={number}"
            reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"x-data-parallel-rank: 7\r\nconnection: close\r\ncontent-length: 31\r\n\r\n"
                b'{"prompt": "x","max_tokens": 4}'
            )
            assert b" 200 " in (await reader.read()).splitlines()[0]
            writer.close()
        assert [seen.headers["x-data-parallel-rank"] for seen in decode.generated] == ["1", "0", "1"]
        assert "x-data-parallel-rank" not in prefill.generated[0].headers
    finally:
        await prefill.stop()
        await decode.stop()
        await router.stop(0)


@pytest.mark.parametrize(
    ("engines", "suffix", "said_of_it"),
    [(4, "", "#dp=4"), (2, "#rank=2", "none of rank 2"), (1, "#dp=2", "none of rank 1")],
)
@on_uvloop
async def test_a_url_that_does_not_name_one_engine_is_refused_at_start(engines, suffix, said_of_it):
    prefill, decode = await FakeWorker("prefill").start(), await FakeWorker("decode").start()
    decode.metrics = "".join(said(engine=engine) for engine in range(engines))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    router = Router(RouterConfig.of(prefill=(prefill.url,), decode=(decode.url + suffix,), port=port), Scripted())
    try:
        with pytest.raises(EldrError, match=said_of_it):
            await router.start()
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)
    finally:
        await prefill.stop()
        await decode.stop()
