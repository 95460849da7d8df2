"""Which workers a gateway is told, by what it asked, and what counts as running where."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from eldr.router.fleet.workers import Worker
from tests.router.fake_worker import FakeWorker, counts_wire
from tests.router.harness import Scripted, preferring, until
from tests.router.peers.replicas import AllSums
from tests.router.picker.client import ASK, BUFFERED, DESTINATION, NONE, STREAMED, Gateway, Picked, endpoint, picking

HANDED_OFF: dict[str, Any] = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2]],
    "remote_engine_id": "e",
    "remote_request_id": "cmpl-x-0-1",
    "remote_host": "10.0.0.9",
    "remote_port": 5600,
}


def handed_off(left_s: float = 30.0, **more: object) -> dict[str, Any]:
    """The body of a decode request as llm-d's coordinator makes it from a prefill worker's answer."""
    lease = {"left_s": left_s, "unix_s": time.time()}
    return {**ASK, "kv_transfer_params": {**HANDED_OFF, "eldr_counts": counts_wire(3), "eldr_lease": lease, **more}}


def workers(gateway: Gateway, leg: Any = "decode") -> dict[str, Worker]:
    """The picker's workers by their endpoints."""
    fleet = gateway.setup.router.services.fleet
    return {url.removeprefix("http://"): worker for url, worker in fleet.workers(leg).items()}


def running_at(gateway: Gateway, fake: FakeWorker, leg: Any = "decode") -> int:
    return workers(gateway, leg)[endpoint(fake)].in_flight


async def all_over(gateway: Gateway) -> None:
    """Nothing is running or waiting any more."""
    services = gateway.setup.router.services

    def over() -> bool:
        legs: tuple[Any, ...] = ("prefill", "decode")
        busy = [worker for leg in legs for worker in workers(gateway, leg).values() if worker.in_flight]
        promised = sum(group.promised for group in services.fleet.groups)
        return not busy and not services.admission.admitted and not services.admission.queued and not promised

    await until(over, "all requests end")


# The decode phase of llm-d's coordinator.


async def test_a_hand_off_goes_where_its_counts_lead_and_without_them() -> None:
    policy = Scripted()
    async with picking(decode=2, policy=policy) as g:
        second = g.setup.decode[1]
        policy.rule = preferring(second)
        body = handed_off()
        exchange, picked = await g.ask(body)
        assert picked.endpoints[0] == endpoint(second)
        (request, _), *others = policy.asked
        assert not others
        assert request.counts is not None
        assert request.prompt_tokens == request.counts.prompt_tokens == 3
        passed_on = json.loads(picked.body or b"")
        lease = passed_on["kv_transfer_params"].pop("eldr_lease")
        assert passed_on == {**ASK, "kv_transfer_params": HANDED_OFF}
        assert 29 < lease["left_s"] <= 30
        assert running_at(g, second) == 1
        await exchange.answer()
        await exchange.trailers()
        assert running_at(g, second) == 0
        assert policy.heard[-2:] == [("started", second.url), ("finished", second.url)]


async def test_the_time_a_coordinator_took_is_no_longer_left() -> None:
    async with picking(decode=1) as g:
        body = handed_off()
        body["kv_transfer_params"]["eldr_lease"]["unix_s"] -= 12
        _, picked = await g.ask(body)
        lease = json.loads(picked.body or b"")["kv_transfer_params"]["eldr_lease"]
        assert 17 < lease["left_s"] <= 18
        assert abs(lease["unix_s"] - time.time()) < 5


async def test_a_decode_request_before_any_prefill_is_placed_too() -> None:
    policy = Scripted()
    async with picking(decode=2, policy=policy) as g:
        body = b' {"prompt" : "hello", "model":"tiny"}\n'
        _, picked = await g.ask(body)
        assert picked.body == body
        assert policy.asked[0][0].counts is None


