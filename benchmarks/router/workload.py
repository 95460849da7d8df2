"""What the clients ask and what the prefill workers answer: files that the C programs read, one item a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from eldr.counts import ExpertCounts, encode_counts

# Geometry of Qwen3-30B-A3B.
LAYERS, EXPERTS, TOP_K = 48, 128, 8
PROMPT_TOKENS = 500
BLOCK_TOKENS = 16
SIGNATURES = 64
KINDS = 8
BODIES = 256
# About 500 tokens of text.
PROMPT_WORDS = 320
WORDS = ("router", "token", "expert", "layer", "request", "prefill", "decode", "union", "step", "worker", "of", "the")


def write_handoffs(path: Path, with_counts: bool) -> None:
    """Answers of a prefill worker, as vLLM 0.32 with NIXL gives them; with eldr's counts and lease or without."""
    rng = np.random.default_rng(0)
    kinds = [rng.dirichlet(np.full(EXPERTS, 0.3), size=LAYERS) for _ in range(KINDS)]
    lines = [
        json.dumps(_answer(index, rng, kinds[index % KINDS], with_counts), separators=(",", ":"))
        for index in range(SIGNATURES)
    ]
    path.write_text("\n".join(lines) + "\n")


def _answer(index: int, rng: np.random.Generator, liking: np.ndarray[Any, Any], with_counts: bool) -> dict[str, Any]:
    request = f"cmpl-{index:032x}"
    params: dict[str, Any] = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [[index * 64 + block for block in range(-(-PROMPT_TOKENS // BLOCK_TOKENS))]],
        "remote_engine_id": "01234567-89ab-cdef-0123-456789abcdef",
        "remote_request_id": f"{request}-0",
        "remote_host": "127.0.0.1",
        "remote_port": 5600,
        "tp_size": 1,
    }
    if with_counts:
        params["eldr_counts"] = encode_counts(ExpertCounts(_counts(rng, liking), PROMPT_TOKENS, TOP_K))
        # A clock ahead of the router's, as far as it likes: the router takes the answer for fresh.
        params["eldr_lease"] = {"left_s": 30.0, "unix_s": 4e9}
    choice = {"index": 0, "text": " a", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 1, "total_tokens": PROMPT_TOKENS + 1}
    return {
        "id": request,
        "object": "text_completion",
        "created": 1790000000,
        "model": "mock",
        "choices": [choice],
        "usage": usage,
        "kv_transfer_params": params,
    }


def _counts(rng: np.random.Generator, liking: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """uint32 [L, E]: every token takes TOP_K different experts of each layer, by the kind's liking [L, E]."""
    counts = np.zeros((LAYERS, EXPERTS), np.uint32)
    for row, weights in zip(counts, liking, strict=True):
        chosen = np.argpartition(rng.gumbel(size=(PROMPT_TOKENS, EXPERTS)) + np.log(weights), -TOP_K)[:, -TOP_K:]
        np.add.at(row, chosen, 1)
    return counts


def write_bodies(path: Path, *, max_tokens: int, stream: bool) -> None:
    """Completion requests with different prompts."""
    rng = np.random.default_rng(1)
    with path.open("w") as file:
        for index in range(BODIES):
            prompt = f"Request {index}. " + " ".join(rng.choice(WORDS, PROMPT_WORDS))
            body = {"model": "mock", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.7, "stream": stream}
            file.write(json.dumps(body, separators=(",", ":")) + "\n")
