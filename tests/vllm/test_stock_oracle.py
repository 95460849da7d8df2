"""Against vLLM's own routed-experts output, which some releases have, without a KV connector only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import vllm
from numpy.typing import NDArray
from vllm import SamplingParams

from tests.vllm.engine import running
from tests.vllm.models import Models

pytestmark = pytest.mark.skipif(
    not vllm.__version__.startswith("0.30."), reason="only vLLM 0.30 returns routed experts from the LLM class"
)


def stock_routing(model: Path, prompts: list[list[int]], tokens: int) -> list[tuple[list[int], NDArray[np.int64]]]:
    """Generated tokens and experts [T, L, k] of every forward pass, by vLLM itself."""
    with running(model, connector=False, enable_return_routed_experts=True) as engine:
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        outputs = engine.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return [(list(o.outputs[0].token_ids), np.asarray(o.outputs[0].routed_experts)) for o in outputs]


@pytest.mark.parametrize("name", ["moe", "moe-6x24-top3"])
def test_counts_and_rows_equal_stock_vllm(models: Models, name: str) -> None:
    rng = np.random.default_rng(0)
    prompts = [[int(token) for token in rng.integers(0, 256, length)] for length in (5, 64, 150)]
    model = models(name)
    stock = stock_routing(model.path, prompts, 12)
    with running(model.path) as engine:
        answers = engine.record(*prompts, max_tokens=12)
    for prompt, answer, (tokens, routing) in zip(prompts, answers, stock, strict=True):
        assert answer.tokens == tokens
        assert len(routing) == len(prompt) + len(tokens) - 1
        counts = np.stack(
            [
                np.bincount(routing[: len(prompt), layer].ravel(), minlength=model.reference.experts)
                for layer in range(model.reference.layers)
            ]
        )
        np.testing.assert_array_equal(answer.counts, counts)
        assert answer.decode_sets() == [[set(map(int, layer)) for layer in row] for row in routing[len(prompt) :]]
