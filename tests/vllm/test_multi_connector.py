"""The connector inside vLLM's MultiConnector, beside one that loads blocks which the prefix cache has lost."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

from eldr.counts import decode_counts
from eldr.demo.ports import free_ports
from eldr.demo.workers import Role, WorkerProcess, WorkerSpec
from tests.vllm import memory_offload
from tests.vllm.engine import BLOCK_SIZE, Answer, Engine, running
from tests.vllm.fleet import MODEL_NAME, Fleet, cache_arguments, complete, hand_off, metric
from tests.vllm.models import Model, Models

pytestmark = pytest.mark.skipif(
    vllm.__version__.startswith(("0.30.", "0.31.")), reason="the medium of the tests is written for vLLM 0.32"
)

BLOCKS = 24
LEASE_S = 4


class TalkingConnector(OffloadingConnector):
    """Adds something to the answer of every request. MultiConnector makes one answer of its children's."""

    def request_finished_all_groups(self, *args: Any) -> tuple[bool, dict[str, Any] | None]:
        return super().request_finished_all_groups(*args)[0], {"said": "something"}


def both(own: dict[str, Any], other: dict[str, Any], *, eldr_first: bool = True) -> dict[str, Any]:
    return {
        "kv_connector": "MultiConnector",
        "kv_role": own["kv_role"],
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [own, other] if eldr_first else [other, own]},
    }


def text(seed: int, tokens: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, tokens)]


