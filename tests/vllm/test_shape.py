"""Models whose counts would not be exact: refused at start-up, or without counts for the prompts concerned."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter
from vllm.model_executor.models.qwen3_moe import Qwen3MoeSparseMoeBlock

from eldr.engines.vllm.shape import common_shape
from eldr.engines.vllm.support import UnsupportedError
from tests.vllm import tiny_models
from tests.vllm.engine import running
from tests.vllm.models import Models


def config(*, fast_prefill: bool = False, diffusion: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model="m", get_num_experts=lambda: 8, get_num_experts_per_tok=lambda: 2, is_diffusion=diffusion
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=fast_prefill),
    )


def layer(number: int, router: Any = None) -> SimpleNamespace:
    return SimpleNamespace(layer_id=number, router=router)


def test_layers_of_one_shape() -> None:
    assert common_shape(config(), {"layers.1.experts": layer(1), "layers.3.experts": layer(3)}) == (8, 2)


def test_a_model_without_moe_layers() -> None:
    with pytest.raises(UnsupportedError, match=r"m has no mixture-of-experts layers.*NixlConnector"):
        common_shape(config(), {})


def test_text_and_vision_experts_in_one_layer() -> None:
    layers = {"layers.3.text_experts": layer(3), "layers.3.vision_experts": layer(3)}
    with pytest.raises(
        UnsupportedError, match=r"in one layer, layers\.3\.text_experts and layers\.3\.vision_experts.*NixlConnector"
    ):
        common_shape(config(), layers)


def test_zero_computation_experts() -> None:
    router = ZeroExpertRouter.__new__(ZeroExpertRouter)
    with pytest.raises(UnsupportedError, match=r"zero-computation experts.*expert 0.*NixlConnector"):
        common_shape(config(), {"layers.0.experts": layer(0, router)})


def test_shared_experts_among_the_chosen_ones() -> None:
    router = SimpleNamespace(num_fused_shared_experts=1)
    with pytest.raises(UnsupportedError, match="VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0"):
        common_shape(config(), {"layers.0.experts": layer(0, router)})


def test_prompt_tokens_that_skip_layers() -> None:
    with pytest.raises(UnsupportedError, match=r"--kv-sharing-fast-prefill.*drop it"):
        common_shape(config(fast_prefill=True), {"layers.0.experts": layer(0)})


def test_tokens_that_are_computed_several_times() -> None:
    with pytest.raises(UnsupportedError, match=r"diffusion.*NixlConnector"):
        common_shape(config(diffusion=True), {"layers.0.experts": layer(0)})


def test_layers_of_different_top_k_fail_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.make_moe(tmp_path, layers=2, experts=8, top_k=4)
    original = Qwen3MoeSparseMoeBlock.__init__

    def with_own_top_k(self: Any, vllm_config: Any, prefix: str = "", **options: Any) -> None:
        text = vllm_config.model_config.hf_text_config
        text.num_experts_per_tok = 4 if ".0." in prefix else 3
        original(self, vllm_config, prefix, **options)

    monkeypatch.setattr(Qwen3MoeSparseMoeBlock, "__init__", with_own_top_k)
    with (
        pytest.raises(
            UnsupportedError,
            match=r"differ in the experts .*: 1 top-3 .*layers\.1.*, 1 top-4 .*layers\.0.*NixlConnector",
        ),
        running(model),
    ):
        pass


@pytest.fixture
def repeating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token goes through the experts of a layer twice, as in models whose layers share their experts."""
    original = Qwen3MoeSparseMoeBlock.forward

    def twice(self: Any, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        routed: torch.Tensor = original(self, original(self, hidden, *args), *args)
        return routed

    monkeypatch.setattr(Qwen3MoeSparseMoeBlock, "forward", twice)


@pytest.mark.usefixtures("repeating")
def test_experts_that_run_twice_are_refused_in_the_warm_up(models: Models) -> None:
    # vLLM on CPU warms up compiled models only, so the test asks for the pass.
    with (
        running(models("moe").path) as engine,
        pytest.raises(UnsupportedError, match=r"several times for each token.*NixlConnector"),
    ):
        engine.llm.llm_engine.engine_core.execute_dummy_batch()


@pytest.mark.usefixtures("repeating")
def test_experts_that_run_twice_have_no_counts(models: Models) -> None:
    with running(models("moe").path) as engine:
        [answer] = engine.prefill([1, 2, 3])
        assert answer.unavailable == "incomplete"


@pytest.fixture
def skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of a Qwen3-MoE leave out the last token of every step with more than 40."""
    original = Qwen3MoeSparseMoeBlock.forward

    def skip(self: Any, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
        kept = hidden if len(hidden) <= 40 else hidden[:-1]
        routed: torch.Tensor = original(self, kept, *args)
        return torch.cat([routed, hidden[len(kept) :]])

    monkeypatch.setattr(Qwen3MoeSparseMoeBlock, "forward", skip)


@pytest.mark.usefixtures("skipping")
def test_tokens_that_skip_a_layer_have_no_counts(models: Models) -> None:
    model = models("moe")
    rng = np.random.default_rng(0)
    short, long = ([int(token) for token in rng.integers(0, 256, length)] for length in (30, 50))
    with running(model.path) as engine:
        [answer] = engine.prefill(short)
        np.testing.assert_array_equal(answer.counts, model.reference.counts(short))
        [answer] = engine.record(long, max_tokens=3)
        assert answer.unavailable == "incomplete"
        # The first block of the long prompt is in the prefix cache, and has no counts either.
        [answer] = engine.prefill(long[:32] + short[:8])
        assert answer.cached_tokens == 32
        assert answer.unavailable == "incomplete"
        [answer] = engine.prefill([*short, 1])
        np.testing.assert_array_equal(answer.counts, model.reference.counts([*short, 1]))
