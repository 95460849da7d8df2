"""Requests that lose their blocks while they run and start again."""

from __future__ import annotations

import numpy as np
import pytest

from tests.vllm.engine import running
from tests.vllm.models import Models


@pytest.mark.parametrize("asynchronous", [True, False], ids=["asynchronous", "synchronous"])
@pytest.mark.parametrize(("name", "blocks"), [("moe", 14), ("gemma-like", 30)])
def test_preempted_requests_are_counted_once(models: Models, name: str, blocks: int, asynchronous: bool) -> None:
    rng = np.random.default_rng(0)
    model = models(name)
    prompts = [[int(token) for token in rng.integers(0, 256, length)] for length in (40, 33, 64, 50)]
    with running(
        model.path,
        num_gpu_blocks_override=blocks,
        max_num_seqs=4,
        max_model_len=256,
        async_scheduling=asynchronous,
    ) as engine:
        answers = engine.record(*prompts, max_tokens=150)
        assert engine.metric("vllm:num_preemptions")["value"] > 0, "nothing was preempted, so the test shows nothing"
    for prompt, answer in zip(prompts, answers, strict=True):
        np.testing.assert_array_equal(answer.counts, model.reference.counts(prompt))
        assert answer.tokens == model.reference.next_tokens([*prompt, *answer.tokens])[len(prompt) - 1 : -1]
        assert answer.decode_sets() == model.reference.decode_sets(prompt, answer.tokens)
