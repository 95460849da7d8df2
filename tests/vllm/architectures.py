"""Tiny random models, one for each MoE architecture that vLLM can run on the CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.vllm.tiny_models import SLIDING_WINDOW, common, save_tokenizer


@dataclass(frozen=True)
class Architecture:
    """A model to make, and what its counts must look like.

    config: the name of the configuration class in transformers. settings: its arguments, besides `COMMON`.
    shape: MoE layers, experts, top-k.
    registered: the name that vLLM looks up, if it is not the one that transformers writes.
    hybrid: part of the layers have a state instead of a KV cache. NIXL then leaves the last token of a prompt to the
        decode worker.
    dtype: float32, unless vLLM's kernels need another.
    biased: draw the correction biases of the router at random. vLLM's CPU router ignores those of an ungrouped softmax.
    native_rope: replace the kernel that rotates queries. That of vLLM 0.32 for CPU is wrong for those of MLA.
    """

    config: str
    settings: Mapping[str, Any]
    shape: tuple[int, int, int]
    registered: str | None = None
    hybrid: bool = False
    dtype: str = "float32"
    biased: bool = True
    native_rope: bool = False

    def make_config(self, path: Path) -> Any:
        """Write the configuration and a tokenizer to `path`, and return the former."""
        config = getattr(transformers, self.config)(**{**COMMON, **self.settings})
        config.architectures = [self.registered]
        config.save_pretrained(path)
        save_tokenizer(path)
        return config

    def make(self, path: Path) -> Any:
        """Write the model and a tokenizer to `path`, and return the transformers model."""
        config = self.make_config(path)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32)
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if self.biased and name.endswith(("e_score_correction_bias", "expert_bias")):
                    tensor.copy_(torch.randn(tensor.shape) / 20)
                elif name.endswith(".gate.weight") and not tensor.any():
                    tensor.copy_(torch.randn(tensor.shape) / 10)
        model.save_pretrained(path)
        if self.registered:
            written = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(written | {"architectures": [self.registered]}))
        return model.eval()


COMMON: Mapping[str, Any] = common(4)
# The only sizes that vLLM's CPU kernel for multi-head latent attention has: 512 + 64.
_LATENT = {
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
_DEEPSEEK = {"n_routed_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
_ROUTED = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
_LOCAL = {"num_local_experts": 16, "num_experts_per_tok": 4}
_GATED_DELTA = {
    "shared_expert_intermediate_size": 64,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "full_attention_interval": 2,
}

ARCHITECTURES: Mapping[str, Architecture] = {
    # Latent attention, dense first layers, a shared expert, sigmoid routing within groups, with a correction bias.
    "DeepSeek-V3": Architecture(
        "DeepseekV3Config",
        _DEEPSEEK
        | _LATENT
        | {
            "num_hidden_layers": 5,
            "first_k_dense_replace": 2,
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
        },
        (3, 32, 4),
        native_rope=True,
    ),
    "DeepSeek-V2": Architecture(
        "DeepseekV2Config",
        _DEEPSEEK
        | _LATENT
        | {
            "first_k_dense_replace": 1,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
        },
        (3, 32, 4),
        native_rope=True,
    ),
    "GLM-4.7-Flash": Architecture(
        "Glm4MoeLiteConfig",
        _DEEPSEEK
        | _LATENT
        | {
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        (3, 32, 4),
        native_rope=True,
    ),
    "GLM-4.5": Architecture(
        "Glm4MoeConfig",
        _DEEPSEEK
        | {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "use_qk_norm": True},
        (3, 32, 4),
    ),
    # Layers with and without experts by turns, one expert per token, a routing function of the model's own.
    "Llama 4": Architecture(
        "Llama4TextConfig",
        {
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 64,
        },
        (2, 16, 1),
    ),
    # Linear attention in every second layer. vLLM has its CPU kernel in bfloat16 alone.
    "Qwen3-Next": Architecture("Qwen3NextConfig", _ROUTED | _GATED_DELTA, (4, 16, 4), hybrid=True, dtype="bfloat16"),
    "Granite 4 (hybrid)": Architecture(
        "GraniteMoeHybridConfig",
        _LOCAL
        | {
            "shared_intermediate_size": 64,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 32,
            "mamba_chunk_size": 64,
        },
        (4, 16, 4),
        hybrid=True,
    ),
    "Granite MoE": Architecture("GraniteMoeConfig", _LOCAL, (4, 16, 4)),
    "Granite MoE (shared)": Architecture(
        "GraniteMoeSharedConfig", _LOCAL | {"shared_intermediate_size": 64}, (4, 16, 4)
    ),
    "Mixtral": Architecture("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}, (4, 8, 2)),
    # A dense layer between those with experts.
    "Qwen2-MoE": Architecture(
        "Qwen2MoeConfig", _ROUTED | {"shared_expert_intermediate_size": 64, "mlp_only_layers": [1]}, (3, 16, 4)
    ),
    "Qwen3-MoE": Architecture("Qwen3MoeConfig", _ROUTED, (4, 16, 4)),
    # More experts than a byte can number, and more of them per token than in other models.
    "Qwen3-MoE (wide)": Architecture(
        "Qwen3MoeConfig", {"num_experts": 300, "num_experts_per_tok": 22, "moe_intermediate_size": 32}, (4, 300, 22)
    ),
    "OLMoE": Architecture("OlmoeConfig", {"num_experts": 16, "num_experts_per_tok": 4}, (4, 16, 4)),
    "ERNIE 4.5": Architecture(
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 16, "moe_k": 4, "moe_intermediate_size": 64, "moe_num_shared_experts": 1},
        (3, 16, 4),
        biased=False,
    ),
    "EXAONE": Architecture(
        "ExaoneMoeConfig",
        _ROUTED
        | {
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "sliding_window": SLIDING_WINDOW,
            "scoring_func": "sigmoid",
        },
        (3, 16, 4),
    ),
    "Phi-3.5-MoE": Architecture(
        "PhimoeConfig",
        {"num_local_experts": 16, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
        (4, 16, 2),
        registered="PhiMoEForCausalLM",
    ),
    # These have no implementation in vLLM, which runs that of transformers with its own experts.
    "dots.llm1": Architecture(
        "Dots1Config", _DEEPSEEK | {"n_shared_experts": 1, "first_k_dense_replace": 1}, (3, 32, 4)
    ),
    "Hunyuan": Architecture("HunYuanMoEV1Config", {"num_experts": 16, "moe_topk": 4}, (4, 16, 4)),
    "FlexOlmo": Architecture("FlexOlmoConfig", {"num_experts": 16, "num_experts_per_tok": 4}, (4, 16, 4)),
    "AFMoE": Architecture(
        "AfmoeConfig",
        _ROUTED
        | {
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "sliding_window": SLIDING_WINDOW,
            "score_func": "sigmoid",
            "route_norm": True,
        },
        (3, 16, 4),
    ),
    "Mellum": Architecture("MellumConfig", _ROUTED, (4, 16, 4)),
    "Solar Open": Architecture("SolarOpenConfig", _DEEPSEEK | {"n_shared_experts": 1}, (4, 32, 4)),
}
# One for each difficulty. The others run with ELDR_ARCHITECTURES=all.
ESSENTIAL = (
    "DeepSeek-V3",
    "Llama 4",
    "Qwen3-Next",
    "Granite 4 (hybrid)",
    "Qwen2-MoE",
    "Qwen3-MoE (wide)",
    "dots.llm1",
)
# Models that vLLM makes on the CPU, but cannot run there: it lacks Mamba-1, and sigmoid routing without groups.
NOT_RUN: Mapping[str, Architecture] = {
    "Jamba": Architecture(
        "JambaConfig",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
        (2, 8, 2),
        registered="JambaForCausalLM",
    ),
    "MiniMax-M2": Architecture(
        "MiniMaxM2Config",
        _LOCAL | {"scoring_func": "sigmoid", "use_routing_bias": True, "rotary_dim": 32},
        (4, 16, 4),
        registered="MiniMaxM2ForCausalLM",
    ),
    "Laguna": Architecture("LagunaConfig", _ROUTED, (3, 16, 4), registered="LagunaForCausalLM"),
}
LONGCAT = Architecture(
    "LongcatFlashConfig",
    _LATENT
    | {
        "num_layers": 2,
        "ffn_hidden_size": 128,
        "expert_ffn_hidden_size": 64,
        "moe_intermediate_size": 64,
        "moe_topk": 4,
        "n_routed_experts": 16,
        "zero_expert_num": 8,
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    (2, 16, 4),
    registered="LongcatFlashForCausalLM",
)
