"""Two and four routers that share what they run over a real NATS server, before the same workers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import openai
import pytest

from tests.e2e.load import PROMPTS, Load, ask, until
from tests.e2e.real_fleet import MODEL, Fleet, Router, StartRouter, client_of, metric
from tests.nats_server import NatsServer

TOP_K = 4  # experts of a token in a layer of the model
STREAMS = 8  # of all routers together
# So long that nothing ends while what two routers show is compared.
LONG: dict[str, Any] = {"max_tokens": 1900, "temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def bus() -> Iterator[NatsServer]:
    server = NatsServer()
    server.launch()
    try:
        until(server.listens, "the NATS server listens")
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module", params=[2, 4])
def replicas(bus: NatsServer, start_router: StartRouter, request: pytest.FixtureRequest) -> Iterator[list[Router]]:
    """Routers that know each other."""
    with ExitStack() as stack:
        flags = ("--policy", "expected-union", "--peers", bus.url)
        routers = [stack.enter_context(start_router(*flags)) for _ in range(request.param)]
        until(lambda: every(routers, "eldr_peers", request.param - 1, state="synced"), "they know each other")
        yield routers


@pytest.fixture(scope="module")
def expected(plain: openai.OpenAI) -> dict[str, str]:
    return {prompt: ask(plain, prompt) for prompt in PROMPTS}


def every(routers: list[Router], name: str, value: float, **labels: str) -> bool:
    return all(metric(router.url, name, **labels) == value for router in routers)


def running(router: Router, fleet: Fleet) -> list[tuple[float, float]]:
    """What each decode worker runs for this router, and for the others as this one believes."""
    names = ("eldr_inflight", "eldr_inflight_elsewhere")
    own, elsewhere = ([metric(router.url, name, worker=worker.url) for worker in fleet.decode] for name in names)
    return list(zip(own, elsewhere, strict=True))


def unions(router: Router, fleet: Fleet) -> list[float]:
    """How many experts this router expects the next step of each decode worker to activate."""
    return [metric(router.url, "eldr_expected_active_experts", worker=worker.url) for worker in fleet.decode]


def idle(routers: list[Router], fleet: Fleet) -> bool:
    """Whether no router believes that anything runs."""
    nothing, empty = [(0.0, 0.0)] * len(fleet.decode), [0.0] * len(fleet.decode)
    return all(running(router, fleet) == nothing and unions(router, fleet) == empty for router in routers)


def test_answers_are_those_of_one_worker_whichever_router_is_asked(
    fleet: Fleet, replicas: list[Router], expected: dict[str, str]
) -> None:
    clients = [client_of(router.url) for router in replicas]
    count = len(replicas)
    order = [PROMPTS[(n + n // len(PROMPTS)) % len(PROMPTS)] for n in range(len(PROMPTS) * count)]
    before = [metric(router.url, "eldr_request_total", status="200") for router in replicas]
    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(lambda n: ask(clients[n % count], order[n]), range(len(order))))
    assert texts == [expected[prompt] for prompt in order]
    after = [metric(router.url, "eldr_request_total", status="200") for router in replicas]
    assert after == [answered + len(PROMPTS) for answered in before]
    assert every(replicas, "eldr_counts_errors_total", 0)
    until(lambda: idle(replicas, fleet), "all know that all have ended")


def test_all_have_the_same_picture_of_what_runs(fleet: Fleet, replicas: list[Router]) -> None:
    clients = [client_of(router.url) for router in replicas]
    for client, prompt in zip(clients, PROMPTS, strict=False):
        ask(client, prompt, 2)  # the first hand-off states the model's experts
    streams = []
    try:
        for number in range(STREAMS):
            stream = clients[number % len(clients)].completions.create(model=MODEL, prompt=PROMPTS[number], **LONG)
            streams.append(stream)
            next(iter(stream))

        def same() -> bool:
            seen = [running(router, fleet) for router in replicas]
            own = [sum(each) for each in zip(*([mine for mine, _ in workers] for workers in seen), strict=True)]
            return (
                sum(own) == STREAMS
                and all([mine + others for mine, others in workers] == own for workers in seen)
                and all(sum(mine for mine, _ in workers) == STREAMS / len(replicas) for workers in seen)
                and all(unions(router, fleet) == unions(replicas[0], fleet) for router in replicas[1:])
            )

        until(same, "each knows what the others run, and all expect the same of the next step")
        assert max(unions(replicas[0], fleet)) > TOP_K, "the union of several requests, not of one"
    finally:
        for stream in streams:
            stream.close()
    until(lambda: idle(replicas, fleet), "unions return to zero")
    until(lambda: sum(metric(each.url, "vllm:num_requests_running") for each in fleet.decode) == 0, "workers stop")


def test_nobody_notices_that_the_bus_is_down(
    fleet: Fleet, bus: NatsServer, replicas: list[Router], expected: dict[str, str]
) -> None:
    loads = [Load(router.url, 2) for router in replicas]
    try:
        for load in loads:
            load.more(4)
        bus.stop()
        until(lambda: every(replicas, "eldr_peers_reachable", 0), "all find out")
        until(lambda: every(replicas, "eldr_peers", 0), "all forget the others")
        until(lambda: every(replicas, "eldr_inflight_elsewhere", 0), "and what they ran")
        for load in loads:
            load.more(4)
        bus.launch()
        until(lambda: every(replicas, "eldr_peers", len(replicas) - 1, state="synced"), "they know each other again")
        until(lambda: all(metric(router.url, "eldr_inflight_elsewhere") > 0 for router in replicas), "and what runs")
        for load in loads:
            load.more(4)
    finally:
        for load in loads:
            load.stop()
    for load in loads:
        assert load.errors == []
        for prompt, text in load.ended:
            assert text == expected[prompt]
    until(lambda: idle(replicas, fleet), "unions return to zero")