@pytest.fixture(scope="module", params=[pytest.param(True, id="eldr-first"), pytest.param(False, id="eldr-last")])
def engine(request: pytest.FixtureRequest, models: Models) -> Iterator[Engine]:
    talking = {"kv_connector": "TalkingConnector", "kv_connector_module_path": __name__}
    with running(
        models("moe").path,
        around=lambda own: both(own, memory_offload.CONNECTOR | talking, eldr_first=request.param),
        num_gpu_blocks_override=BLOCKS,
        max_model_len=512,
        max_num_batched_tokens=96,
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def model(models: Models) -> Model:
    return models("moe")


def record(engine: Engine, model: Model, prompt: list[int]) -> Answer:
    # Recorded rather than handed off: a hand-off would keep its blocks until the lease ends.
    [answer] = engine.record(prompt, max_tokens=1)
    assert answer.tokens == model.reference.generate(prompt, 1)
    return answer


def check(model: Model, prompt: list[int], answer: Answer) -> None:
    assert answer.unavailable is None
    np.testing.assert_array_equal(answer.counts, model.reference.counts(prompt))


def overwrite_cache(engine: Engine, seed: int) -> None:
    engine.run([text(1000 * seed + i, 300) for i in range(2 * BLOCKS * BLOCK_SIZE // 300)], None)


def test_blocks_that_another_connector_loads_have_no_counts(engine: Engine, model: Model) -> None:
    prompt = text(1, 3 * BLOCK_SIZE + 4)
    for cached in (0, 3 * BLOCK_SIZE):
        answer = record(engine, model, prompt)
        check(model, prompt, answer)
        assert answer.cached_tokens == cached
    overwrite_cache(engine, 1)
    for tail in ([], text(2, 30)):  # the second one finds what the first one loaded
        answer = record(engine, model, prompt[: 3 * BLOCK_SIZE] + tail if tail else prompt)
        assert answer.cached_tokens == 3 * BLOCK_SIZE
        assert answer.unavailable == "kv_load"
    other = text(3, 200)  # takes some of those blocks
    check(model, other, record(engine, model, other))


def test_a_load_behind_a_prefix_hit(engine: Engine, model: Model) -> None:
    """The prefix cache has the first block, the other connector the next two."""
    prompt = text(4, 3 * BLOCK_SIZE + 4)
    check(model, prompt, record(engine, model, prompt))
    overwrite_cache(engine, 4)
    start = prompt[: BLOCK_SIZE + 1]
    engine.run([start], None)
    assert record(engine, model, prompt).unavailable == "kv_load"


def test_hand_off_and_statistics(engine: Engine, model: Model) -> None:
    prompt = text(5, 70)
    [answer] = engine.prefill(prompt)
    check(model, prompt, answer)
    assert answer.params["do_remote_prefill"] is True
    assert answer.params["eldr_lease"]["left_s"] > 0
    assert answer.params["said"] == "something"
    before = engine.metric("vllm:eldr_active_experts")["count"]
    prompt = text(6, 40)
    [answer] = engine.record(prompt, max_tokens=6)
    assert answer.params["said"] == "something"
    assert answer.decode_sets() == model.reference.decode_sets(prompt, answer.tokens)
    assert engine.metric("vllm:eldr_active_experts")["count"] == before + 5 * model.reference.layers
    assert engine.metric("vllm:kv_offload_size")["count"] > 0


@pytest.fixture(scope="module")
def fleet(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Servers whose engines report statistics as plain dicts, which MultiConnector reads by the connectors' names."""
    logs = tmp_path_factory.mktemp("logs")
    workers: list[WorkerProcess] = []
    roles: list[tuple[Role, str]] = [("prefill", "kv_producer"), ("decode", "kv_consumer")]
    for role, kv_role in roles:
        own = {
            "kv_connector": "EldrConnector",
            "kv_role": kv_role,
            "kv_buffer_device": "cpu",
            "kv_connector_extra_config": {"num_threads": 0, "kv_lease_duration": LEASE_S},
        }
        transfer = both(own, memory_offload.CONNECTOR, eldr_first=role == "prefill")
        spec = WorkerSpec(
            role=role,
            port=free_ports(1)[0],
            side_channel_port=free_ports(1)[0],
            model_dir=models("moe").path,
            served_name=MODEL_NAME,
            python=Path(sys.executable),
            log_path=logs / f"{role}.log",
            extra_args=(*cache_arguments(BLOCKS), "--kv-transfer-config", json.dumps(transfer)),
            extra_env={"PYTHONPATH": str(Path(__file__).parents[2])},
        )
        workers.append(WorkerProcess(spec))
        workers[-1].start()
    for worker in workers:
        worker.wait_ready()
    yield Fleet(*workers)
    for worker in workers:
        worker.stop()


def test_hand_off_between_servers(fleet: Fleet, model: Model) -> None:
    active = "vllm:eldr_active_experts"
    for i, length in enumerate((33, 150)):
        prompt = text(20 + i, length)
        before = metric(fleet.decode, f"{active}_count")
        params, counts = hand_off(fleet.prefill, prompt)
        np.testing.assert_array_equal(decode_counts(counts).counts, model.reference.counts(prompt))
        reply = complete(fleet.decode, prompt, 20, params)
        assert reply.status == 200, reply.body
        assert reply.tokens == model.reference.generate(prompt, 20)
        assert metric(fleet.decode, f"{active}_count") == before + 19 * model.reference.layers
    assert metric(fleet.decode, "vllm:nixl_bytes_transferred_count") == 2
    assert metric(fleet.prefill, "vllm:kv_offload_size_count") > 0


def test_hand_off_of_loaded_blocks(fleet: Fleet, model: Model) -> None:
    prompt = text(30, 150)
    complete(fleet.prefill, prompt, 1)
    for i in range(2 * BLOCKS * BLOCK_SIZE // 300):
        assert complete(fleet.prefill, text(1000 + i, 300), 1).status == 200
    params, counts = hand_off(fleet.prefill, prompt)
    assert counts["unavailable"] == "kv_load"
    reply = complete(fleet.decode, prompt, 12, params)
    assert reply.tokens == model.reference.generate(prompt, 12)


def test_decode_worker_that_loads_the_prompt_itself(fleet: Fleet, model: Model) -> None:
    """Its other connector comes first. The prefill worker may then free the blocks before the lease ends."""
    prompt = text(40, 3 * BLOCK_SIZE + 4)
    expected = model.reference.generate(prompt, 12)
    pulled, refused = "vllm:nixl_bytes_transferred_count", "vllm:eldr_refused_pulls_total"
    assert complete(fleet.decode, prompt, 12, hand_off(fleet.prefill, prompt)[0]).tokens == expected
    for i in range(2 * BLOCKS * BLOCK_SIZE // 300):
        assert complete(fleet.decode, text(2000 + i, 300), 1).status == 200
    before = metric(fleet.decode, pulled)
    params, _ = hand_off(fleet.prefill, prompt)
    assert complete(fleet.decode, prompt, 12, params).tokens == expected
    assert metric(fleet.decode, pulled) == before
    assert metric(fleet.decode, refused) == 0
