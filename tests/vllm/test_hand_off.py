"""Prefill and decode worker processes: the hand-off over NIXL, its lease, and counts after KV loads.

The tests of the lease come first: one of them needs the first contact of its two workers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eldr.counts import decode_counts
from eldr.demo.ports import free_ports
from eldr.demo.workers import WorkerProcess, WorkerSpec
from eldr.expert_rows import decode_rows
from tests.vllm.engine import BLOCK_SIZE, RECORD
from tests.vllm.fleet import MODEL_NAME, Fleet, cache_arguments, complete, hand_off, in_background, metric, sleep_until
from tests.vllm.models import Model, Models

LEASE_S = 4
MARGIN_S = 1.0
# Small caches, so that blocks are soon reused. A hybrid model shares its blocks among three groups.
BLOCKS = {"moe": 24, "gemma-like": 64}
REFUSED = "vllm:eldr_refused_pulls_total"


@pytest.fixture(scope="module")
def fleets(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Fleet]]:
    """Both fleets are started at once, and waited for when they are used."""
    logs = tmp_path_factory.mktemp("logs")
    started: dict[str, Fleet] = {}
    for name, blocks in BLOCKS.items():
        spec = WorkerSpec(
            role="prefill",
            port=free_ports(1)[0],
            side_channel_port=free_ports(1)[0],
            model_dir=models(name).path,
            served_name=MODEL_NAME,
            python=Path(sys.executable),
            log_path=logs / f"{name}-prefill.log",
            extra_args=cache_arguments(blocks),
            extra_config={"kv_lease_duration": LEASE_S, "eldr_lease_margin_s": MARGIN_S},
        )
        decode = replace(
            spec,
            role="decode",
            port=free_ports(1)[0],
            side_channel_port=free_ports(1)[0],
            log_path=logs / f"{name}-decode.log",
        )
        started[name] = Fleet(WorkerProcess(spec), WorkerProcess(decode))
        started[name].prefill.start()
        started[name].decode.start()

    def ready(name: str) -> Fleet:
        started[name].prefill.wait_ready()
        started[name].decode.wait_ready()
        return started[name]

    yield ready
    for fleet in started.values():
        fleet.prefill.stop()
        fleet.decode.stop()


@pytest.fixture(scope="module", params=BLOCKS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def fleet(name: str, fleets: Callable[[str], Fleet]) -> Fleet:
    return fleets(name)


@pytest.fixture(scope="module")
def model(name: str, models: Models) -> Model:
    return models(name)


def text(seed: int, tokens: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, tokens)]


def overwrite_cache(worker: WorkerProcess, seed: int) -> None:
    """Other prompts take every block of a worker."""
    for i in range(2 * max(BLOCKS.values()) * BLOCK_SIZE // 300 + 1):
        assert complete(worker, text(1000 * seed + i, 300), 1).status == 200


def test_pull_that_ends_after_the_lease_is_discarded(fleet: Fleet, model: Model) -> None:
    """The prefill worker is stopped before the decode worker's first handshake, until the lease is over."""
    prompt = text(1, 150)
    params, _ = hand_off(fleet.prefill, prompt)
    fleet.prefill.pause()
    with in_background(fleet.decode, prompt, 12, params) as replies:
        sleep_until(params["eldr_lease"]["unix_s"] + LEASE_S + 0.2)
        fleet.prefill.resume()
    assert replies[0].status == 200
    assert replies[0].tokens == model.reference.generate(prompt, 12)
    assert metric(fleet.decode, REFUSED, reason="expired_during_pull") == 1


def test_decode_worker_stopped_past_the_lease(fleet: Fleet, model: Model) -> None:
    """The request waits in the socket of a stopped worker while the prefill worker gives its blocks to others."""
    prompt = text(2, 200)
    expected = model.reference.generate(prompt, 12)
    before = metric(fleet.decode, REFUSED, reason="expired_before_pull")
    params, _ = hand_off(fleet.prefill, prompt)
    fleet.decode.pause()
    with in_background(fleet.decode, prompt, 12, params) as replies:
        sleep_until(params["eldr_lease"]["unix_s"] + LEASE_S + 0.5)
        overwrite_cache(fleet.prefill, 2)
        fleet.decode.resume()
    assert replies[0].status == 200
    assert replies[0].tokens == expected
    assert metric(fleet.decode, REFUSED, reason="expired_before_pull") == before + 1


