"""Choosing workers and forwarding, with clients that play Dynamo's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from eldr_dynamo.errors import Failure
from eldr_dynamo.instances import Instances
from eldr_dynamo.stages import Stages

from eldr.counts import encode_counts
from eldr.policies.base import Decision, DecodeRequest, Policy
from eldr.router.config.endpoint import LegName
from eldr.router.config.groups import EjectionSettings, PlacementSettings
from eldr.router.fleet.outcomes import Outcomes
from eldr.router.fleet.workers import Fleet
from eldr.router.observe.counters import Metrics
from eldr.router.placement.making import make_lanes
from eldr.settings import build
from tests.dynamo.topics import counts_of

Serve = Callable[[int, dict[str, Any]], AsyncIterator[dict[str, Any]]]


class Watched(Policy):
    """Takes the first worker, and notes what it is told."""

    name = "watched"

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.seen: list[DecodeRequest] = []
        self.had_counts: list[bool] = []

    def choose(self, request: DecodeRequest, in_flight: Any) -> Decision:
        self.seen.append(request)
        self.had_counts.append(request.counts is not None)
        return Decision(min(in_flight), "first")

    def wants_words(self, with_counts: bool) -> bool:
        return not with_counts

    def started(self, request: DecodeRequest, worker: str) -> None:
        self.events.append(("started", worker))

    def finished(self, request: DecodeRequest, worker: str) -> None:
        self.events.append(("finished", worker))

    def joined(self, worker: str) -> None:
        self.events.append(("joined", worker))

    def left(self, worker: str) -> None:
        self.events.append(("left", worker))


class FakeContext:
    def __init__(self) -> None:
        self.stopped = False

    def id(self) -> str:
        return "request"

    def is_stopped(self) -> bool:
        return self.stopped


class FakeClient:
    def __init__(self, instances: list[int], serve: Serve) -> None:
        self.instances = instances
        self.unreachable: set[int] = set()
        self.requests: list[tuple[int, dict[str, Any]]] = []
        self._serve = serve

    def instance_ids(self) -> list[int]:
        return list(self.instances)

    async def direct(
        self, request: dict[str, Any], instance_id: int, *, annotated: bool, context: Any
    ) -> AsyncIterator[dict[str, Any]]:
        if instance_id in self.unreachable:
            raise Exception(f"Unavailable: TCP connection to {instance_id} failed")
        self.requests.append((instance_id, request))
        return self._serve(instance_id, request)


class FakeErrors:
    def of(self, failure: Failure) -> Exception:
        return LookupError(failure.kind)

    def unavailable(self, text: str) -> Exception:
        return TimeoutError(text)


async def two_tokens(instance: int, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield {"token_ids": [1]}
    yield {"token_ids": [2]}


class Setup:
    def __init__(self, instances: list[int], serve: Serve = two_tokens) -> None:
        self.metrics, self.fleet, self.policy = Metrics(), Fleet(), Watched()
        self.decode, self.prefill = FakeClient(instances, serve), FakeClient([7, 8], serve)
        clients: dict[LegName, Any] = {"prefill": self.prefill, "decode": self.decode}
        placement = build(PlacementSettings, {"learn": "off"})
        lanes = make_lanes(placement, self.fleet, lambda group: self.policy, self.metrics)
        outcomes = Outcomes(self.fleet, self.metrics, EjectionSettings())
        for part in (lanes, outcomes):
            self.fleet.on_change(part.fleet_changed)
        self.instances = Instances(self.fleet, clients, "m")
        self.stages = Stages(self.fleet, lanes, outcomes, self.instances, clients, FakeErrors(), self.metrics, 1024)

    @property
    def in_flight(self) -> dict[str, int]:
        return {url: worker.in_flight for url, worker in self.fleet.workers("decode").items()}

    def events(self, *kinds: str) -> list[tuple[str, str]]:
        return [event for event in self.policy.events if event[0] in kinds]


def request(counts: bool = True, first: int = 1) -> dict[str, Any]:
    ids = [first, 2, 3]
    params: dict[str, Any] = {"do_remote_prefill": True}
    if counts:
        params["eldr_counts"] = encode_counts(counts_of(ids))
    return {
        "token_ids": ids,
        "stop_conditions": {"max_tokens": 9},
        "prefill_result": {"disaggregated_params": {"kv_transfer_params": params}},
    }


async def answer(outputs: AsyncIterator[dict[str, Any]]) -> list[int]:
    return [token async for output in outputs for token in output["token_ids"]]


async def test_a_request_from_start_to_end() -> None:
    setup = Setup([2, 1])
    stream = setup.stages.decode(request(), FakeContext())
    assert (await anext(stream))["token_ids"] == [1]
    assert setup.in_flight == {"1": 1, "2": 0}
    assert await answer(stream) == [2]
    assert setup.in_flight == {"1": 0, "2": 0}
    assert setup.policy.events == [("joined", "1"), ("joined", "2"), ("started", "1"), ("finished", "1")]
    [known] = setup.policy.seen
    assert (known.prompt_tokens, known.max_tokens) == (3, 9)
    assert setup.policy.had_counts == [True]
    [(instance, sent)] = setup.decode.requests
    assert instance == 1
    assert sent["prefill_result"]["disaggregated_params"]["kv_transfer_params"] == {"do_remote_prefill": True}
    assert setup.metrics.handoffs == 1


async def test_two_requests_of_one_name_are_two_to_the_policy() -> None:
    setup = Setup([1])
    for _ in range(2):
        await answer(setup.stages.decode(request(), FakeContext()))
    assert len({known.request_id for known in setup.policy.seen}) == 2


@pytest.mark.parametrize(("wire", "reason"), [(None, "missing"), ({"v": 9}, "version"), (3, "malformed")])
async def test_without_usable_counts_the_prompt_is_looked_at(wire: Any, reason: str) -> None:
    setup = Setup([1])
    asked = request()
    params = asked["prefill_result"]["disaggregated_params"]["kv_transfer_params"]
    params["eldr_counts"] = wire
    words: list[int] = []
    setup.policy.choose = lambda known, load: words.append(len(known.words)) or Decision("1", "x")  # type: ignore
    assert await answer(setup.stages.decode(asked, FakeContext())) == [1, 2]
    assert words == [3]
    assert dict(setup.metrics.counts_errors) == {reason: 1}


async def test_a_request_without_a_prefill_is_no_hand_off_without_counts() -> None:
    setup = Setup([1])
    assert await answer(setup.stages.decode({"token_ids": [1]}, FakeContext())) == [1, 2]
    assert (setup.metrics.handoffs, dict(setup.metrics.counts_errors)) == (0, {})


async def test_an_unreachable_worker_is_replaced() -> None:
    setup = Setup([1, 2])
    setup.decode.unreachable = {1}
    assert await answer(setup.stages.decode(request(), FakeContext())) == [1, 2]
    assert setup.policy.had_counts == [True, True]
    assert setup.events("started", "finished") == [(e, w) for w in "12" for e in ("started", "finished")]
    assert setup.metrics.failures["decode", "1", "refused"] == 1
    assert setup.metrics.retries["decode", "refused"] == 1


async def test_all_workers_unreachable() -> None:
    setup = Setup([1, 2])
    setup.decode.unreachable, setup.prefill.unreachable = {1, 2}, {7, 8}
    for stage in (setup.stages.decode, setup.stages.prefill):
        with pytest.raises(LookupError, match="Unavailable"):
            await answer(stage(request(), FakeContext()))
    assert setup.in_flight == {"1": 0, "2": 0}
    assert len(setup.events("started")) == len(setup.events("finished"))
    assert sorted(setup.metrics.failures.values()) == [1, 1, 1, 1]


async def test_no_worker() -> None:
    setup = Setup([])
    with pytest.raises(TimeoutError, match="decode"):
        await answer(setup.stages.decode(request(), FakeContext()))
    setup.prefill.instances = []
    with pytest.raises(TimeoutError, match="prefill"):
        await answer(setup.stages.prefill(request(), FakeContext()))


async def test_a_stream_that_nobody_reads_to_its_end() -> None:
    setup = Setup([1])
    async with aclosing(setup.stages.decode(request(), FakeContext())) as stream:  # type: ignore[type-var]
        await anext(stream)
    assert setup.in_flight == {"1": 0}
    assert setup.events("finished") == [("finished", "1")]
    assert not setup.metrics.failures


@pytest.mark.parametrize("stopped", [False, True])
async def test_a_stream_that_breaks(stopped: bool) -> None:
    """What comes after the client has left says nothing about the worker."""

    async def breaking(instance: int, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        yield {"token_ids": [1]}
        context.stopped = stopped
        raise ValueError("Unavailable: Stream ended before generation completed")

    setup, context = Setup([1], breaking), FakeContext()
    with pytest.raises(LookupError, match="Unavailable"):
        await answer(setup.stages.decode(request(), context))
    assert setup.in_flight == {"1": 0}
    assert setup.metrics.broken_streams == (not stopped)
    assert setup.metrics.failures["decode", "1", "failed"] == (not stopped)


async def test_a_worker_that_fails_all_requests_gets_none_for_a_while() -> None:
    async def failing(instance: int, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        if instance == 1:
            raise ValueError("Internal: out of memory")
        yield {"token_ids": [instance]}

    setup = Setup([1, 2], failing)
    for _ in range(5):
        with pytest.raises(LookupError):
            await answer(setup.stages.decode(request(), FakeContext()))
    assert await answer(setup.stages.decode(request(), FakeContext())) == [2]
    assert setup.metrics.ejections["decode", "1", "consecutive"] == 1


async def test_a_worker_leaves_once_its_last_request_has_ended() -> None:
    setup = Setup([1, 2])
    stream = setup.stages.decode(request(), FakeContext())
    await anext(stream)
    setup.decode.instances = [2]
    assert await answer(setup.stages.decode(request(), FakeContext())) == [1, 2]
    assert setup.decode.requests[-1][0] == 2
    assert not setup.events("left")
    assert await answer(stream) == [2]
    setup.instances.follow()
    assert setup.policy.events[-2:] == [("finished", "1"), ("left", "1")]
    assert list(setup.in_flight) == ["2"]


async def test_a_worker_that_comes_back_before_it_has_left() -> None:
    setup = Setup([1, 2])
    stream = setup.stages.decode(request(), FakeContext())
    await anext(stream)
    setup.decode.instances = [2]
    setup.instances.follow()
    setup.decode.instances = [1, 2]
    await answer(setup.stages.decode(request(), FakeContext()))
    assert setup.decode.requests[-1][0] == 1
    await answer(stream)
    setup.instances.follow()
    assert setup.in_flight == {"1": 0, "2": 0}
    assert not setup.events("left")


async def test_prompts_that_begin_alike_meet_on_a_prefill_worker() -> None:
    setup = Setup([1])
    for first in range(20):
        for _ in range(2):
            assert await answer(setup.stages.prefill(request(first=first), FakeContext())) == [1, 2]
    chosen = [instance for instance, _ in setup.prefill.requests]
    assert chosen[::2] == chosen[1::2]
    assert set(chosen) == {7, 8}
    assert [worker.in_flight for worker in setup.fleet.workers("prefill").values()] == [0, 0]


async def test_an_unreachable_prefill_worker_is_replaced() -> None:
    setup = Setup([1])
    setup.prefill.unreachable = {7}
    for first in range(20):
        assert await answer(setup.stages.prefill(request(first=first), FakeContext())) == [1, 2]
    assert {instance for instance, _ in setup.prefill.requests} == {8}
    assert setup.metrics.retries["prefill", "refused"] > 0
