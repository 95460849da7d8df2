"""Workers whose connector goes by the name NixlConnector, behind the router."""

from __future__ import annotations

import json

import openai

from eldr.demo.workers import Role
from tests.e2e.real_fleet import LEASE_S, MODEL, Fleet, StartRouter, client_of, metric

TEXT = "def perimeter(width, height):\n    return 2 * (width + height)\n\ndef diagonal("


def test_answers_counts_and_pulls(fleet: Fleet, start_router: StartRouter, plain: openai.OpenAI) -> None:
    roles: list[tuple[Role, str]] = [("prefill", "kv_producer"), ("decode", "kv_consumer")]
    workers = []
    for role, kv_role in roles:
        transfer = {
            "kv_connector": "NixlConnector",
            "kv_connector_module_path": "eldr.engines.vllm.nixl",
            "kv_role": kv_role,
            "kv_buffer_device": "cpu",
            "kv_connector_extra_config": {"num_threads": 0, "kv_lease_duration": LEASE_S},
        }
        workers.append(fleet.worker(role, 7, "--kv-transfer-config", json.dumps(transfer)))
    prefill, decode = workers
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.wait_ready(300)
        with start_router("--policy", "expected-union", prefill=[prefill.url], decode=[decode.url]) as router:
            for number in range(3):
                ask = {"model": MODEL, "prompt": f"# {number}\n{TEXT}", "max_tokens": 16, "temperature": 0}
                answers = [client.completions.create(**ask) for client in (client_of(router.url), plain)]  # type: ignore[call-overload]
                assert answers[0].choices[0].text == answers[1].choices[0].text
            assert metric(router.url, "eldr_handoffs_total") == 3
            assert metric(router.url, "eldr_counts_errors_total") == 0
        # All but the last token of a prompt, which the decode worker always computes.
        assert metric(decode.url, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer") > 100
        assert metric(decode.url, "vllm:eldr_refused_pulls_total") == 0
    finally:
        for worker in workers:
            worker.stop()
