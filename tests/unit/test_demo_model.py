"""The model that the demo writes: complete, of the asked geometry, the same each time, over bytes."""

import json
from itertools import pairwise

import numpy as np
import pytest
from safetensors.numpy import load_file

from eldr.demo.model import ModelShape, build_tensors, write_model

OTHER = ModelShape(seed=3, layers=2, experts=8, top_k=2, expert_size=16)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, OTHER)
    return folder


def qwen3_moe_shapes(config):
    """Names and shapes of the tensors of Qwen3-MoE, from its definition in transformers."""
    hidden, heads, size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    kv_heads, expert_size = config["num_key_value_heads"], config["moe_intermediate_size"]
    vocabulary = (config["vocab_size"], hidden)
    shapes = {"model.embed_tokens.weight": vocabulary, "lm_head.weight": vocabulary, "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (heads * size, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv_heads * size, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv_heads * size, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, heads * size),
            f"{prefix}.self_attn.q_norm.weight": (size,),
            f"{prefix}.self_attn.k_norm.weight": (size,),
            f"{prefix}.mlp.gate.weight": (config["num_experts"], hidden),
        }
        for expert in range(config["num_experts"]):
            shapes[f"{prefix}.mlp.experts.{expert}.gate_proj.weight"] = (expert_size, hidden)
            shapes[f"{prefix}.mlp.experts.{expert}.up_proj.weight"] = (expert_size, hidden)
            shapes[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = (hidden, expert_size)
    return shapes


def test_the_folder_holds_every_tensor_of_its_configuration(written):
    config = json.loads((written / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_experts"], config["num_experts_per_tok"]) == (2, 8, 2)
    tensors = load_file(written / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == qwen3_moe_shapes(config)
    assert all(tensor.dtype == np.float32 and np.isfinite(tensor).all() for tensor in tensors.values())


def test_the_same_shape_gives_the_same_bytes_and_another_seed_others(written, tmp_path):
    write_model(tmp_path, OTHER)
    assert (tmp_path / "model.safetensors").read_bytes() == (written / "model.safetensors").read_bytes()
    other = build_tensors(ModelShape(seed=4, layers=2, experts=8, top_k=2, expert_size=16))
    assert not np.allclose(other["lm_head.weight"], build_tensors(OTHER)["lm_head.weight"])


def test_a_bytes_token_is_the_byte(written):
    tokenizer = json.loads((written / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(256))
    # Known points of GPT-2's byte-level alphabet: printable ASCII is itself, space is Ġ, line feed Ċ, 0xFF is ÿ.
    assert all(vocabulary[chr(byte)] == byte for byte in range(0x21, 0x7F))
    assert (vocabulary["Ġ"], vocabulary["Ċ"], vocabulary["ÿ"], vocabulary["Ā"]) == (0x20, 0x0A, 0xFF, 0x00)
    assert {token["content"]: token["id"] for token in tokenizer["added_tokens"]} == {
        "<s>": 256,
        "</s>": 257,
        "<pad>": 258,
    }


def generate(tensors, shape, prompt, tokens):
    """Greedy generation by a plain forward of Qwen3-MoE, written from its definition."""
    sequence = list(prompt)
    for _ in range(tokens):
        sequence.append(int(forward(tensors, shape, sequence)[-1].argmax()))
    return bytes(sequence[len(prompt) :])


def rms(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def rotate(x):
    length, _, size = x.shape
    angle = np.arange(length)[:, None] * 1e6 ** (-np.arange(size // 2) / (size // 2))
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = x[..., : size // 2], x[..., size // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def forward(tensors, shape, sequence):
    x = tensors["model.embed_tokens.weight"][sequence]
    length = len(sequence)
    for layer in range(shape.layers):
        of = {name.removeprefix(f"model.layers.{layer}."): value for name, value in tensors.items()}
        size = len(of["self_attn.q_norm.weight"])
        y = rms(x, of["input_layernorm.weight"])
        q, k, v = ((y @ of[f"self_attn.{name}_proj.weight"].T).reshape(length, -1, size) for name in "qkv")
        q = rotate(rms(q, of["self_attn.q_norm.weight"]))
        k = rotate(rms(k, of["self_attn.k_norm.weight"]))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
        scores[:, ~np.tri(length, dtype=bool)] = -np.inf
        mixed = np.einsum("hqk,khd->qhd", softmax(scores), v).reshape(length, -1)
        x = x + mixed @ of["self_attn.o_proj.weight"].T
        y = rms(x, of["post_attention_layernorm.weight"])
        gates = softmax(y @ of["mlp.gate.weight"].T)
        out = np.zeros_like(x)
        for token in range(length):
            chosen = np.argsort(-gates[token])[: shape.top_k]
            for expert in chosen:
                up = of[f"mlp.experts.{expert}.up_proj.weight"] @ y[token]
                gate = of[f"mlp.experts.{expert}.gate_proj.weight"] @ y[token]
                down = of[f"mlp.experts.{expert}.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
                out[token] += gates[token, expert] / gates[token, chosen].sum() * down
        x = x + out
    return rms(x, tensors["model.norm.weight"]) @ tensors["lm_head.weight"].T


def test_the_model_writes_on_in_bytes_and_pairs_of_bytes_of_its_prompt():
    """What in-context copying promises: the output is made of pieces of the prompt, and is not one byte for ever."""
    tensors = build_tensors(OTHER)
    prompt = b"the heart is enlarged; the liver is tender, the kidney is normal. "
    text = generate(tensors, OTHER, prompt, 24)
    assert set(text) <= set(prompt)
    pairs = set(pairwise(prompt))
    known = sum(pair in pairs for pair in pairwise(text))
    assert known >= 20
    assert len(set(text)) >= 5
