"""The trained model that ships with eldr: complete, small, of the stated geometry and origin, over bytes, and able."""

import hashlib
import json
from pathlib import Path
from typing import Any

import eldr_small_moe
import numpy as np
import pytest
from numpy.typing import NDArray

from eldr.demo.model import MODEL_FILES, write_model

MAX_BYTES = 8_000_000
ALLOWED_LICENCES = ("BSD-2-Clause", "BSD-3-Clause", "MIT", "Apache-2.0", "CC0-1.0")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def config(written: Path) -> dict[str, Any]:
    return json.loads((written / "config.json").read_text())


@pytest.fixture(scope="module")
def tensors(written: Path) -> dict[str, NDArray[np.float32]]:
    return read_bfloat16(written / "model.safetensors")


@pytest.fixture(scope="module")
def provenance() -> dict[str, dict[str, Any]]:
    return json.loads((eldr_small_moe.folder() / "provenance.json").read_text(encoding="utf-8"))


def read_bfloat16(path: Path) -> dict[str, NDArray[np.float32]]:
    """Tensors of a safetensors file, read by the format's definition: a bfloat16 is the upper half of a float32."""
    content = path.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    header.pop("__metadata__")
    data = content[8 + header_bytes :]
    tensors = {}
    for name, about in header.items():
        assert about["dtype"] == "BF16"
        start, end = about["data_offsets"]
        upper = np.frombuffer(data[start:end], "<u2").astype(np.uint32)
        tensors[name] = (upper << 16).view(np.float32).reshape(about["shape"])
    return tensors


def qwen3_moe_shapes(config: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
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


def test_only_what_vllm_needs_is_written(written: Path) -> None:
    assert {path.name for path in written.iterdir()} == set(MODEL_FILES)


def test_the_weights_are_small_and_of_the_stated_geometry(
    written: Path, config: dict[str, Any], tensors: dict[str, NDArray[np.float32]]
) -> None:
    assert (written / "model.safetensors").stat().st_size <= MAX_BYTES
    assert config["num_hidden_layers"] >= 4
    assert config["num_experts"] >= 32
    assert {name: tensor.shape for name, tensor in tensors.items()} == qwen3_moe_shapes(config)
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


def test_provenance_is_that_of_the_weights(
    written: Path,
    config: dict[str, Any],
    tensors: dict[str, NDArray[np.float32]],
    provenance: dict[str, dict[str, Any]],
) -> None:
    digest = hashlib.sha256((written / "model.safetensors").read_bytes()).hexdigest()
    assert provenance["weights"]["sha256"] == digest
    assert provenance["weights"]["licence"] == "Apache-2.0"
    assert provenance["weights"]["parameters"] == sum(tensor.size for tensor in tensors.values())
    training = provenance["training"]
    assert training["steps"] > 0
    assert training["seed"] == 0
    assert set(training["held_out"]["bits_per_byte"]) == set(provenance["text"]["training_bytes"])
    for package in provenance["text"]["packages"]:
        assert package["licence"].split(" (")[0] in ALLOWED_LICENCES
        assert len(bytes.fromhex(package["sha256"])) == 32
    notice = (eldr_small_moe.folder() / "NOTICE.md").read_text(encoding="utf-8")
    assert all(package["package"] in notice for package in provenance["text"]["packages"])


def test_a_bytes_token_is_the_byte(written: Path) -> None:
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


def rms(x: NDArray[Any], weight: NDArray[np.float32]) -> NDArray[Any]:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def rotate(x: NDArray[Any], theta: float) -> NDArray[np.float64]:
    length, _, size = x.shape
    angle = np.arange(length)[:, None] * theta ** (-np.arange(size // 2) / (size // 2))
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = x[..., : size // 2], x[..., size // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def forward(
    tensors: dict[str, NDArray[np.float32]], config: dict[str, Any], sequence: list[int]
) -> NDArray[np.float64]:
    """Logits [T, vocabulary] of a plain forward of Qwen3-MoE, written from its definition."""
    x = tensors["model.embed_tokens.weight"][sequence]
    length, top_k, theta = len(sequence), config["num_experts_per_tok"], config["rope_theta"]
    for layer in range(config["num_hidden_layers"]):
        of = {name.removeprefix(f"model.layers.{layer}."): value for name, value in tensors.items()}
        size = len(of["self_attn.q_norm.weight"])
        y = rms(x, of["input_layernorm.weight"])
        q: NDArray[Any]
        k: NDArray[Any]
        q, k, v = ((y @ of[f"self_attn.{name}_proj.weight"].T).reshape(length, -1, size) for name in "qkv")
        q = rotate(rms(q, of["self_attn.q_norm.weight"]), theta)
        k = rotate(rms(k, of["self_attn.k_norm.weight"]), theta)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
        scores[:, ~np.tri(length, dtype=bool)] = -np.inf
        mixed = np.einsum("hqk,khd->qhd", softmax(scores), v).reshape(length, -1)
        x = x + mixed @ of["self_attn.o_proj.weight"].T
        y = rms(x, of["post_attention_layernorm.weight"])
        gates = softmax(y @ of["mlp.gate.weight"].T)
        out = np.zeros_like(x)
        for token in range(length):
            chosen = np.argsort(-gates[token])[:top_k]
            for expert in chosen:
                up = of[f"mlp.experts.{expert}.up_proj.weight"] @ y[token]
                gate = of[f"mlp.experts.{expert}.gate_proj.weight"] @ y[token]
                down = of[f"mlp.experts.{expert}.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
                out[token] += gates[token, expert] / gates[token, chosen].sum() * down
        x = x + out
    return rms(x, tensors["model.norm.weight"]) @ tensors["lm_head.weight"].T


# Written for this test: neither training text nor a demo prompt.
SAMPLES = {
    "code": "    def close(self) -> None:\n        if self._file is not None:\n            self._file.close()\n",
    "medicine": "The patient was treated for pneumonia with an antibiotic and her cough improved after four days.",
    "law": "The seller shall deliver the goods to the buyer within ten days of the date of this agreement.",
    "russian": "Мы долго шли через лес и наконец увидели маленький дом у реки.",
    "greek": "Το απόγευμα ο γιατρός γύρισε στο σπίτι του και διάβασε το γράμμα.",
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_the_model_has_learnt_to_predict_text_of_the_kind(
    tensors: dict[str, NDArray[np.float32]], config: dict[str, Any], kind: str
) -> None:
    """Half the bits of a model that knows nothing, though the texts are short and begin without context."""
    text = list(SAMPLES[kind].encode())
    logits = forward(tensors, config, text)[:-1]
    bits = -np.log2(softmax(logits.astype(np.float64))[np.arange(len(text) - 1), text[1:]])
    assert bits.mean() < 4
