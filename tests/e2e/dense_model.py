"""A tiny random dense model, which vLLM can serve on the CPU with LoRA adapters, and such adapters.

vLLM's fused MoE with LoRA has GPU kernels alone, so the model has no experts and its workers no expert counts.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import eldr_small_moe
import numpy as np
from numpy.typing import NDArray

HIDDEN, LAYERS, HEADS, HEAD, INNER, VOCABULARY = 64, 2, 2, 32, 128, 260
RANK = 8

_Tensors = dict[str, NDArray[np.float32]]


def write_dense_model(folder: Path) -> None:
    """Write a Qwen3 with the tokenizer of the demo's model, in Hugging Face's format."""
    rng = np.random.default_rng(5)
    ones = np.ones
    tensors: _Tensors = {
        "model.embed_tokens.weight": _random(rng, VOCABULARY, HIDDEN),
        "lm_head.weight": _random(rng, VOCABULARY, HIDDEN),
        "model.norm.weight": ones(HIDDEN, np.float32),
    }
    for layer in range(LAYERS):
        of = f"model.layers.{layer}."
        tensors |= {
            of + "self_attn.q_proj.weight": _random(rng, HEADS * HEAD, HIDDEN),
            of + "self_attn.k_proj.weight": _random(rng, HEAD, HIDDEN),
            of + "self_attn.v_proj.weight": _random(rng, HEAD, HIDDEN),
            of + "self_attn.o_proj.weight": _random(rng, HIDDEN, HEADS * HEAD),
            of + "self_attn.q_norm.weight": ones(HEAD, np.float32),
            of + "self_attn.k_norm.weight": ones(HEAD, np.float32),
            of + "mlp.gate_proj.weight": _random(rng, INNER, HIDDEN),
            of + "mlp.up_proj.weight": _random(rng, INNER, HIDDEN),
            of + "mlp.down_proj.weight": _random(rng, HIDDEN, INNER),
            of + "input_layernorm.weight": ones(HIDDEN, np.float32),
            of + "post_attention_layernorm.weight": ones(HIDDEN, np.float32),
        }
    folder.mkdir()
    _save(folder / "model.safetensors", tensors)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "float32",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": HEAD,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(eldr_small_moe.folder() / name, folder / name)


def write_adapter(folder: Path, seed: int) -> None:
    """Write a LoRA adapter of that model in PEFT's format, strong enough to change most answers."""
    rng = np.random.default_rng(seed)
    tensors: _Tensors = {}
    for layer in range(LAYERS):
        for name, outputs in (("q_proj", HEADS * HEAD), ("v_proj", HEAD)):
            of = f"base_model.model.model.layers.{layer}.self_attn.{name}."
            tensors[of + "lora_A.weight"] = 3 * _random(rng, RANK, HIDDEN)
            tensors[of + "lora_B.weight"] = 3 * _random(rng, outputs, RANK)
    folder.mkdir()
    _save(folder / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _random(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return (0.1 * rng.standard_normal(shape)).astype(np.float32)


def _save(path: Path, tensors: _Tensors) -> None:
    """Write a safetensors file: the length of the header as a little-endian uint64, the header, the data."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": (end, end + tensor.nbytes)}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    data = b"".join(tensor.astype("<f4").tobytes() for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
