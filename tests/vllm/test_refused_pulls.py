"""What a refused pull does to the request, under both of vLLM's load-failure policies. No prefill worker is needed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from tests.vllm.engine import RECORD, running
from tests.vllm.models import Models


def expired_hand_off() -> dict[str, Any]:
    """A hand-off of a prefill worker that nobody runs, whose lease ended a second ago.

    Without tp_size NIXL does not send heartbeats to that worker, which would only time out.
    """
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [[1, 2, 3, 4]],
        "remote_engine_id": "gone",
        "remote_request_id": "r",
        "remote_host": "127.0.0.1",
        "remote_port": 22999,
        "eldr_lease": {"left_s": 30.0, "unix_s": time.time() - 31.0},
    }


def text(seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 256, 100)]


@pytest.mark.parametrize("name", ["moe", "gemma-like"])
def test_recompute(models: Models, name: str) -> None:
    reference = models(name).reference
    with running(models(name).path, role="kv_consumer", policy="recompute") as engine:
        prompt = text(0)
        [answer] = engine.run([prompt], expired_hand_off() | RECORD, 10)
        assert answer.finish_reason == "length"
        assert answer.tokens == reference.generate(prompt, 10)
        # The prompt was computed here after all, so it is counted here.
        np.testing.assert_array_equal(answer.counts, reference.counts(prompt))
        assert answer.decode_sets() == reference.decode_sets(prompt, answer.tokens)
        # Its blocks are ordinary prefix hits now.
        [again] = engine.record(prompt, max_tokens=1)
        np.testing.assert_array_equal(again.counts, reference.counts(prompt))


def test_fail(models: Models) -> None:
    with running(models("moe").path, role="kv_consumer", policy="fail") as engine:
        refused = engine.submit(text(1), expired_hand_off(), 10)
        other = engine.submit(text(2), None, 10)
        answers: dict[str, Any] = {}
        for _ in engine.steps(answers):
            pass
        assert answers[refused].finish_reason == "error"
        assert answers[refused].tokens == []
        assert answers[other].tokens == models("moe").reference.generate(text(2), 10)
