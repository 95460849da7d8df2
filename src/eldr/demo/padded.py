"""Makes the demo's model heavy: every expert is padded with zeros, so that it computes the same and weighs more.

An expert computes down(silu(gate(x)) * up(x)). A row of zeros in gate and up gives an inner value of silu(0) * 0 = 0,
which a column of zeros in down multiplies by 0. So outputs stay the same, bit by bit, whatever the padding. What a step
reads does not: an engine reads every weight of an expert that a token chose, and those zeros are weights to it.

The weights are read and written by safetensors' definition: the length of a JSON header, the header, the data.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.demo.model import CONFIG, WEIGHTS
from eldr.errors import EldrError

SHIPPED_INNER_SIZE = 64
# The first is wide enough for experts to be most of what a step costs on a CPU. The others are for less memory.
INNER_SIZES = (4096, 2048, 1024, 512, 256)
# Of an engine of the demo with the shipped model, its processes, KV cache and libraries; measured with vLLM 0.32.
ENGINE_BYTES = 1_100_000_000
# Left to the demo itself, its routers, and everything else.
SPARE_BYTES = 1_400_000_000
# Rows of the first two and columns of the last are an expert's inner values.
_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)\.weight$")
_MATRICES = 3
_LENGTH_BYTES = 8
FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class ExpertBytes:
    """What one expert weighs in float32: in the shipped model, and padded in the decode workers."""

    shipped: int
    padded: int

    def in_words(self) -> str:
        text = f"experts padded from {self.shipped / 1e6:.1f} to {self.padded / 1e6:.1f} MB in float32"
        most = self.shipped * INNER_SIZES[0] // SHIPPED_INNER_SIZE
        return text if self.padded == most else f"{text}, of at most {most / 1e6:.1f} MB, which need more free memory"


class PaddingError(EldrError):
    """The model cannot be padded to the wanted size."""


def pad_experts(folder: Path, inner_size: int) -> None:
    """Pad every expert of the model in `folder` with zeros, in place, to `inner_size` (`moe_intermediate_size`).

    Raises PaddingError if its experts are larger already, or its weights are not bfloat16.
    """
    config, weights_path = _config(folder), folder / WEIGHTS
    if config["moe_intermediate_size"] > inner_size:
        raise PaddingError(f"the experts of {folder} are wider than {inner_size} already")
    tensors = {
        name: _padded(bits, axis, inner_size) if (axis := _inner_axis(name)) is not None else bits
        for name, bits in _read(weights_path)
    }
    _write(weights_path, tensors)
    (folder / CONFIG).write_text(json.dumps({**config, "moe_intermediate_size": inner_size}, indent=1) + "\n")


def inner_size_for(folder: Path, available: int, decode_workers: int) -> int:
    """The largest of INNER_SIZES with which the demo's workers fit into `available` bytes, or the smallest.

    folder: of the model, which the decode workers hold padded and the others do not.
    """
    config = _config(folder)
    rows = config["num_hidden_layers"] * config["num_experts"] * _MATRICES * config["hidden_size"]
    others = (2 + decode_workers) * ENGINE_BYTES + SPARE_BYTES
    fitting = (size for size in INNER_SIZES if others + decode_workers * rows * size * FLOAT32_BYTES <= available)
    return next(fitting, INNER_SIZES[-1])


def available_bytes(root: Path = Path("/")) -> int:
    """The memory that new processes can have: Linux's estimate, within the limit of this container if there is one."""
    meminfo = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # no cgroup, no limit ("max"), or cgroups of the first version
        limit, used = (int((root / "sys/fs/cgroup" / name).read_text()) for name in ("memory.max", "memory.current"))
        available = min(available, limit - used)
    return available


def expert_bytes(folder: Path) -> int:
    """What one expert of the model in `folder` weighs in an engine that computes in float32."""
    config = _config(folder)
    return int(_MATRICES * config["hidden_size"] * config["moe_intermediate_size"] * FLOAT32_BYTES)


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config


def _inner_axis(name: str) -> int | None:
    found = _EXPERT.search(name)
    return None if found is None else int(found[1] == "down_proj")


def _padded(bits: NDArray[np.uint16], axis: int, size: int) -> NDArray[np.uint16]:
    wider = [(0, 0), (0, 0)]
    wider[axis] = (0, size - bits.shape[axis])
    return np.pad(bits, wider)


def _read(path: Path) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """The tensors of a file, as the bits of their bfloat16."""
    content = path.read_bytes()
    data = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    header: dict[str, Any] = json.loads(content[_LENGTH_BYTES:data])
    header.pop("__metadata__", None)
    for name, about in header.items():
        if about["dtype"] != "BF16":
            raise PaddingError(f"{path}: {name} is {about['dtype']}, expected BF16")
        start, end = about["data_offsets"]
        yield name, np.frombuffer(content[data + start : data + end], "<u2").reshape(about["shape"])


def _write(path: Path, tensors: dict[str, NDArray[np.uint16]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, bits in tensors.items():
        header[name] = {"dtype": "BF16", "shape": bits.shape, "data_offsets": [at, at + bits.nbytes]}
        at += bits.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for bits in tensors.values():
            file.write(bits.tobytes())
