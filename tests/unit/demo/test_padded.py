"""Padded experts: zeros where they belong, everything else untouched, the same outputs, and a size that fits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from eldr.demo.model import write_model
from eldr.demo.padded import (
    ENGINE_BYTES,
    INNER_SIZES,
    SPARE_BYTES,
    ExpertBytes,
    PaddingError,
    available_bytes,
    expert_bytes,
    inner_size_for,
    pad_experts,
)
from tests.unit.demo.test_model import qwen3_moe_shapes, read_bfloat16

Tensors = dict[str, NDArray[np.float32]]
INNER = 96


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shipped")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("padded")
    write_model(folder)
    pad_experts(folder, INNER)
    return folder


def test_config_and_weights_agree(padded: Path, shipped: Path) -> None:
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (padded, shipped))
    assert config == {**before, "moe_intermediate_size": INNER}
    tensors = read_bfloat16(padded / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == qwen3_moe_shapes(config)


def test_weights_are_kept_and_what_is_added_is_zero(padded: Path, shipped: Path) -> None:
    before, after = (read_bfloat16(folder / "model.safetensors") for folder in (shipped, padded))
    for name, tensor in before.items():
        if ".experts." not in name:
            np.testing.assert_array_equal(after[name], tensor)
        elif "down_proj" in name:
            np.testing.assert_array_equal(after[name][:, :64], tensor)
            assert not after[name][:, 64:].any()
        else:
            np.testing.assert_array_equal(after[name][:64], tensor)
            assert not after[name][64:].any()


def expert(tensors: Tensors, prefix: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """An expert's output by its definition, down(silu(gate(x)) * up(x)), summed one inner value after the other."""
    gate, up, down = (tensors[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
    inner = (gate @ x) / (1 + np.exp(-(gate @ x))) * (up @ x)
    return np.add.accumulate(down * inner, axis=1)[:, -1]


def test_an_expert_computes_the_same_bits(padded: Path, shipped: Path) -> None:
    before, after = (read_bfloat16(folder / "model.safetensors") for folder in (shipped, padded))
    rng = np.random.default_rng(1)
    for layer, number in ((0, 0), (1, 31), (3, 17)):
        x = rng.standard_normal(128).astype(np.float32)
        prefix = f"model.layers.{layer}.mlp.experts.{number}"
        output = expert(before, prefix, x)
        assert output.any()
        np.testing.assert_array_equal(expert(after, prefix, x), output)


def test_what_an_expert_weighs(padded: Path, shipped: Path) -> None:
    assert expert_bytes(shipped) == 3 * 128 * 64 * 4
    assert expert_bytes(padded) == 3 * 128 * INNER * 4


def test_narrower_experts_and_other_weights_are_refused(padded: Path, tmp_path: Path) -> None:
    with pytest.raises(PaddingError, match="wider than 64"):
        pad_experts(padded, 64)
    write_model(tmp_path)
    header: dict[str, Any] = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(PaddingError, match="x is F32"):
        pad_experts(tmp_path, 128)


def test_the_size_is_the_largest_that_fits(shipped: Path) -> None:
    def needed(size: int, decode: int) -> int:
        return (2 + decode) * ENGINE_BYTES + SPARE_BYTES + decode * 4 * 32 * 3 * 128 * size * 4

    for decode in (2, 4):
        for larger, size in zip((None, *INNER_SIZES), INNER_SIZES, strict=False):
            assert inner_size_for(shipped, needed(size, decode), decode) == size
            if larger is not None:
                assert inner_size_for(shipped, needed(larger, decode) - 1, decode) == size
    assert inner_size_for(shipped, 0, 4) == INNER_SIZES[-1]


def test_available_memory_is_linuxs_within_the_containers_limit(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  999 kB\nMemAvailable:  800 kB\nHugePages_Total: 0\n")
    assert available_bytes(tmp_path) == 800 * 1024
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("1000\n")
    assert available_bytes(tmp_path) == 800 * 1024
    (cgroup / "memory.max").write_text("300000\n")
    assert available_bytes(tmp_path) == 299_000


def test_smaller_experts_than_usual_are_said_to_be_so() -> None:
    assert ExpertBytes(98_304, 64 * 98_304).in_words() == "experts padded from 0.1 to 6.3 MB in float32"
    assert ExpertBytes(98_304, 8 * 98_304).in_words().endswith("of at most 6.3 MB, which need more free memory")
