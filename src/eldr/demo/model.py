"""The demo's model: a small Mixture-of-Experts language model whose weights are written down, not trained.

It is a Qwen3-MoE over bytes in Hugging Face form, which stock vLLM loads. Its residual stream is divided into named
parts, and its attention is the textbook circuit of in-context copying, the induction head (Olsson et al.,
"In-context Learning and Induction Heads", 2022): in the first layer one head looks one byte back, one two bytes
back, and one averages over the context; in the later layers a head finds where the last two bytes occurred before
and predicts the byte that followed there. Generated text is therefore a shuffle of pieces of the prompt and stays
within its kind. The routers read the classes of bytes (digits, brackets, the lead bytes of a script, ...), of the
current byte and on average over the context, so prompts of one kind use similar experts. Locality is built in by
construction.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Matrix = NDArray[np.float64]
Tensors = dict[str, Matrix]

BYTES = 256
BOS, EOS, PAD = 256, 257, 258
VOCABULARY = 260
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"

HEADS = 3
HEAD_SIZE = 64
ROPE_THETA = 1e6
RMS_EPS = 1e-6

# Classes of bytes and how strongly each is felt: weakly where kinds of text share it. Every byte that is in none of
# them is in one more class.
_ASCII_CLASSES = (
    (b"etaoinshr", 0.5),
    (b"bcdfgjklmpquvwxyz", 0.8),
    (b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", 1.0),
    (b"0123456789", 1.2),
    (b"+-*/=^<>%", 1.2),
    (b"()[]{}_'\"#:@\n\t", 1.8),
    (b" ", 0.4),
)
# Bytes of UTF-8 by range: continuation bytes, then lead bytes of Latin, Greek, Cyrillic, other 2- and 3-byte
# scripts, Chinese and Japanese.
_UTF8_CLASSES = (
    (range(0x80, 0xC0), 0.3),
    (range(0xC0, 0xCE), 1.0),
    (range(0xCE, 0xD0), 1.2),
    (range(0xD0, 0xD4), 1.2),
    (range(0xD4, 0xE3), 1.2),
    (range(0xE3, 0xEA), 1.6),
    (range(0xEA, 0x100), 1.2),
)
_CLASSES = len(_ASCII_CLASSES) + len(_UTF8_CLASSES) + 1

# Parts of the residual stream and their dimensions. "one" is constant; "byte" is the current byte's code, "back1" and
# "back2" those of the two bytes before it; "context" is the mean class vector so far; "next" is the prediction.
_CODE = 64
_CONTENT = HEAD_SIZE // 2
_SIZES = {
    "one": 1,
    "class": _CLASSES,
    "byte": _CODE,
    "back1": _CODE,
    "back2": _CONTENT,
    "context": _CLASSES + 1,
    "next": _CODE,
}
HIDDEN = sum(_SIZES.values())

# How sharp attention is (weight of the query and key norms), and how much it prefers far and changing distances:
# without the latter two, greedy copying soon runs in a circle of a few bytes.
_LOOK_BACK_SHARPNESS = 3.0
_COPY_SHARPNESS = 2.5
_FAR = 0.35
_WANDER = 0.32
_FAR_PAIR = 12  # turns by half a circle within about 560 positions
_WANDER_PAIRS = range(1, 9)
_LOOK_BACK_PAIRS = range(8)
# How much each part says about the choice of experts, and how strongly experts write back to the stream: little to
# "next", so that a near tie between two experts does not turn into another byte.
_ROUTER_SCALE = {"class": 0.1, "context": 0.45, "byte": 0.27, "next": 0.27}
_EXPERT_SCALE = {"class": 0.3, "context": 0.3, "next": 0.05}
_LOGIT_SCALE = 6.0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of the model; every other value gives another working model."""

    seed: int = 0
    layers: int = 4
    experts: int = 32
    top_k: int = 4
    expert_size: int = 32