async def test_a_lease_that_ends_before_a_worker_is_eligible_is_503() -> None:
    policy = Scripted()
    async with picking(decode=2, policy=policy, max_inflight=1) as g:
        first, second = g.setup.decode
        policy.rule = preferring(first)
        await g.ask()
        # The other worker has room, so the request is admitted, but the gateway does not allow that one.
        _, picked = await g.ask(handed_off(left_s=0.3), subset=[endpoint(first)])
        assert picked.status == 503
        assert running_at(g, second) == 0


# The prefill phase, and both in one.


async def test_prefill_goes_by_the_start_of_the_prompt() -> None:
    async with picking(prefill=3, decode=2) as g:
        chosen = []
        for _ in range(2):
            for text in ("one", "two", "three", "four"):
                exchange, picked = await g.ask({**ASK, "prompt": text}, epp_profile="prefill")
                chosen.append((text, picked.endpoints[0]))
                assert picked.endpoints[0] in workers(g, "prefill")
                assert workers(g, "prefill")[picked.endpoints[0]].in_flight == 1
                await exchange.answer()
                await exchange.trailers()
        assert len(set(chosen)) == 4, "the same prompt went to two workers"
        await all_over(g)


async def test_the_header_wins_over_the_setting() -> None:
    async with picking(prefill=1, decode=1, phase="prefill") as g:
        _, picked = await g.ask()
        assert picked.endpoints == [endpoint(g.setup.prefill[0])]
        _, picked = await g.ask(epp_profile="Decode")
        assert picked.endpoints == [endpoint(g.setup.decode[0])]


async def test_a_pair_for_the_sidecar() -> None:
    async with picking(prefill=2, decode=2, phase="pair") as g:
        exchange, picked = await g.ask()
        prefiller = picked.headers["x-prefiller-host-port"]
        assert prefiller in workers(g, "prefill")
        assert picked.endpoints[0] in workers(g)
        assert workers(g, "prefill")[prefiller].in_flight == 1
        await exchange.answer()
        assert workers(g, "prefill")[prefiller].in_flight == 0, "the prompt is computed when the answer begins"
        assert workers(g)[picked.endpoints[0]].in_flight == 1
        await exchange.trailers()
        await all_over(g)


async def test_a_prefill_worker_is_free_again_before_an_answer_ends_that_is_not_streamed() -> None:
    async with picking(prefill=1, decode=1, phase="pair") as g:
        (prefill,) = g.setup.prefill
        unknown, _ = await g.ask()
        stream, _ = await g.ask({**ASK, "stream": True})
        assert running_at(g, prefill, "prefill") == 2, "nothing is known of how long that takes"
        await asyncio.sleep(0.5)  # so a prefill seems to take a second at most
        await stream.answer()
        await stream.trailers()
        await unknown.answer()
        await unknown.trailers()
        await all_over(g)
        exchange, _ = await g.ask()
        assert running_at(g, prefill, "prefill") == 1
        await until(lambda: running_at(g, prefill, "prefill") == 0, "such a prefill is over")
        assert running_at(g, g.setup.decode[0]) == 1
        await exchange.answer()
        await exchange.trailers()
        early, _ = await g.ask()
        await early.answer(500, end=True)
        assert running_at(g, prefill, "prefill") == 0
        await all_over(g)


@pytest.mark.parametrize("body", [{**ASK, "n": 2}, {**ASK, "prompt": ["a", "b"]}], ids=["n", "several prompts"])
async def test_what_cannot_be_handed_off_gets_no_prefiller(body: dict[str, Any]) -> None:
    async with picking(prefill=1, decode=1, phase="pair") as g:
        _, picked = await g.ask(body)
        assert "x-prefiller-host-port" not in picked.headers
        assert picked.removed == ["x-prefiller-host-port"], "a client's own must not stay"


# Aggregated workers.


async def test_aggregated_workers_are_chosen_whatever_the_phase() -> None:
    policy = Scripted()
    async with picking(aggregated=2, policy=policy) as g:
        for profile in ("prefill", "decode", "neither"):
            policy.rule = preferring(g.setup.aggregated[1])
            exchange, picked = await g.ask(epp_profile=profile)
            assert picked.endpoints[0] == endpoint(g.setup.aggregated[1])
            assert policy.asked[-1][0].computes_prompt
            await exchange.answer(end=True)
        await all_over(g)


