"""The connector under the name NixlConnector: what it does is the same, alone and inside MultiConnector."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from eldr.counts import decode_counts
from eldr.demo.ports import free_ports
from eldr.demo.workers import Role, WorkerProcess, WorkerSpec
from eldr.engines.vllm.connector import EldrConnector
from tests.vllm.engine import running
from tests.vllm.fleet import MODEL_NAME, Fleet, complete, hand_off, metric
from tests.vllm.models import Models

NAME = {"kv_connector": "NixlConnector", "kv_connector_module_path": "eldr.engines.vllm.nixl"}


def chosen(config: dict[str, str]) -> type:
    found: type = KVConnectorFactory.get_connector_class(KVTransferConfig(kv_role="kv_producer", **config))
    return found


def test_the_path_takes_precedence_over_vllms_own_connector() -> None:
    assert chosen(NAME) is EldrConnector
    assert chosen({"kv_connector": "NixlConnector"}).__module__.startswith("vllm.")


def test_multi_connector_finds_the_reader_of_its_statistics() -> None:
    assert KVConnectorFactory.get_connector_class_by_name(chosen(NAME).__name__) is EldrConnector


def test_counts_in_one_engine(models: Models) -> None:
    model, prompt = models("moe"), list(range(70))
    with running(model.path, around=lambda own: own | NAME) as engine:
        [answer] = engine.prefill(prompt)
        np.testing.assert_array_equal(answer.counts, model.reference.counts(prompt))
        [answer] = engine.record(prompt, max_tokens=6)
        assert answer.decode_sets() == model.reference.decode_sets(prompt, answer.tokens)
        assert engine.metric("vllm:eldr_active_experts")["count"] == 5 * model.reference.layers


@pytest.fixture(scope="module", params=["alone", "within MultiConnector"])
def fleet(request: pytest.FixtureRequest, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Servers, whose engines send statistics as plain dicts. vLLM finds by a name who reads them."""
    logs = tmp_path_factory.mktemp("logs")
    workers: list[WorkerProcess] = []
    roles: list[tuple[Role, str]] = [("prefill", "kv_producer"), ("decode", "kv_consumer")]
    for role, kv_role in roles:
        own = {**NAME, "kv_role": kv_role, "kv_buffer_device": "cpu", "kv_connector_extra_config": {"num_threads": 0}}
        within = {"kv_connector_extra_config": {"connectors": [own]}, "kv_connector": "MultiConnector"}
        transfer = own if request.param == "alone" else {**within, "kv_role": kv_role}
        transfer["kv_load_failure_policy"] = "recompute"
        spec = WorkerSpec(
            role=role,
            port=free_ports(1)[0],
            side_channel_port=free_ports(1)[0],
            model_dir=models("moe").path,
            served_name=MODEL_NAME,
            python=Path(sys.executable),
            log_path=logs / f"{role}.log",
            kv_cache_bytes=16 * 2**20,
            extra_args=("--max-model-len", "512", "--kv-transfer-config", json.dumps(transfer)),
        )
        workers.append(WorkerProcess(spec))
        workers[-1].start()
    for worker in workers:
        worker.wait_ready()
    yield Fleet(*workers)
    for worker in workers:
        worker.stop()


def test_hand_off_between_servers(fleet: Fleet, models: Models) -> None:
    reference = models("moe").reference
    for times, length in enumerate((33, 150), 1):
        prompt = [int(token) for token in np.random.default_rng(length).integers(0, 256, length)]
        params, counts = hand_off(fleet.prefill, prompt)
        np.testing.assert_array_equal(decode_counts(counts).counts, reference.counts(prompt))
        assert params["eldr_lease"]["left_s"] > 0
        reply = complete(fleet.decode, prompt, 20, params)
        assert reply.tokens == reference.generate(prompt, 20)
        assert metric(fleet.decode, "vllm:eldr_active_experts_count") == times * 19 * reference.layers
        assert metric(fleet.decode, "vllm:nixl_bytes_transferred_count") == times


def test_a_pull_without_a_lease_is_refused(fleet: Fleet, models: Models) -> None:
    prompt = list(range(100, 180))
    params, _ = hand_off(fleet.prefill, prompt)
    del params["eldr_lease"]
    reply = complete(fleet.decode, prompt, 8, params)
    assert reply.tokens == models("moe").reference.generate(prompt, 8)
    assert metric(fleet.decode, "vllm:eldr_refused_pulls_total", reason="no_lease") == 1
