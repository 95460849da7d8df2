"""Whose MoE layers are counted. The names are those that vLLM 0.32 gives the layers."""

from __future__ import annotations

import pytest

from eldr.engines.vllm.target import of_target

MODEL = [f"model.layers.{i}.mlp.experts" for i in range(1, 4)]  # the first layer is dense
MULTIMODAL = [f"language_model.model.layers.{i}.mlp.experts" for i in range(4)]


@pytest.mark.parametrize(
    ("target", "drafter"),
    [
        pytest.param(MODEL, [], id="ngram"),
        pytest.param(MODEL, [f"draft_model.model.layers.{i}.mlp.experts" for i in range(8)], id="draft_model"),
        pytest.param(MODEL, ["mtp.layers.0.mlp.experts"], id="qwen3_next_mtp"),
        pytest.param(MULTIMODAL, ["mtp.layers.0.mlp.experts"], id="qwen3_5_mtp"),
        pytest.param(MODEL, ["model.layers.4.mtp_block.mlp.experts"], id="deepseek_mtp"),
        pytest.param(MODEL, ["model.layers.4.mlp.experts", "model.layers.5.mlp.experts"], id="glm4_moe_mtp"),
        pytest.param(MULTIMODAL, ["model.layers.4.feed_forward.experts"], id="llama4_eagle"),
        pytest.param(["backbone.layers.1.mixer.experts"], ["mtp.layers.1.mixer.experts"], id="nemotron_h_mtp"),
    ],
)
def test_the_models_own_layers(target: list[str], drafter: list[str]) -> None:
    assert of_target(target + drafter, hidden_layers=4) == target


def test_a_layer_without_a_number() -> None:
    with pytest.raises(ValueError, match=r"'model\.experts' has no number"):
        of_target(["model.experts"], hidden_layers=4)
