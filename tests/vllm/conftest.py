"""Runs inside a vLLM environment (make test, make test-matrix)."""

from __future__ import annotations

import os

# Before anything imports vLLM.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NIXL_SIDE_CHANNEL_HOST="127.0.0.1",
)
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)

from functools import cache

import pytest

from tests.vllm import tiny_models
from tests.vllm.models import Model, Models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The tiny model of a name."""
    makers = {
        "moe": lambda path: tiny_models.make_moe(path),
        "moe-6x24-top3": lambda path: tiny_models.make_moe(path, layers=6, experts=24, top_k=3, seed=1),
        "moe-mtp": lambda path: tiny_models.make_moe_with_mtp_head(path),
        "gemma-like": lambda path: tiny_models.make_gemma(path),
        "gpt-oss-like": lambda path: tiny_models.make_gpt_oss(path),
    }

    @cache
    def model(name: str) -> Model:
        return Model(makers[name](tmp_path_factory.mktemp(name)))

    return model
