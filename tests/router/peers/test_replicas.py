"""Several routers that decide as one, over a real NATS server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import nats
import numpy as np
import pytest

from eldr.counts import ExpertCounts, encode_counts
from eldr.errors import EldrError
from eldr.policies.expected_union import ExpectedUnion
from eldr.policies.shares import Share
from eldr.router.peers import wire
from eldr.router.peers.nats import NatsBus
from eldr.router.peers.wire import Bye, Events, Start
from tests.router.certificates import certificate
from tests.router.experts.lessons import counted, rows_of
from tests.router.fake_worker import TOP_K, FakeWorker, Seen, reply
from tests.router.harness import Scripted, on_uvloop, until
from tests.router.peers.replicas import AllSums, Replica, Replicas, nats_server, replicas, slow, total

STREAM: dict[str, Any] = {"stream": True, "max_tokens": 2000}


async def begun(replica: Replica, count: int = 1, **fields: Any) -> list[asyncio.Task[Any]]:
    """Requests that have been placed by this replica and run on."""
    fleet = replica.router.services.fleet
    before = sum(worker.in_flight for worker in fleet.workers("decode").values())
    tasks = [asyncio.create_task(replica.post(**STREAM, **fields)) for _ in range(count)]
    await until(
        lambda: sum(worker.in_flight for worker in fleet.workers("decode").values()) == before + count, "they run"
    )
    return tasks


async def end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@on_uvloop
async def test_a_decision_of_one_counts_the_requests_of_the_other() -> None:
    async with replicas(2, decode=2, prepare=slow) as fleet:
        one, other = fleet.all
        first, second = fleet.decode
        assert isinstance(one.policy, Scripted)
        one.policy.rule = lambda request, load: first.url
        tasks = await begun(one, 3)
        await until(lambda: other.load == {first.url: 3, second.url: 0}, "the other counts them")
        tasks += await begun(other)
        assert isinstance(other.policy, Scripted)
        assert other.policy.asked[-1][1] == {first.url: 3, second.url: 0}
        assert other.worker(second).in_flight == 1
        await until(lambda: one.load == {first.url: 3, second.url: 1}, "the one counts the other's")
        await end(tasks)
        await until(lambda: set(one.load.values()) | set(other.load.values()) == {0}, "they have ended everywhere")
        assert (one.elsewhere, other.elsewhere) == (0, 0)


@on_uvloop
async def test_capacity_is_the_fleets_and_a_slot_that_ends_elsewhere_is_used() -> None:
    async with replicas(2, decode=1, prepare=slow, max_inflight=3) as fleet:
        one, other = fleet.all
        tasks = await begun(one, 3)
        await until(lambda: other.worker(fleet.decode[0]).free == 0, "the other knows that it is full")
        waiting = asyncio.create_task(other.post(**STREAM))
        await until(lambda: other.router.services.admission.queued == 1, "it waits")
        await end(tasks[:1])
        await until(lambda: other.worker(fleet.decode[0]).in_flight == 1, "it runs")
        assert one.worker(fleet.decode[0]).in_flight == 2
        await end([*tasks, waiting])


@on_uvloop
async def test_policies_hold_the_same_sums_bit_for_bit() -> None:
    async with replicas(3, decode=2, policy=lambda: AllSums(), prepare=slow) as fleet:
        tasks: list[asyncio.Task[Any]] = []
        for each in fleet.all:
            tasks += await begun(each, 4)
        policies = [each.policy for each in fleet.all]

        def sums() -> list[Any]:
            return [policy.sums for policy in policies if isinstance(policy, AllSums)]

        await until(lambda: sums()[0] == sums()[1] == sums()[2] and total(sums()[0]) == 12, "all hold all twelve")
        await end(tasks[3:9])
        await until(lambda: sums()[0] == sums()[1] == sums()[2] and total(sums()[0]) == 6, "all hold the other six")
        await end(tasks)


@on_uvloop
async def test_real_policies_hold_the_same_unions() -> None:
    async with replicas(2, decode=2, policy=lambda: ExpectedUnion(seed=3), prepare=slow) as fleet:
        one, other = fleet.all
        # The first usable counts make each policy's model.
        tasks = [*await begun(one), *await begun(other), *await begun(one, 5), *await begun(other, 3)]

        def exposures() -> list[dict[str, bytes]]:
            found = []
            for each in (one, other):
                policy = each.policy
                assert isinstance(policy, ExpectedUnion)
                unions = policy.unions
                found.append({w.url: unions.exposure[policy.row(w.url)].tobytes() for w in fleet.decode})
            return found

        await until(lambda: exposures()[0] == exposures()[1], "both hold the same union")
        assert any(any(row) for row in exposures()[0].values())
        await end(tasks)
        await until(lambda: not any(any(row) for each in exposures() for row in each.values()), "nothing is left")


@on_uvloop
async def test_a_newcomer_gets_what_runs() -> None:
    async with replicas(2, decode=2, prepare=slow) as fleet:
        tasks = [*await begun(fleet.all[0], 3), *await begun(fleet.all[1], 2)]
        newcomer = await fleet.start()
        await fleet.meet()
        await until(lambda: newcomer.elsewhere == 5, "it knows all five")
        assert sum(newcomer.load.values()) == 5
        await end(tasks)
        await until(lambda: newcomer.elsewhere == 0, "it hears of their ends")


@on_uvloop
async def test_a_newcomer_gets_a_snapshot_of_many_parts_while_requests_come_and_go() -> None:
    size = 20_000
    async with replicas(1, decode=2, policy=lambda: AllSums(size), prepare=slow) as fleet:
        for worker in fleet.decode:
            worker.token_gap_s = 1.0
        tasks = await begun(fleet.all[0], 100)  # 2 MB of profiles
        newcomer = await fleet.start(AllSums(size))
        tasks += await begun(fleet.all[0], 5)
        await end(tasks[:20])
        one, other = (each.policy for each in fleet.all)
        assert isinstance(one, AllSums)
        assert isinstance(other, AllSums)
        await until(lambda: one.sums == other.sums and total(one.sums) == 85, "it holds the same")
        assert (newcomer.synced, newcomer.elsewhere) == (1, 85)
        await end(tasks)


@on_uvloop
async def test_a_replica_that_ends_takes_its_requests_out_at_once() -> None:
    async with replicas(2, decode=1, prepare=slow, max_inflight=2) as fleet:
        one, other = fleet.all
        tasks = await begun(one, 2)
        await until(lambda: other.elsewhere == 2, "the other knows them")
        await one.router.stop(0)
        await until(lambda: other.elsewhere == 0, "they are gone")
        assert "peers_expired_total 0" in await other.metrics()
        await end(tasks)


@on_uvloop
async def test_a_replica_that_vanishes_takes_its_requests_out_in_time() -> None:
    async with replicas(1, decode=1, prepare=slow) as fleet:
        bus = NatsBus((fleet.nats.url,), "default")
        other, one = fleet.all[0], await fleet.start(bus=bus)
        await fleet.meet()
        tasks = await begun(one, 2)
        await until(lambda: other.elsewhere == 2, "the other knows them")
        await bus.close()
        await until(lambda: other.elsewhere == 0, "they are gone")
        assert "eldr_peers_expired_total 1.0" in await other.metrics()
        await end(tasks)


@on_uvloop
async def test_the_bus_stops_and_starts_under_load_and_no_client_hears_of_it() -> None:
    async with replicas(2, decode=2, policy=lambda: AllSums()) as fleet:
        for worker in fleet.decode:
            worker.tokens, worker.token_gap_s = ["x"] * 5, 0.005
        statuses: list[int] = []
        running = True

        async def client(replica: Replica) -> None:
            while running:
                statuses.append((await replica.post(stream=True, max_tokens=5)).status)

        clients = [asyncio.create_task(client(each)) for each in fleet.all for _ in range(4)]
        await until(lambda: len(statuses) > 40, "requests are answered")
        fleet.nats.stop()
        await until(lambda: not any(each.up for each in fleet.all), "both notice")
        assert "eldr_peers_reachable 0.0" in await fleet.all[0].metrics()
        answered = len(statuses)
        await until(lambda: len(statuses) > answered + 40, "requests are answered without it")
        assert await fleet.all[0].ready() == 200
        fleet.nats.launch()
        await until(lambda: all(each.up and each.synced == 1 for each in fleet.all), "they meet again")
        running = False
        await asyncio.gather(*clients)
        assert set(statuses) == {200}
        for worker in fleet.decode:
            slow(worker)
        tasks = [*await begun(fleet.all[0], 3), *await begun(fleet.all[1], 2)]
        one, other = (each.policy for each in fleet.all)
        assert isinstance(one, AllSums)
        assert isinstance(other, AllSums)
        await until(lambda: one.sums == other.sums and total(one.sums) == 5, "both hold the same")
        await end(tasks)


@on_uvloop
async def test_a_router_starts_without_the_bus_and_joins_later() -> None:
    async with replicas(1, decode=1) as fleet:
        fleet.nats.stop()
        late = await fleet.start()
        assert (await late.post()).status == 200
        assert (late.up, late.synced) == (False, 0)
        fleet.nats.launch()
        await fleet.meet()


@on_uvloop
async def test_a_connection_that_the_server_ends_with_an_error_is_made_again() -> None:
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(b'INFO {"server_id":"x","version":"2.10.0","max_payload":1048576}\r\n')
        while line := await reader.readline():
            if line.startswith(b"PING"):
                writer.write(b"PONG\r\n")

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    bus = NatsBus((f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}",), "default")
    times: list[bool] = []
    await bus.start(1, lambda frame: None, lambda: times.append(bus.up))
    try:
        await until(lambda: times == [True], "it is connected")
        writers[-1].write(b"-ERR 'User Authentication Expired'\r\n")
        writers[-1].close()
        await until(lambda: times == [True, True] and bus.up, "it is connected again")
        assert bus.publish(b"x")
    finally:
        await bus.close()
        for writer in writers:
            writer.close()
        server.close()


@on_uvloop
async def test_hostile_messages_are_counted_and_nothing_else() -> None:
    async with replicas(2, decode=1, prepare=slow) as fleet:
        one, other = fleet.all
        client = await nats.connect(fleet.nats.url)
        tasks = await begun(one, 2)
        await until(lambda: other.elsewhere == 2, "the other knows them")
        share = Share(np.arange(200, dtype=np.uint8), 2**31 - 1, True, True, 2**31 - 1)
        url = fleet.decode[0].url
        odd = wire.encode(Events(5, 1, [Start(1, url, share, False), Start(2, "http://x", share, True)], [9], [7], {}))
        for data in (b"", b"x", b"EL" * 1000, odd[:-1], odd + b"x", b"\xff" * 2**19):
            await client.publish("eldr.default.all", data)
        await client.publish("eldr.default.all", odd)
        await client.flush()
        await until(lambda: one.router.peers.counters.refused == 6, "they are counted")
        await until(lambda: one.load[url] == 3, "one request that nobody runs")
        assert (await other.post(stream=True)).status == 200
        await client.publish("eldr.default.all", wire.encode(Bye(5)))
        await until(lambda: one.load[url] == 2, "it is gone")
        await client.close()
        await end(tasks)


@on_uvloop
async def test_fleets_on_one_server_do_not_mix() -> None:
    async with replicas(1, decode=1, prepare=slow) as fleet:
        stranger = await fleet.start(fleet="another")
        tasks = await begun(stranger, 1)
        joined = await fleet.start()
        await until(lambda: joined.synced == 1, "those of one fleet meet")
        assert (joined.elsewhere, stranger.synced) == (0, 0)
        await end(tasks)


@on_uvloop
async def test_embeddings_count_as_load_elsewhere() -> None:
    async with replicas(2, decode=1) as fleet:
        one, other = fleet.all
        worker = fleet.decode[0]
        hold = asyncio.Event()

        async def held(fake: FakeWorker, seen: Seen, reader: Any, writer: Any) -> None:
            await hold.wait()
            await reply(writer, 200, b'{"data":[]}')

        worker.others["/v1/embeddings"] = (200, b"{}", "application/json")
        worker.behaviour = held
        task = asyncio.create_task(one.post("/v1/embeddings", input="x"))
        await until(lambda: other.worker(worker).elsewhere == 1, "the other counts it")
        hold.set()
        await task
        await until(lambda: other.worker(worker).elsewhere == 0, "and its end")


@on_uvloop
async def test_a_queue_elsewhere_gets_its_part_of_the_slots() -> None:
    """A replica that holds every slot, and always has somebody waiting, leaves half of them to another."""
    async with replicas(2, decode=1, max_inflight=4) as fleet:
        one, other = fleet.all
        worker = fleet.decode[0]
        worker.tokens, worker.token_gap_s = ["x"] * 10, 0.01
        running = True

        async def client() -> None:
            while running:
                await one.post(stream=True, max_tokens=10)

        clients = [asyncio.create_task(client()) for _ in range(12)]
        await until(lambda: one.worker(worker).in_flight == 4, "it holds all slots")
        others = [asyncio.create_task(other.post(stream=True, max_tokens=10)) for _ in range(8)]
        await until(lambda: other.worker(worker).in_flight == 2, "the other gets half of them")
        assert {answer.status for answer in await asyncio.gather(*others)} == {200}
        running = False
        await asyncio.gather(*clients)


# Who may talk to whom.


@on_uvloop
async def test_the_least_permissions_over_tls_with_a_password(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "nats")
    config = tmp_path / "nats.conf"
    config.write_text(
        f'tls {{ cert_file: "{cert}", key_file: "{key}" }}\n'
        "authorization { users: [ { user: eldr, password: secret, permissions: {\n"
        '  publish: ["eldr.default.all", "eldr.default.to.*"]\n'
        '  subscribe: ["eldr.default.all", "eldr.default.to.*"]\n'
        "} } ] }\n"
    )
    server = await nats_server("-c", str(config))
    workers = [await FakeWorker(role).start() for role in ("prefill", "decode")]
    fleet = Replicas(server, workers, {"peers_ca": cert})
    url = server.url.replace("nats://", "tls://eldr:secret@")
    try:
        one, other = await fleet.start(peers=(url,)), await fleet.start(peers=(url,))
        await fleet.meet()
        slow(workers[1])
        tasks = await begun(one, 2)
        await until(lambda: other.elsewhere == 2, "the other counts them")
        newcomer = await fleet.start(peers=(url,))
        await until(lambda: newcomer.elsewhere == 2, "snapshots pass")
        stranger = await fleet.start(peers=(url.replace("secret", "guess"),))
        await until(lambda: one.synced == 2, "those with the password meet")
        assert (stranger.up, one.synced, stranger.synced) == (False, 2, 0)
        await end(tasks)
    finally:
        await fleet.close()
        server.stop()


@on_uvloop
async def test_a_ca_that_cannot_be_read_is_said_before_anything_starts(tmp_path: Path) -> None:
    bus = NatsBus(("nats://127.0.0.1:1",), "default", ca=tmp_path / "none")
    with pytest.raises(EldrError, match=r"peers_ca: .*none cannot be used"):
        await bus.start(1, lambda frame: None, lambda: None)
    bus = NatsBus(("nats://127.0.0.1:1",), "default", credentials=tmp_path / "none")
    with pytest.raises(EldrError, match="peers_credentials_file"):
        await bus.start(1, lambda frame: None, lambda: None)


@on_uvloop
async def test_all_replicas_learn_from_what_is_reported_to_one(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("of-reports")
    settings: dict[str, Any] = {"report_key_file": tmp_path / "key"}
    async with replicas(2, decode=1, policy=lambda: ExpectedUnion(signature="prompt"), **settings) as fleet:
        one, other = fleet.all
        for number in range(3):
            assert (await one.post(prompt=f"words of request {number}", max_tokens=16)).status == 200
        names = [seen.headers["x-request-id"] for seen in fleet.decode[0].generated]
        counts = encode_counts(ExpertCounts(counted(rows_of(9)).astype(np.uint32), 9, TOP_K))
        reports = [{"id": f"cmpl-{name}-0-0123abcd", "counts": counts} for name in names]
        answer = await one.send({"v": 1, "reports": reports}, "/eldr/experts", "of-reports")
        assert answer.json() == {"accepted": 3, "refused": {}}

        def lessons(replica: Replica) -> tuple[list[Any], Any]:
            (lane,) = replica.router.services.lanes
            learned = lane.learning.learner.lessons
            words, profiles = ([], np.zeros(0)) if learned is None else learned.with_words()
            return [each.buckets.tolist() for each in words], profiles.tolist()

        await until(lambda: len(lessons(other)[0]) == 3, "the other has them too")
        assert lessons(one) == lessons(other)
