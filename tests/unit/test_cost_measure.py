"""Measuring a MoE layer: what is measured, and clear errors. The measurement itself needs PyTorch."""

import argparse
import importlib.util
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from eldr.cli import calibrate_cost as cost_cli
from eldr.cost import CostError, load_cost
from eldr.cost_measure import GEOMETRIES, LayerGeometry, active_counts, measure

HAS_TORCH = importlib.util.find_spec("torch") is not None
SMALL = LayerGeometry(hidden=64, expert_hidden=32, experts=16, top_k=2)


def parse(*words: Any) -> Namespace:
    parser = argparse.ArgumentParser()
    cost_cli.add_arguments(parser)
    return parser.parse_args(["-o", "out.json", *words])


def test_active_experts_that_tokens_can_reach() -> None:
    assert active_counts(SMALL, 1) == [2]
    assert active_counts(SMALL, 3) == [2, 4]
    assert active_counts(SMALL, 64) == [2, 4, 8, 16]


def test_known_geometries_have_the_weights_of_their_models() -> None:
    """Expert parameters of all layers, from the models' names: 30B, 120B, 26B, 7B less what is not experts."""
    layers = {"qwen3-30b-a3b": 48, "gpt-oss-120b": 36, "gemma-4-26b-a4b": 30, "olmoe-1b-7b": 16}
    for name, billions in (
        ("qwen3-30b-a3b", 29),
        ("gpt-oss-120b", 115),
        ("gemma-4-26b-a4b", 22.8),
        ("olmoe-1b-7b", 6.4),
    ):
        layer = GEOMETRIES[name]
        weights = 3 * layer.experts * layer.hidden * layer.expert_hidden * layers[name]
        assert weights / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_layer_of_ones_own() -> None:
    assert parse("--layer", "64,32,16,2").layer == SMALL
    for bad in ("64,32,16", "64,32,16,17", "0,1,1,1"):
        with pytest.raises(SystemExit):
            parse("--layer", bad)


@pytest.mark.skipif(HAS_TORCH, reason="the error is of environments without PyTorch")
def test_without_pytorch_the_error_says_where_to_run() -> None:
    with pytest.raises(CostError, match="needs PyTorch; run this in an environment that has it"):
        measure(SMALL, "cpu")


@pytest.mark.skipif(not HAS_TORCH, reason="needs PyTorch")
def test_a_measurement_becomes_a_cost_file(tmp_path: Path) -> None:
    arguments = parse("--layer", "64,32,16,2", "--device", "cpu", "--repeats", "2")
    arguments.output = tmp_path / "out.json"
    assert cost_cli.run(arguments) == 0
    assert load_cost(arguments.output).moe_layer.per_expert_us >= 0


@pytest.mark.skipif(not HAS_TORCH, reason="needs PyTorch")
def test_a_layer_beyond_the_memory_is_refused() -> None:
    with pytest.raises(CostError, match="choose a smaller geometry"):
        measure(LayerGeometry(2**15, 2**15, 1024, 2), "cpu")
