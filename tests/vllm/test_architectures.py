"""Counts of every MoE architecture that vLLM runs on the CPU, bit for bit (docs/vllm.md has the table)."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import transformers
import vllm
from numpy.typing import NDArray
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

from eldr.engines.vllm.support import UnsupportedError
from tests.vllm.architectures import ARCHITECTURES, ESSENTIAL, LONGCAT, NOT_RUN, Architecture
from tests.vllm.engine import running
from tests.vllm.routing import GateReference, HookedReference

STEP_TOKENS = 96
EVERY = os.environ.get("ELDR_ARCHITECTURES") == "all"


@pytest.fixture
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Architecture:
    found = {**ARCHITECTURES, **NOT_RUN, "LongCat": LONGCAT}[request.param]
    if not vllm.__version__.startswith("0.32."):
        pytest.skip("the models are made for vLLM 0.32")
    if not hasattr(transformers, found.config):
        pytest.skip(f"this transformers has no {found.config}")
    # NIXL asks for it if a model has linear attention.
    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", "DS")
    if found.native_rope:
        monkeypatch.setattr(RotaryEmbedding, "forward_cpu", RotaryEmbedding.forward_native)
    return found


def text(rng: np.random.Generator, tokens: int) -> list[int]:
    return [int(token) for token in rng.integers(0, 256, tokens)]


def prompts(block_size: int) -> dict[str, list[int]]:
    rng = np.random.default_rng(1)
    stem = text(rng, 2 * block_size + 5)
    return {
        "one token": text(rng, 1),
        "cold": text(rng, 70),
        "stem": stem,
        "repeated": stem,
        "one block cached": stem[: block_size + 3] + text(rng, 20),
        "two blocks cached": stem[: 2 * block_size] + text(rng, 11),
        "chunked": text(rng, 2 * STEP_TOKENS + 40),
    }


def counts(routing: NDArray[np.int64], experts: int) -> NDArray[np.int64]:
    layers = routing.shape[1]
    return np.stack([np.bincount(routing[:, layer].ravel(), minlength=experts) for layer in range(layers)])


def sets(routing: NDArray[np.int64]) -> list[list[set[int]]]:
    return [[set(map(int, layer)) for layer in row] for row in routing]


def counted(architecture: Architecture, prompt: Sequence[int]) -> Sequence[int]:
    """The tokens that a prefill worker computes."""
    return prompt[:-1] if architecture.hybrid and len(prompt) > 1 else prompt


def check_shape(architecture: Architecture, routing: NDArray[np.int64]) -> None:
    layers, experts, top_k = architecture.shape
    assert routing.shape[1:] == (layers, top_k)
    assert len({row.tobytes() for row in counts(routing, experts)}) == layers, "the layers do not differ"


@pytest.mark.parametrize("architecture", ARCHITECTURES if EVERY else ESSENTIAL, indirect=True)
def test_counts(architecture: Architecture, tmp_path: Path) -> None:
    model = architecture.make(tmp_path)
    if architecture.dtype == "float32":
        against_transformers(architecture, tmp_path, HookedReference(model))
    else:
        against_gates(architecture, tmp_path)


def against_transformers(architecture: Architecture, path: Path, reference: HookedReference) -> None:
    experts = architecture.shape[1]
    hits = 0
    with running(path, max_num_batched_tokens=STEP_TOKENS) as engine:
        for kind, prompt in prompts(engine.block_size).items():
            [answer] = engine.prefill(prompt)
            tokens = counted(architecture, prompt)
            routing = reference.routing(tokens)
            np.testing.assert_array_equal(answer.counts, counts(routing, experts), err_msg=kind)
            assert answer.tokens == [reference.next_token(tokens)], kind
            hits += answer.cached_tokens
            if kind == "chunked":
                check_shape(architecture, routing)
        assert hits > 0 or not engine.prefix_caching
        rng = np.random.default_rng(2)
        recorded = [text(rng, length) for length in (40, engine.block_size + 9)]
        for prompt, answer in zip(recorded, engine.record(*recorded, max_tokens=6), strict=True):
            routing = reference.routing([*prompt, *answer.tokens[:-1]])
            np.testing.assert_array_equal(answer.counts, counts(routing[: len(prompt)], experts))
            assert answer.decode_sets() == sets(routing[len(prompt) :])


def against_gates(architecture: Architecture, path: Path) -> None:
    _, experts, top_k = architecture.shape
    hits = 0
    with running(path, max_num_batched_tokens=STEP_TOKENS, dtype=architecture.dtype) as engine:
        reference = GateReference(engine, top_k)
        for kind, prompt in prompts(engine.block_size).items():
            reference.forget()
            [answer] = engine.prefill(prompt)
            tokens = counted(architecture, prompt)
            reference.learn(tokens, answer.cached_tokens)
            routing = reference.routing(tokens)
            np.testing.assert_array_equal(answer.counts, counts(routing, experts), err_msg=kind)
            hits += answer.cached_tokens
            if kind == "chunked":
                check_shape(architecture, routing)
        assert hits > 0 or not engine.prefix_caching
        prompt = text(np.random.default_rng(2), 40)
        reference.forget()
        [answer] = engine.record(prompt, max_tokens=6)
        reference.learn([*prompt, *answer.tokens[:-1]], answer.cached_tokens)
        routing = reference.routing([*prompt, *answer.tokens[:-1]])
        np.testing.assert_array_equal(answer.counts, counts(routing[: len(prompt)], experts))
        assert answer.decode_sets() == sets(routing[len(prompt) :])


@pytest.mark.parametrize("architecture", NOT_RUN if EVERY else [], indirect=True)
def test_layers_are_found(architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a forward pass, which vLLM's CPU kernels cannot compute."""
    architecture.make_config(tmp_path)
    log, said = logging.Logger("test", logging.INFO), StringIO()  # vLLM sets the level of its own
    log.addHandler(logging.StreamHandler(said))
    monkeypatch.setattr("eldr.engines.vllm.worker.logger", log)
    with running(tmp_path, load_format="dummy"):
        pass
    layers, experts, top_k = architecture.shape
    assert f"eldr counts {layers} MoE layers x {experts} experts, top-{top_k}" in said.getvalue()


@pytest.mark.parametrize("architecture", ["LongCat"], indirect=True)
def test_zero_computation_experts_fail_at_start(architecture: Architecture, tmp_path: Path) -> None:
    architecture.make_config(tmp_path)
    with (
        pytest.raises(UnsupportedError, match=r"zero-computation experts.*NixlConnector"),
        running(tmp_path, load_format="dummy"),
    ):
        pass