async def test_the_value_is_the_same_in_header_and_metadata_with_fallbacks_by_load() -> None:
    policy = Scripted()
    async with picking(aggregated=3, policy=policy, fallbacks=2) as g:
        first, second, third = g.setup.aggregated
        policy.rule = preferring(second)
        await g.ask()
        policy.rule = preferring(first)
        _, picked = await g.ask()
        assert picked.endpoints == [endpoint(first), endpoint(third), endpoint(second)]
        assert picked.metadata == picked.headers[DESTINATION]


async def test_a_gateway_that_used_a_fallback_takes_the_first_out() -> None:
    policy = Scripted()
    async with picking(aggregated=2, policy=policy, eject_failures=1) as g:
        first, second = g.setup.aggregated
        policy.rule = preferring(first)
        exchange, _ = await g.ask()
        await exchange.answer(served=endpoint(second))
        assert workers(g)[endpoint(first)].ejected
        assert not workers(g)[endpoint(second)].ejected


@pytest.mark.parametrize("phase", ["aggregated", "decode", "prefill"])
async def test_a_request_counts_at_the_worker_that_serves_it(phase: str) -> None:
    policy = AllSums()
    roles: dict[str, Any] = {"aggregated": {"aggregated": 2}, "decode": {"decode": 2}, "prefill": {"prefill": 2}}
    async with picking(**roles[phase], policy=policy, phase="prefill" if phase == "prefill" else "decode") as g:
        leg = "prefill" if phase == "prefill" else "decode"
        exchange, picked = await g.ask(handed_off() if phase == "decode" else ASK)
        fleet = workers(g, leg)
        (other,) = fleet.keys() - {picked.endpoints[0]}
        assert fleet[picked.endpoints[0]].in_flight == 1
        await exchange.answer(served=other)
        assert {name: worker.in_flight for name, worker in fleet.items()} == {picked.endpoints[0]: 0, other: 1}
        if leg == "decode":
            assert {url: sums[0] for url, sums in policy.sums.items()} == {fleet[other].url: 1}
        await exchange.trailers()
        await all_over(g)
        assert policy.sums == {}


async def test_an_answer_of_an_endpoint_that_nobody_knows_counts_at_the_first() -> None:
    async with picking(aggregated=2, eject_failures=2) as g:
        exchange, picked = await g.ask()
        await exchange.answer(served="10.9.9.9:80")
        assert workers(g)[picked.endpoints[0]].in_flight == 1
        await exchange.trailers()
        await all_over(g)


async def test_an_error_of_a_fallback_is_the_fallbacks_fault() -> None:
    policy = Scripted()
    async with picking(aggregated=3, policy=policy, eject_failures=2) as g:
        first, second, _ = g.setup.aggregated
        policy.rule = preferring(first)
        exchange, _ = await g.ask()
        await exchange.answer(503, served=endpoint(second))
        await exchange.trailers()
        for worker, reason in ((first, "refused"), (second, "status")):
            assert await g.setup.metric("eldr_worker_failures_total", worker=worker.url, reason=reason) == 1
        assert await g.setup.metric("eldr_worker_failures_total") == 2


async def test_failed_answers_eject_a_worker_and_others_do_not() -> None:
    policy = Scripted()
    async with picking(aggregated=2, policy=policy, eject_failures=2) as g:
        first = g.setup.aggregated[0]
        policy.rule = preferring(first)
        for status in (404, 503, 200, 503, 429, 503):
            exchange, _ = await g.ask()
            assert not workers(g)[endpoint(first)].ejected
            await exchange.answer(status)
        assert workers(g)[endpoint(first)].ejected


async def test_a_gateway_with_too_many_requests_of_its_own_ejects_no_worker() -> None:
    async with picking(aggregated=2, eject_failures=2) as g:
        for _ in range(8):
            exchange, _ = await g.ask()
            await exchange.answer(503, x_envoy_overloaded="true")
            await exchange.trailers()
        assert not any(worker.ejected for worker in workers(g).values())
        await all_over(g)


