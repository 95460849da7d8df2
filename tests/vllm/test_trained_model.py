"""The model that ships with eldr: vLLM loads it and computes what transformers computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from eldr.demo.model import write_model
from eldr.demo.padded import pad_experts
from eldr.demo.prompts import make_prompts
from eldr.workloads.kinds import KINDS
from tests.vllm.engine import running
from tests.vllm.reference import Reference

TOKENS = 24


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_model(folder)
    return folder


def test_every_kind_is_counted_and_continued_as_by_transformers(model_dir: Path) -> None:
    prompts = {prompt.kind: list(prompt.text.encode()) for prompt in make_prompts(len(KINDS), seed=5)}
    assert set(prompts) == set(KINDS)
    reference = Reference(model_dir)
    with running(model_dir) as engine:
        answers = engine.record(*prompts.values(), max_tokens=TOKENS)
    for prompt, answer in zip(prompts.values(), answers, strict=True):
        assert answer.tokens == reference.generate(prompt, TOKENS)
        np.testing.assert_array_equal(answer.counts, reference.counts(prompt))
        assert answer.decode_sets() == reference.decode_sets(prompt, answer.tokens)


@pytest.mark.parametrize("inner_size", [256, 2048])
def test_padded_experts_compute_the_same_bits(model_dir: Path, tmp_path: Path, inner_size: int) -> None:
    """As the demo pads them: logits of a plain forward pass of transformers, in float32."""
    write_model(tmp_path)
    pad_experts(tmp_path, inner_size)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (model_dir, tmp_path)]
    for prompt in make_prompts(len(KINDS), seed=6):
        tokens = torch.tensor([list(prompt.text.encode())])
        with torch.inference_mode():
            shipped, padded = (model(tokens).logits for model in models)
        assert torch.equal(shipped, padded)
