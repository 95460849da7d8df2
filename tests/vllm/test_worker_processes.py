"""Engines whose workers are processes of their own: what the two sides tell each other is pickled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.vllm.engine import running
from tests.vllm.models import Models


@pytest.mark.parametrize(
    "arguments",
    [pytest.param({}, id="one-worker"), pytest.param({"tensor_parallel_size": 2}, id="two-tensor-parallel-workers")],
)
def test_counts_and_rows(models: Models, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any]) -> None:
    # vLLM on CPU otherwise wants one NUMA node per worker.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if arguments else "auto")
    rng = np.random.default_rng(0)
    model = models("moe")
    prompts = [[int(token) for token in rng.integers(0, 256, length)] for length in (1, 40, 64, 150)]
    with running(
        model.path, distributed_executor_backend="mp", max_num_batched_tokens=64, max_num_seqs=8, **arguments
    ) as engine:
        for _ in range(2):
            for prompt, answer in zip(prompts, engine.prefill(*prompts), strict=True):
                np.testing.assert_array_equal(answer.counts, model.reference.counts(prompt))
        for prompt, answer in zip(prompts, engine.record(*prompts, max_tokens=10), strict=True):
            np.testing.assert_array_equal(answer.counts, model.reference.counts(prompt))
            assert answer.decode_sets() == model.reference.decode_sets(prompt, answer.tokens)
        assert engine.metric("vllm:eldr_active_experts")["count"] == 9 * model.reference.layers