# Subsets.


@pytest.mark.parametrize("as_text", [True, False])
async def test_only_endpoints_of_the_subset_are_named(as_text: bool) -> None:
    async with picking(aggregated=4, fallbacks=3) as g:
        allowed = [endpoint(worker) for worker in g.setup.aggregated[1:3]]
        for _ in range(6):
            _, picked = await g.ask(subset=",".join(allowed) if as_text else allowed)
            assert set(picked.endpoints) == set(allowed)


async def test_a_subset_limits_both_of_a_pair() -> None:
    async with picking(prefill=3, decode=3, phase="pair") as g:
        allowed = [endpoint(g.setup.prefill[2]), endpoint(g.setup.decode[1])]
        for text in ("a", "b", "c", "d"):
            _, picked = await g.ask({**ASK, "prompt": text}, subset=allowed)
            assert [picked.headers["x-prefiller-host-port"], *picked.endpoints] == allowed


@pytest.mark.parametrize("subset", [[], "", ["10.9.9.9:8000"]], ids=["none", "empty text", "strangers"])
@pytest.mark.parametrize("profile", ["decode", "prefill"])
async def test_a_subset_without_workers_is_503(subset: Any, profile: str) -> None:
    async with picking(prefill=1, decode=1) as g:
        _, picked = await g.ask(subset=subset, epp_profile=profile)
        assert picked.status == 503
        assert picked.error["code"] == 503
        await all_over(g)


async def test_an_address_without_a_port_stands_for_all_its_ports() -> None:
    async with picking(aggregated=2) as g:
        _, picked = await g.ask(subset=["127.0.0.1"])
        assert len(picked.endpoints) == 2


# Refusals.


async def test_a_full_queue_is_429_and_says_when_to_come_back() -> None:
    async with picking(aggregated=1, max_inflight=1, max_queued=0) as g:
        await g.ask()
        _, picked = await g.ask()
        assert picked.status == 429
        assert int(picked.headers["retry-after"]) >= 1
        assert picked.headers["content-type"] == "application/json"
        assert picked.error["type"] == "RateLimitError"


async def test_no_worker_is_503() -> None:
    def down(setup: Any) -> None:
        setup.aggregated[0].healthy = False

    async with picking(aggregated=1, worker_wait_s=0, prepare=down) as g:
        _, picked = await g.ask()
        assert picked.status == 503
        assert await g.check("readiness") == 2
        assert await g.check("liveness") == 1


async def test_a_request_waits_for_room_and_for_its_turn() -> None:
    async with picking(aggregated=1, max_inflight=1) as g:
        first, _ = await g.ask()
        second = asyncio.create_task(g.ask())
        await until(lambda: g.setup.router.services.admission.queued, "the second waits")
        await first.answer()
        await first.trailers()
        _, picked = await second
        assert picked.endpoints == [endpoint(g.setup.aggregated[0])]


async def test_an_unknown_model_is_404() -> None:
    async with picking(aggregated=1) as g:
        _, picked = await g.ask({**ASK, "model": "nobodys"})
        assert picked.status == 404
        assert "nobodys" in picked.error["message"]


# What is no request for text.


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", b"{not json"), ("/v1/completions", b"\xff"), ("/anything", b"\x00\x01"), ("/v1/score", b"{}")],
)
async def test_bodies_that_nobody_here_reads_pass_untouched(path: str, body: bytes) -> None:
    async with picking(aggregated=2) as g:
        exchange, picked = await g.ask(body, path=path)
        assert picked.body == body
        assert len(picked.endpoints) == 2
        await exchange.answer()
        await exchange.trailers()
        await all_over(g)


@pytest.mark.parametrize("body", [b"{}", b"no json"])
async def test_a_picker_for_one_phase_sends_them_there(body: bytes) -> None:
    async with picking(prefill=2) as g:
        for path in ("/v1/models", "/v1/score", "/v1/completions"):
            exchange, picked = await g.ask(body, path=path, epp_profile="prefill")
            assert not picked.status
            assert set(picked.endpoints) == {endpoint(worker) for worker in g.setup.prefill}
            await exchange.answer(end=True)
        await all_over(g)


