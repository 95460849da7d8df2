"""A model whose layers differ in experts, as pruned ones do: its counts are padded, and exact bit for bit.

Of the architectures of vLLM 0.32 only Nemotron-H builds such layers (its Puzzle variants), and its experts have no CPU
kernel. So the blocks of Qwen3-MoE are built with experts of their own here, in vLLM and in transformers.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vllm
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3_moe import modeling_qwen3_moe as in_transformers
from vllm.model_executor.models.qwen3_moe import Qwen3MoeSparseMoeBlock

from eldr.record.prompts import Prompt, RecordError
from eldr.record.transformers import Transformers, TransformersOptions
from tests.vllm import tiny_models
from tests.vllm.engine import running
from tests.vllm.routing import HookedReference

EXPERTS = (16, 8, 12, 16)
TOP_K = 4

pytestmark = pytest.mark.skipif(not vllm.__version__.startswith("0.32."), reason="the model is made for vLLM 0.32")


@pytest.fixture
def top_k() -> tuple[int, ...]:
    """Of each layer."""
    return (TOP_K,) * len(EXPERTS)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top_k: tuple[int, ...]) -> Path:
    """A tiny Qwen3-MoE with EXPERTS experts in its layers."""
    of_layer = in_transformers.Qwen3MoeDecoderLayer.__init__
    of_block = Qwen3MoeSparseMoeBlock.__init__

    def layer(self: Any, config: Any, layer_idx: int) -> None:
        of_layer(self, config, layer_idx)
        own = copy.deepcopy(config)
        own.num_experts, own.num_experts_per_tok = EXPERTS[layer_idx], top_k[layer_idx]
        self.mlp = in_transformers.Qwen3MoeSparseMoeBlock(own)

    def block(self: Any, vllm_config: Any, prefix: str = "", **options: Any) -> None:
        config = vllm_config.model_config.hf_text_config
        config.num_experts = EXPERTS[int(prefix.split(".")[2])]
        of_block(self, vllm_config, prefix, **options)
        config.num_experts = max(EXPERTS)

    monkeypatch.setattr(in_transformers.Qwen3MoeDecoderLayer, "__init__", layer)
    monkeypatch.setattr(Qwen3MoeSparseMoeBlock, "__init__", block)
    return tiny_models.make_moe(tmp_path, layers=len(EXPERTS), experts=max(EXPERTS), top_k=TOP_K)


def prompts() -> dict[str, list[int]]:
    rng = np.random.default_rng(3)
    stem = rng.integers(0, 256, 70).tolist()
    return {
        "one token": stem[:1],
        "cold": stem,
        "repeated": stem,
        "partly cached": stem[:40] + rng.integers(0, 256, 30).tolist(),
        "chunked": rng.integers(0, 256, 230).tolist(),
    }


def counts(routing: NDArray[np.int64]) -> NDArray[np.int64]:
    """The experts of tokens [T, L, k], counted. Those that a layer lacks are zero."""
    return np.stack([np.bincount(layer.ravel(), minlength=max(EXPERTS)) for layer in routing.transpose(1, 0, 2)])


def sets(routing: NDArray[Any]) -> list[list[set[int]]]:
    return [[set(map(int, layer)) for layer in row] for row in routing]


def reference_of(model: Path) -> HookedReference:
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    return HookedReference(found.eval())


def test_counts_and_recorded_experts(model: Path) -> None:
    reference = reference_of(model)
    with running(model, max_num_batched_tokens=96) as engine:
        hits = 0
        for kind, prompt in prompts().items():
            [answer] = engine.prefill(prompt)
            np.testing.assert_array_equal(answer.counts, counts(reference.routing(prompt)), err_msg=kind)
            assert answer.tokens == [reference.next_token(prompt)], kind
            hits += answer.cached_tokens
        assert hits > 0
        asked = [prompts()["cold"][:33], prompts()["chunked"][:90]]
        for prompt, answer in zip(asked, engine.record(*asked, max_tokens=6), strict=True):
            routing = reference.routing([*prompt, *answer.tokens[:-1]])
            np.testing.assert_array_equal(answer.counts, counts(routing[: len(prompt)]))
            assert answer.decode_sets() == sets(routing[len(prompt) :])
    used = np.count_nonzero(counts(reference.routing(prompts()["chunked"])), axis=1)
    assert (used <= EXPERTS).all()
    assert (used > 0.75 * np.array(EXPERTS)).all(), "the layers are hardly used"


def test_recorded_in_this_process(model: Path) -> None:
    source = Transformers(TransformersOptions(str(model), max_tokens=6, dtype="float32"))
    reference = reference_of(model)
    text = "experts of unequal layers"
    sample = source.sample(Prompt({"prompt": text}, ""))
    prompt = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    tokens = list(prompt)
    for _ in range(len(sample.rows)):
        tokens.append(reference.next_token(tokens))
    routing = reference.routing(tokens)
    np.testing.assert_array_equal(sample.counts.counts, counts(routing[: len(prompt)]))
    assert len(sample.rows) > 0
    assert sets(sample.rows) == sets(routing[len(prompt) :])


@pytest.mark.parametrize("top_k", [(4, 4, 3, 4)])
def test_layers_of_different_top_k_cannot_be_recorded(model: Path) -> None:
    source = Transformers(TransformersOptions(str(model), max_tokens=3, dtype="float32"))
    with pytest.raises(RecordError, match="chooses 3 or 4 experts, depending on the layer"):
        source.sample(Prompt({"prompt": "experts"}, ""))
