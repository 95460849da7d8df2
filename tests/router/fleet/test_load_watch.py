"""What vLLM says of its load, and what the router makes of it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.learning.step_counters import StepCounters
from eldr.router.fleet.load_watch import (
    Capacity,
    EngineLoad,
    parse_cache_tokens,
    parse_load,
    parse_steps,
)
from tests.router.engine_metrics import said, steps_said
from tests.router.harness import on_uvloop, running, until


def test_load_is_read_from_the_exposition() -> None:
    both = parse_load((said(3, 0.25) + said(0, 1e-3, engine=1)).encode())
    assert both == {0: EngineLoad(3, 0.25), 1: EngineLoad(0, 0.001)}
    older = "\n".join(line for line in said(3).splitlines() if "by_reason" not in line)
    assert parse_load(older.encode()) == {0: EngineLoad(12, 0.5)}
    assert parse_load(b"go_goroutines 7\n") == {}
    assert parse_load(b"vllm:num_requests_waiting{} 3") == {0: EngineLoad(3, 0.0)}
    assert parse_load(b"a_vllm:num_requests_waiting{} 3\n# vllm:num_requests_waiting{} 3\n") == {}


@pytest.mark.parametrize("value", ["1e999", "-1e999", "1e", "+", "nan", "3 4", ""])
def test_what_is_no_number_is_passed_over(value: str) -> None:
    assert parse_load(f"vllm:num_requests_waiting{{}} {value}\n".encode()) == {}
    assert parse_steps(f"vllm:eldr_active_experts_sum{{}} {value}\n".encode(), 0) is None


def test_steps_are_read_of_one_engine() -> None:
    """Each number is its own."""
    first, second = (
        StepCounters(
            gaps=800 + engine,
            gaps_s=8.5 + engine,
            steps=100 + engine,
            experts=50 + engine,
            expert_steps=4 + engine,
            prompt_tokens=7 + engine,
            prompts=3 + engine,
            preemptions=2 + engine,
        )
        for engine in (0, 1)
    )
    text = (steps_said(first, engine=0) + steps_said(second, engine=1)).encode()
    assert parse_steps(text, 0) == first
    assert parse_steps(text, 1) == second
    assert parse_steps(text, 2) is None


def test_an_engine_without_the_connector_counts_its_steps() -> None:
    counted = StepCounters(gaps=8, gaps_s=0.5, steps=2)
    text = "\n".join(line for line in steps_said(counted).splitlines() if "eldr" not in line)
    assert parse_steps(text.encode(), 0) == counted


# From the exposition of vLLM 0.32, shortened.
CACHE = (
    'vllm:cache_config_info{{_block_size_resolved="True",block_size="{}",cache_dtype="auto",enable_prefix_caching="{}",'
    'engine="{}",kv_cache_size_tokens="{}",mamba_block_size="None",num_gpu_blocks="{}"}} 1.0\n'
)


def test_the_size_of_the_cache_is_read_of_one_engine() -> None:
    two = "# TYPE vllm:cache_config_info gauge\n" + CACHE.format(16, True, 0, 64, 5) + CACHE.format(16, True, 1, 80, 9)
    assert [parse_cache_tokens(two.encode(), engine) for engine in (0, 1, 2)] == [64, 80, None]
    assert parse_cache_tokens(CACHE.format(32, True, 0, "None", 5).encode(), 0) == 160
    assert parse_cache_tokens(CACHE.format(32, True, 0, "None", "None").encode(), 0) is None
    assert parse_cache_tokens(CACHE.format(32, False, 0, 160, 5).encode(), 0) == 0
    assert parse_cache_tokens(said().encode(), 0) is None


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200)
    | st.text(max_size=100).map(lambda t: f"vllm:num_requests_waiting{{{t}}} {t}".encode())
    | st.from_regex(r'vllm:num_requests_waiting\{engine="[0-9]{1,30}"\} [0-9.eE+-]+\n', fullmatch=True).map(str.encode)
)
def test_any_text_is_read_without_harm(text: bytes) -> None:
    parse_load(text)
    parse_steps(text, 0)


def test_what_waits_in_an_engine_lowers_its_limit_and_room_raises_it_again() -> None:
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
def test_a_learned_limit_stays_between_one_and_the_configured(most: int, looks: list[tuple[int, float, int]]) -> None:
    capacity = Capacity(most)
    for waiting, kv_usage, in_flight in looks:
        assert 1 <= capacity.heard(EngineLoad(waiting, kv_usage), in_flight) <= most


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.integers(1, 256))
def test_the_limit_finds_what_an_engine_can_run(room: int, most: int) -> None:
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
async def test_a_worker_with_a_queue_of_its_own_gets_less() -> None:
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
