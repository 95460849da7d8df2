"""Tiny random models with a byte-level tokenizer, made on the spot from a fixed seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

VOCABULARY = 260
BOS, EOS, PAD = 256, 257, 258
SLIDING_WINDOW = 32
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def common(layers: int) -> dict[str, Any]:
    """The configuration that all tiny models share."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
        # Larger than usual, so that random routers have clear favourites instead of near ties.
        "initializer_range": 0.1,
    }


def make_moe(path: Path, layers: int = 4, experts: int = 32, top_k: int = 4, seed: int = 0) -> Path:
    """Like Qwen3-MoE: every layer full attention and MoE."""
    config = Qwen3MoeConfig(
        **common(layers),
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=64,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
    )
    return _save(Qwen3MoeForCausalLM, config, path, seed)


def make_gpt_oss(path: Path, layers: int = 4, experts: int = 16, top_k: int = 4, seed: int = 0) -> Path:
    """Like GPT-OSS: sliding-window and full attention by turns, and attention sinks."""
    config = GptOssConfig(
        **common(layers), num_local_experts=experts, num_experts_per_tok=top_k, sliding_window=SLIDING_WINDOW
    )
    return _save(GptOssForCausalLM, config, path, seed)


def make_gemma(path: Path, layers: int = 6, experts: int = 16, top_k: int = 4, seed: int = 0) -> Path:
    """Like Gemma 4: every third layer full attention, with larger heads than the sliding-window ones."""
    config = Gemma4TextConfig(
        **common(layers),
        num_experts=experts,
        top_k_experts=top_k,
        enable_moe_block=True,
        moe_intermediate_size=64,
        sliding_window=SLIDING_WINDOW,
        layer_types=[("full_attention" if i % 3 == 2 else "sliding_attention") for i in range(layers)],
        global_head_dim=64,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=VOCABULARY,
    )
    return _save(Gemma4ForCausalLM, config, path, seed)


def make_moe_with_mtp_head(path: Path, layers: int = 3, experts: int = 16, top_k: int = 4, seed: int = 0) -> Path:
    """Like Qwen3-Next with its MTP head, which is MoE as well, but without linear attention."""
    config = Qwen3NextConfig(
        **common(layers),
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        layer_types=["full_attention"] * layers,
        num_nextn_predict_layers=1,
    )
    _save(Qwen3NextForCausalLM, config, path, seed)
    # transformers knows no MTP head: one of another model becomes this one's.
    file = path / "model.safetensors"
    weights = load_file(file)
    generator = torch.Generator().manual_seed(seed)
    head = {
        name.replace("model.layers.0.", "mtp.layers.0."): weight + 0.02 * torch.randn(weight.shape, generator=generator)
        for name, weight in weights.items()
        if name.startswith("model.layers.0.")
    }
    norms = ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")
    head |= {f"mtp.{name}.weight": torch.zeros(config.hidden_size) for name in norms}
    head["mtp.fc.weight"] = 0.1 * torch.randn((config.hidden_size, 2 * config.hidden_size), generator=generator)
    save_file(weights | head, file, {"format": "pt"})
    return path


def make_dense(path: Path, layers: int = 2, seed: int = 0) -> Path:
    """Like Qwen3: no experts at all."""
    return _save(Qwen3ForCausalLM, Qwen3Config(**common(layers)), path, seed)


def _save(model_class: Any, config: Any, path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model_class(config).to(torch.float32).save_pretrained(path)
    save_tokenizer(path)
    return path


def save_tokenizer(path: Path) -> None:
    """Write the byte-level tokenizer to the folder of a model."""
    _tokenizer().save_pretrained(path)


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
