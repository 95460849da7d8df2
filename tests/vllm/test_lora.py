"""Counts of prompts for LoRA adapters: those of the model with the adapter's weights added, bit for bit.

vLLM's experts with LoRA need a GPU, so the adapters here change attention and the routers of the experts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as moe_method

from tests.vllm.engine import BLOCK_SIZE, Engine, running
from tests.vllm.models import Model, Models

RANK = 8
CHANGED = {"q_proj": "self_attn.q_proj", "v_proj": "self_attn.v_proj", "gate": "mlp.gate"}


@dataclass
class Case:
    engine: Engine
    base: Model
    adapted: list[tuple[LoRARequest, Model]]


def make_adapter(base: Path, adapter: Path, merged: Path, seed: int) -> None:
    """Write a random adapter of the model at `base`, and the model that the two make together."""
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, Any] = {}
    for name in [name for name in weights if name.removesuffix(".weight").endswith(tuple(CHANGED.values()))]:
        outputs, inputs = weights[name].shape
        down = 0.3 * torch.randn((RANK, inputs), generator=generator)
        up = 0.3 * torch.randn((outputs, RANK), generator=generator)
        stem = "base_model.model." + name.removesuffix(".weight")
        parts |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        weights[name] = weights[name] + up @ down
    adapter.mkdir()
    save_file(parts, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(CHANGED), "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(base, merged)
    save_file(weights, merged / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def case(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    base = models("moe")
    folder = tmp_path_factory.mktemp("lora")
    adapted = []
    for number in (1, 2):
        adapter, merged = folder / f"adapter{number}", folder / f"merged{number}"
        make_adapter(base.path, adapter, merged, seed=number)
        adapted.append((LoRARequest(adapter.name, number, str(adapter)), Model(merged)))
    choose = moe_method.select_unquantized_moe_backend

    def choose_as_without_lora(moe_config: Any) -> Any:
        moe_config.is_lora_enabled = False
        return choose(moe_config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe_method, "select_unquantized_moe_backend", choose_as_without_lora)
        with running(
            base.path,
            enable_lora=True,
            max_lora_rank=RANK,
            max_loras=2,
            lora_target_modules=list(CHANGED),
            num_gpu_blocks_override=64,
            max_model_len=512,
            extra_config={"kv_lease_duration": 1},
        ) as engine:
            yield Case(engine, base, adapted)


def test_counts_are_those_of_the_adapted_model(case: Case) -> None:
    """By turns with the base model, on the same prompts: neither finds the other's blocks in the prefix cache."""
    rng = np.random.default_rng(0)
    [(one, merged), _] = case.adapted
    for length in (1, 31, 64, 100):
        prompt = [int(token) for token in rng.integers(0, 256, length)]
        assert (case.base.reference.counts(prompt) != merged.reference.counts(prompt)).any()
        for again in range(2):
            for model, adapter in ((case.base, None), (merged, one)):
                [answer] = case.engine.prefill(prompt, adapters=[adapter])
                assert answer.unavailable is None
                np.testing.assert_array_equal(answer.counts, model.reference.counts(prompt))
                assert answer.tokens == model.reference.next_tokens(prompt)[-1:]
                assert answer.cached_tokens == (again and (length - 1) // BLOCK_SIZE * BLOCK_SIZE)


def test_one_step_may_hold_several_adapters(case: Case) -> None:
    """Without the base model, which vLLM 0.32 answers on the CPU as an adapter if the step has one."""
    rng = np.random.default_rng(1)
    prompts = [[int(token) for token in rng.integers(0, 256, 40)] for _ in range(3)]
    used = [case.adapted[number] for number in (0, 1, 0)]
    answers = case.engine.prefill(*prompts, adapters=[adapter for adapter, _ in used])
    for prompt, (_, merged), answer in zip(prompts, used, answers, strict=True):
        np.testing.assert_array_equal(answer.counts, merged.reference.counts(prompt))