async def test_all_busy_is_429_for_what_has_no_queue() -> None:
    async with picking(aggregated=1, max_inflight=1) as g:
        await g.ask()
        _, picked = await g.ask(b"{}", path="/v1/score")
        assert picked.status == 429


async def test_a_get_has_no_body_to_wait_for() -> None:
    async with picking(aggregated=1) as g:
        exchange, picked = g.exchange(), Picked()
        await exchange.headers(path="/v1/models?x=1", method="GET", end=True)
        picked.take(await exchange.next())
        assert picked.endpoints == [endpoint(g.setup.aggregated[0])]


# The modes of bodies.


async def test_a_buffered_body_is_answered_with_the_choice() -> None:
    async with picking(decode=2) as g:
        exchange, picked = g.exchange(), Picked()
        await exchange.headers(mode=BUFFERED)
        assert (await exchange.next()).WhichOneof("response") == "request_headers"
        await exchange.body(json.dumps(handed_off()).encode())
        message = await exchange.next()
        assert message.WhichOneof("response") == "request_body"
        picked.take(message)
        assert picked.endpoints[0] in workers(g)
        assert "eldr_counts" not in json.loads(picked.body or b"")["kv_transfer_params"]
        await exchange.answer()
        await exchange.trailers()
        await all_over(g)


@pytest.mark.parametrize("mode", [NONE, STREAMED], ids=["none", "streamed"])
async def test_without_a_body_to_wait_for_load_decides(mode: Any) -> None:
    async with picking(aggregated=2) as g:
        chosen = set()
        for _ in range(2):
            exchange, picked = g.exchange(), Picked()
            await exchange.headers(mode=mode)
            picked.take(await exchange.next())
            chosen.add(picked.endpoints[0])
        assert len(chosen) == 2


async def test_a_body_in_pieces_comes_back_in_order_with_trailers_behind_it() -> None:
    async with picking(aggregated=1, max_body_bytes=4 * 2**20) as g:
        exchange, picked = g.exchange(), Picked()
        raw = json.dumps({**ASK, "prompt": "x" * 300_000}).encode()
        await exchange.headers()
        for start in range(0, len(raw), 70_001):
            await exchange.body(raw[start : start + 70_001], end=False)
        await exchange.request_trailers()
        picked.take(await exchange.next())
        body = b""
        while (message := await exchange.next()).WhichOneof("response") == "request_body":
            streamed = message.request_body.response.body_mutation.streamed_response
            assert not streamed.end_of_stream
            assert len(streamed.body) <= 64 * 1024
            body += streamed.body
        assert message.WhichOneof("response") == "request_trailers"
        assert body == raw


async def test_a_body_beyond_the_limit_is_413() -> None:
    async with picking(aggregated=1, max_body_bytes=1000) as g:
        exchange, picked = g.exchange(), Picked()
        await exchange.headers()
        for _ in range(3):
            await exchange.body(b"x" * 500, end=False)
        picked.take(await exchange.next())
        assert picked.status == 413
        await all_over(g)


async def test_answers_that_a_filter_streams_through_come_back_whole() -> None:
    async with picking(aggregated=1) as g:
        exchange, _ = await g.ask(response_mode=4)
        await exchange.answer()
        for piece, end in ((b"one", False), (b"two", True)):
            await exchange.response_body(piece, end)
            streamed = (await exchange.next()).response_body.response.body_mutation.streamed_response
            assert (streamed.body, streamed.end_of_stream) == (piece, end)
        await all_over(g)


@pytest.mark.parametrize("mode", [BUFFERED, NONE], ids=["buffered", "none"])
async def test_no_tokens_are_asked_for(mode: Any) -> None:
    async with picking(aggregated=1) as g:
        exchange, picked = g.exchange(), Picked()
        await exchange.headers(mode=mode)
        picked.take(await exchange.next())
        assert picked.override is not None
        assert picked.override.request_body_mode == mode
        assert picked.override.response_body_mode == NONE
        assert picked.override.response_trailer_mode == 1