def test_the_blocks_really_are_reused(fleet: Fleet, model: Model) -> None:
    """The same with a lease that lies: the pull goes through and the answer is wrong, so the tests above can fail."""
    prompt = text(3, 200)
    params, _ = hand_off(fleet.prefill, prompt)
    sleep_until(params["eldr_lease"]["unix_s"] + LEASE_S + 0.5)
    overwrite_cache(fleet.prefill, 3)
    params["eldr_lease"] = {"left_s": 1000.0, "unix_s": time.time()}
    reply = complete(fleet.decode, prompt, 12, params)
    assert reply.status == 200
    assert reply.tokens != model.reference.generate(prompt, 12)


def test_hand_off_equals_a_plain_worker(fleet: Fleet, model: Model) -> None:
    for i, length in enumerate((1, 31, 32, 33, 64, 150, 290)):
        prompt = text(10 + i, length)
        params, counts = hand_off(fleet.prefill, prompt)
        assert params["eldr_lease"]["left_s"] == LEASE_S
        np.testing.assert_array_equal(decode_counts(counts).counts, model.reference.counts(prompt))
        reply = complete(fleet.decode, prompt, 20, params)
        assert reply.status == 200
        assert reply.tokens == model.reference.generate(prompt, 20)
        assert not any(key.startswith("eldr_") for key in reply.params)


def test_recording_over_a_hand_off(fleet: Fleet, model: Model) -> None:
    prompt = text(20, 100)
    params, counts = hand_off(fleet.prefill, prompt)
    np.testing.assert_array_equal(decode_counts(counts).counts, model.reference.counts(prompt))
    reply = complete(fleet.decode, prompt, 30, params | RECORD)
    rows = decode_rows(reply.params["eldr_decode_experts"])
    generated = model.reference.generate(prompt, 30)
    expected = model.reference.routing([*prompt, *generated])[len(prompt) : -1]
    np.testing.assert_array_equal(np.sort(rows, axis=2), np.sort(expected, axis=2))
    assert reply.params["eldr_counts"]["unavailable"] == "kv_load"


def test_loaded_blocks_have_no_counts_until_they_are_written(fleet: Fleet, model: Model) -> None:
    prompt = text(30, 3 * BLOCK_SIZE)
    params, _ = hand_off(fleet.prefill, prompt)
    assert complete(fleet.decode, prompt, 2, params).status == 200

    def counts_on_decode_worker(tokens: list[int]) -> dict[str, object]:
        return dict(hand_off(fleet.decode, tokens)[1])

    if not model.reference.hybrid:  # there a prefix hit also needs the sliding windows' blocks
        assert counts_on_decode_worker(prompt)["unavailable"] == "kv_load"
        # A later prompt that only begins with the loaded blocks is not countable either.
        assert counts_on_decode_worker(prompt + text(31, 50))["unavailable"] == "kv_load"
    time.sleep(LEASE_S + 0.5)  # the blocks of the hand-offs above are held as long
    overwrite_cache(fleet.decode, 4)
    np.testing.assert_array_equal(decode_counts(counts_on_decode_worker(prompt)).counts, model.reference.counts(prompt))


def test_hand_off_without_a_lease_is_computed_again(fleet: Fleet, model: Model) -> None:
    before = metric(fleet.decode, REFUSED, reason="no_lease")
    for i, lease in enumerate((None, {}, {"left_s": "soon", "unix_s": 0})):
        prompt = text(40 + i, 150)
        params, _ = hand_off(fleet.prefill, prompt)
        params["eldr_lease"] = lease
        reply = complete(fleet.decode, prompt, 12, params)
        assert reply.status == 200
        assert reply.tokens == model.reference.generate(prompt, 12)
    assert metric(fleet.decode, REFUSED, reason="no_lease") == before + 3
    # The prefill worker was told, so its blocks are free before the lease ends: all of them fit again at once.
    for i in range(3):
        assert complete(fleet.prefill, text(50 + i, 290), 1).status == 200


def test_active_experts_at_the_metrics_endpoint(fleet: Fleet, model: Model) -> None:
    name = "vllm:eldr_active_experts"
    count, total = metric(fleet.decode, f"{name}_count"), metric(fleet.decode, f"{name}_sum")
    assert complete(fleet.decode, text(60, 40), 11).status == 200
    # A request alone activates top-k experts in each layer of its ten decode steps.
    layers, top_k = model.reference.layers, model.reference.top_k
    assert metric(fleet.decode, f"{name}_count") == count + 10 * layers
    assert metric(fleet.decode, f"{name}_sum") == total + 10 * layers * top_k
    assert metric(fleet.prefill, f"{name}_count") == 0
