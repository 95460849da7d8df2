"""Write the trained model in Hugging Face form: config.json, model.safetensors in bfloat16, a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from network import Block, Geometry, SmallMoe
from safetensors.torch import save_file
from torch import Tensor

BYTES = 256
BOS, EOS, PAD = 256, 257, 258
CONTEXT = 4096
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def export(model: SmallMoe, folder: Path) -> None:
    """Write the model to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.norm,
        "lm_head.weight": model.head,
    }
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        named |= {f"model.layers.{number}.{name}": tensor for name, tensor in _block(block).items()}
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in named.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (
        ("config.json", _config(model.geometry)),
        ("tokenizer.json", _tokenizer()),
        ("tokenizer_config.json", _tokenizer_config()),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _block(block: Block) -> dict[str, Tensor]:
    """A layer's tensors under the names of Qwen3-MoE."""
    tensors: dict[str, Tensor] = {
        "input_layernorm.weight": block.attention_norm,
        "post_attention_layernorm.weight": block.expert_norm,
        "self_attn.q_proj.weight": block.query,
        "self_attn.k_proj.weight": block.key,
        "self_attn.v_proj.weight": block.value,
        "self_attn.o_proj.weight": block.output,
        "self_attn.q_norm.weight": block.query_norm,
        "self_attn.k_norm.weight": block.key_norm,
        "mlp.gate.weight": block.router,
    }
    for expert, (gate_and_up, down) in enumerate(zip(block.gate_and_up, block.down, strict=True)):
        gate, up = gate_and_up.chunk(2)
        name = f"mlp.experts.{expert}"
        tensors |= {f"{name}.gate_proj.weight": gate, f"{name}.up_proj.weight": up, f"{name}.down_proj.weight": down}
    return tensors


def _config(geometry: Geometry) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "vocab_size": geometry.vocab_size,
        "hidden_size": geometry.hidden_size,
        "intermediate_size": geometry.moe_intermediate_size,
        "moe_intermediate_size": geometry.moe_intermediate_size,
        "num_hidden_layers": geometry.num_hidden_layers,
        "num_attention_heads": geometry.num_attention_heads,
        "num_key_value_heads": geometry.num_attention_heads,
        "head_dim": geometry.head_dim,
        "num_experts": geometry.num_experts,
        "num_experts_per_tok": geometry.num_experts_per_tok,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": CONTEXT,
        "rope_theta": geometry.rope_theta,
        "rms_norm_eps": geometry.rms_norm_eps,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


def _tokenizer() -> dict[str, Any]:
    """A byte-level BPE without merges, in which the id of a byte's token is the byte."""
    specials = {BOS: "<s>", EOS: "</s>", PAD: "<pad>"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": text, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for number, text in specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {text: byte for byte, text in enumerate(_byte_texts())}, "merges": []},
    }


def _byte_texts() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (the convention of GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    texts, moved = [], BYTES
    for byte in range(BYTES):
        texts.append(chr(byte if byte in printable else moved))
        moved += byte not in printable
    return texts


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