def write_model(folder: Path, shape: ModelShape = ModelShape()) -> None:
    """Write the model to `folder` in Hugging Face form: config.json, model.safetensors, the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(t, dtype=np.float32) for name, t in build_tensors(shape).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (
        ("config.json", _config(shape)),
        ("tokenizer.json", _tokenizer()),
        ("tokenizer_config.json", _tokenizer_config()),
    ):
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def build_tensors(shape: ModelShape) -> Tensors:
    """All tensors of the model under their Hugging Face names; a pure function of `shape`."""
    rng = np.random.default_rng(shape.seed)
    codes = _unit(rng.standard_normal((VOCABULARY, _CODE)))
    embedding = np.zeros((VOCABULARY, HIDDEN))
    embedding[:, _part("one")] = 1.0
    embedding[:, _part("class")] = _byte_classes()
    embedding[:, _part("byte")] = codes
    head = np.zeros((VOCABULARY, HIDDEN))
    head[:BYTES, _part("next")] = _LOGIT_SCALE * codes[:BYTES]
    tensors = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": np.ones(HIDDEN),
        "lm_head.weight": head,
    }
    projections = (_unit(rng.standard_normal((_CONTENT, _CODE))), _unit(rng.standard_normal((_CONTENT, _CODE))))
    for layer in range(shape.layers):
        attention = _look_back(projections[1]) if layer == 0 else _copy(*projections, rng)
        block = attention.tensors() | _experts(shape, rng)
        block["input_layernorm.weight"] = np.ones(HIDDEN)
        block["post_attention_layernorm.weight"] = np.ones(HIDDEN)
        tensors |= {f"model.layers.{layer}.{name}": tensor for name, tensor in block.items()}
    return tensors


class _Attention:
    """The projections of one attention layer, all zero at first: a head without query and key attends evenly."""

    def __init__(self, sharpness: float) -> None:
        self.sharpness = sharpness
        self.query = np.zeros((HEADS, HEAD_SIZE, HIDDEN))
        self.key = np.zeros((HEADS, HEAD_SIZE, HIDDEN))
        self.value = np.zeros((HEADS, HEAD_SIZE, HIDDEN))
        self.output = np.zeros((HEADS, HIDDEN, HEAD_SIZE))

    def prefer_distance(self, head: int, pair: int, distance: float, weight: float = 1.0) -> None:
        """Raise `head`'s attention to positions `distance` back, as a cosine with the rotary pair's wavelength."""
        # Rotary embedding turns pair i, dimensions i and i + HEAD_SIZE / 2, by frequency * position.
        other = pair + HEAD_SIZE // 2
        angle = distance * ROPE_THETA ** (-pair / (HEAD_SIZE // 2))
        one = _part("one").start
        self.query[head, pair, one] = weight
        self.key[head, pair, one] = weight * np.cos(angle)
        self.key[head, other, one] = weight * np.sin(angle)

    def move(self, head: int, matrix: Matrix, source: str, target: str) -> None:
        """Let `head` write matrix @ `source` of what it attends to into `target`."""
        rows, columns = matrix.shape
        self.value[head, :rows, _part(source)] = matrix.reshape(rows, columns)
        self.output[head, _part(target), :rows][np.arange(rows), np.arange(rows)] = 1.0

    def tensors(self) -> Tensors:
        rows = HEADS * HEAD_SIZE
        return {
            "self_attn.q_proj.weight": self.query.reshape(rows, HIDDEN),
            "self_attn.k_proj.weight": self.key.reshape(rows, HIDDEN),
            "self_attn.v_proj.weight": self.value.reshape(rows, HIDDEN),
            "self_attn.o_proj.weight": self.output.transpose(1, 0, 2).reshape(HIDDEN, rows),
            "self_attn.q_norm.weight": np.full(HEAD_SIZE, self.sharpness),
            "self_attn.k_norm.weight": np.full(HEAD_SIZE, self.sharpness),
        }


def _look_back(back2: Matrix) -> _Attention:
    """The first layer: "back1" and "back2" from one and two positions back, "context" from everywhere."""
    attention = _Attention(_LOOK_BACK_SHARPNESS)
    for pair in _LOOK_BACK_PAIRS:
        attention.prefer_distance(0, pair, 1)
        attention.prefer_distance(1, pair, 2)
    # Undoes the layer norm's gain, so that the codes arrive at about unit length.
    gain = np.sqrt(3 / HIDDEN)
    attention.move(0, gain * np.eye(_CODE), "byte", "back1")
    attention.move(1, gain * back2, "byte", "back2")
    attention.move(2, 3 * gain * np.eye(_CLASSES), "class", "context")
    return attention


def _copy(back1: Matrix, back2: Matrix, rng: np.random.Generator) -> _Attention:
    """A later layer: finds the last two bytes (query: "byte", "back1") one position earlier (key: "back1", "back2").

    back1, back2: [_CONTENT, _CODE], the projections in which the two bytes are compared, added up.
    """
    attention = _Attention(_COPY_SHARPNESS)
    # The slow half of the rotary pairs hardly turns within a prompt: there, content is compared.
    slow = np.r_[HEAD_SIZE // 4 : HEAD_SIZE // 2, 3 * HEAD_SIZE // 4 : HEAD_SIZE]
    attention.query[0, slow, _part("byte")] = back1
    attention.query[0, slow, _part("back1")] = back2
    attention.key[0, slow, _part("back1")] = back1
    attention.key[0, slow, _part("back2")] = np.eye(_CONTENT)
    attention.prefer_distance(0, _FAR_PAIR, 560, _FAR)
    for pair in _WANDER_PAIRS:
        attention.prefer_distance(0, pair, rng.uniform(0, 1000), _WANDER)
    attention.move(0, 0.3 * np.eye(_CODE), "byte", "next")
    attention.move(2, 0.05 * np.eye(_CLASSES + 1), "context", "context")
    return attention


def _experts(shape: ModelShape, rng: np.random.Generator) -> Tensors:
    """Random experts, and a router that reads the parts of the stream by _ROUTER_SCALE."""
    router = np.zeros((shape.experts, HIDDEN))
    for part, scale in _ROUTER_SCALE.items():
        router[:, _part(part)] = scale * rng.standard_normal((shape.experts, _SIZES[part]))
    written = np.zeros((HIDDEN, 1))
    for part, scale in _EXPERT_SCALE.items():
        written[_part(part)] = scale
    tensors = {"mlp.gate.weight": router}
    size = shape.expert_size
    for expert in range(shape.experts):
        name = f"mlp.experts.{expert}"
        tensors[f"{name}.gate_proj.weight"] = rng.standard_normal((size, HIDDEN)) / np.sqrt(HIDDEN)
        tensors[f"{name}.up_proj.weight"] = rng.standard_normal((size, HIDDEN)) / np.sqrt(HIDDEN)
        tensors[f"{name}.down_proj.weight"] = written * rng.standard_normal((HIDDEN, size)) / np.sqrt(size)
    return tensors


def _part(name: str) -> slice:
    """Where a part of the residual stream lies."""
    start = 0
    for part, size in _SIZES.items():
        if part == name:
            return slice(start, start + size)
        start += size
    raise KeyError(name)


def _byte_classes() -> Matrix:
    """[VOCABULARY, _CLASSES], the strength of a byte's class in its column, zero elsewhere."""
    classes = np.zeros((VOCABULARY, _CLASSES))
    for column, (members, strength) in enumerate((*_ASCII_CLASSES, *_UTF8_CLASSES)):
        classes[list(members), column] = strength
    classes[~classes.any(axis=1), _CLASSES - 1] = 1.0
    return classes


def _unit(rows: Matrix) -> Matrix:
    unit: Matrix = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return unit


def _config(shape: ModelShape) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "float32",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": shape.expert_size,
        "moe_intermediate_size": shape.expert_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_SIZE,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": 4096,
        "rope_theta": ROPE_THETA,
        "rms_norm_eps": RMS_EPS,
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
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
