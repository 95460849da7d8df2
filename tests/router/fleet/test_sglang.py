"""What the router learns from servers of SGLang: their load, their role, and where their blocks are asked for."""

from __future__ import annotations

import json
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.errors import EldrError
from eldr.router.fleet.load_watch import EngineLoad
from eldr.router.fleet.sglang import parse_load
from tests.router.fake_sglang import FakeSglang
from tests.router.harness import Setup, on_uvloop, running, until

LABELS = 'engine_type="decode",model_name="tiny",moe_ep_rank="0",pp_rank="0",tp_rank="{tp}"'


def said(queued: float, unplaced: float, usage: float, labels: str = LABELS.format(tp=0)) -> str:
    """The exposition of a scheduler with `queued` and `unplaced` requests."""
    return f"""# HELP sglang:num_queue_reqs The number of requests in the waiting queue.
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{{{labels}}} {queued}
# TYPE sglang:num_decode_prealloc_queue_reqs gauge
sglang:num_decode_prealloc_queue_reqs{{{labels}}} {unplaced}
sglang:num_decode_transfer_queue_reqs{{{labels}}} 50.0
sglang:num_running_reqs{{{labels}}} 60.0
sglang:token_usage{{{labels}}} {usage}
"""


def test_what_waits_is_what_has_no_room_yet() -> None:
    assert parse_load(said(2.0, 3.0, 0.25).encode()) == {0: EngineLoad(5, 0.25)}
    assert parse_load(b"go_goroutines 7\n") == {}
    assert parse_load(b"vllm:num_requests_waiting{} 3\n") == {}


def test_the_ranks_of_a_server_count_as_one() -> None:
    ranks = "".join(said(1.0, 2.0, 0.125 * dp, LABELS.format(tp=dp) + f',dp_rank="{dp}"') for dp in range(4))
    assert parse_load(ranks.encode()) == {0: EngineLoad(12, 0.375)}
    tensor_parallel = "".join(said(1.0, 2.0, 0.5, LABELS.format(tp=tp)) for tp in range(4))
    assert parse_load(tensor_parallel.encode()) == {0: EngineLoad(3, 0.5)}


def test_the_parts_of_a_total_are_not_added_to_it() -> None:
    total = said(3.0, 0.0, 0.5, LABELS.format(tp=0) + ',priority=""')
    part = f'sglang:num_queue_reqs{{{LABELS.format(tp=0)},priority="7"}} 9.0\n'
    assert parse_load((total + part).encode()) == {0: EngineLoad(3, 0.5)}


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200)
    | st.from_regex(r'sglang:num_queue_reqs\{dp_rank="[0-9]{1,30}"\} [0-9.eE+-]+\n', fullmatch=True).map(str.encode)
)
def test_any_text_is_read_without_harm(text: bytes) -> None:
    parse_load(text)


@on_uvloop
async def test_requests_that_wait_inside_a_decode_worker_lower_its_limit() -> None:
    fake = partial(FakeSglang, bootstraps={})

    def overload(s: Setup) -> None:
        s.decode[0].metrics = said(0.0, 4.0, 0.9)

    async with running(fake=fake, engine="sglang", load_interval_s=0.02, prepare=overload) as s:
        (worker,) = s.router.services.fleet.workers("decode").values()
        await until(lambda: worker.max_inflight == 1, "its limit falls")
        assert worker.load == (4, 0.9)


@pytest.mark.parametrize(
    ("info", "port"),
    [
        ((200, json.dumps({"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": 7}).encode()), 7),
        ((200, b'{"disaggregation_bootstrap_port": "8"}'), 8998),
        ((200, b'{"disaggregation_bootstrap_port": 65536}'), 8998),
        ((200, b"{}"), 8998),
        ((401, b'{"error": "Unauthorized"}'), 8998),
        ((404, b""), 8998),
    ],
)
@on_uvloop
async def test_the_bootstrap_port_is_asked_for(info: tuple[int, bytes], port: int) -> None:
    fake = partial(FakeSglang, bootstraps={})
    async with running(fake=fake, engine="sglang", prepare=lambda s: setattr(s.prefill[0], "info", info)) as s:
        (worker,) = s.router.services.fleet.workers("prefill").values()
        assert worker.healthy
        assert worker.bootstrap_port == port


@pytest.mark.parametrize("info", [b"[]", b"<html>", b'{"disaggregation_mode": "null"}'])
@on_uvloop
async def test_a_server_that_is_no_prefill_server_is_kept_out_until_it_is_one(info: bytes) -> None:
    fake = partial(FakeSglang, bootstraps={})

    def pretend(s: Setup) -> None:
        kept.append(s.prefill[0].info)
        s.prefill[0].info = (200, info)

    kept: list[tuple[int, bytes] | None] = []
    async with running(fake=fake, engine="sglang", worker_wait_s=0, prepare=pretend) as s:
        (worker,) = s.router.services.fleet.workers("prefill").values()
        assert not worker.healthy
        assert worker.problem
        assert (await s.post()).status == 503
        s.prefill[0].info = kept[0]
        await until(lambda: worker.healthy, "it is one")
        assert (await s.post()).status == 200


@on_uvloop
async def test_ranks_are_not_addressed() -> None:
    class Ranked(FakeSglang):
        @property
        def url(self) -> str:
            return super().url + "#rank=0"

    with pytest.raises(EldrError, match="spreads requests over its data-parallel ranks itself"):
        async with running(fake=partial(Ranked, bootstraps={}), engine="sglang"):
            pass
