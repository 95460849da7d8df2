"""Measures how long one MoE layer takes on this device, as active experts and tokens vary.

The layer has the plain form that serving engines run: two matrix products around a gated activation for every active
expert, over the tokens routed to it. Weights are random. Only their number and shape matter, because a decode step is
bound by reading them. Needs PyTorch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.cost import CostError, CostModel, MoeLayerCost, fit_moe_layer


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """The size of one MoE layer: width of the model, width of an expert, experts, and experts per token."""

    hidden: int
    expert_hidden: int
    experts: int
    top_k: int


# From the models' published configurations.
GEOMETRIES: dict[str, LayerGeometry] = {
    "qwen3-30b-a3b": LayerGeometry(hidden=2048, expert_hidden=768, experts=128, top_k=8),
    "gpt-oss-120b": LayerGeometry(hidden=2880, expert_hidden=2880, experts=128, top_k=4),
    "gemma-4-26b-a4b": LayerGeometry(hidden=2816, expert_hidden=704, experts=128, top_k=8),
    "olmoe-1b-7b": LayerGeometry(hidden=2048, expert_hidden=1024, experts=64, top_k=8),
}
TOKENS = (1, 4, 8, 16, 32, 64)
REPEATS = 9
# Measurements rotate through this many sets of experts, so that a step reads its weights from memory, not from a cache.
ROTATIONS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Measurements:
    """Measured times of one MoE layer.

    active_experts, tokens, time_us: float64 [M]. Each time is the minimum of several repeats, because other work on the
        machine can only add time.
    """

    active_experts: NDArray[np.float64]
    tokens: NDArray[np.float64]
    time_us: NDArray[np.float64]


def measure(
    geometry: LayerGeometry,
    device: str,
    *,
    token_counts: Sequence[int] = TOKENS,
    repeats: int = REPEATS,
    progress: Callable[[str], None] | None = None,
) -> Measurements:
    """Time the layer for every token count and every number of active experts that those tokens can reach.

    geometry: the size of the layer.
    device: "cpu" or "cuda".
    token_counts: the numbers of tokens to measure.
    repeats: how often each measurement is repeated.
    progress: called with a description of each measurement.
    Raises CostError if PyTorch, the device, or memory for the layer is missing.
    """
    torch = _torch()
    if device == "cuda" and not torch.cuda.is_available():
        raise CostError("PyTorch sees no CUDA device; measure with --device cpu")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if device == "cpu":
        _check_memory(geometry)
    try:
        layer = _Layer(torch, geometry, device, dtype)
    except (RuntimeError, MemoryError) as error:
        raise CostError(f"the layer does not fit into the memory of {device}: {str(error).splitlines()[0]}") from None
    rows: list[tuple[int, int, float]] = []
    with torch.inference_mode():
        for tokens in token_counts:
            for active in active_counts(geometry, tokens):
                if progress is not None:
                    progress(f"{tokens} tokens, {active} experts")
                rows.append((active, tokens, layer.least_us(tokens, active, repeats)))
    columns = np.array(rows, dtype=np.float64).T
    return Measurements(columns[0], columns[1], columns[2])


def cuda_available() -> bool:
    """Return whether PyTorch sees a CUDA device. Raises CostError if PyTorch is missing."""
    return bool(_torch().cuda.is_available())


def calibrate_cost(name: str, measurements: Measurements, device: str) -> CostModel:
    """Fit a cost model to measurements of the geometry called `name`."""
    moe_layer: MoeLayerCost = fit_moe_layer(measurements.active_experts, measurements.tokens, measurements.time_us)
    return CostModel(f"{name}-{device}", _device_name(device), "measured by eldr calibrate-cost", moe_layer)


def _check_memory(geometry: LayerGeometry) -> None:
    """Raise CostError unless the float32 weights leave a quarter of the free memory."""
    needed_bytes = 3 * 4 * geometry.experts * geometry.hidden * geometry.expert_hidden
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed_bytes > 0.75 * free_bytes:
        raise CostError(
            f"one layer takes {needed_bytes / 1e9:.1f} GB, but only {free_bytes / 1e9:.1f} GB are free; choose a "
            "smaller geometry"
        )


def _torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise CostError(
            "measuring needs PyTorch; run this in an environment that has it, such as your vLLM environment"
        ) from None
    return torch


def _device_name(device: str) -> str:
    torch = _torch()
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"CPU, {torch.get_num_threads()} threads"


def active_counts(geometry: LayerGeometry, tokens: int) -> list[int]:
    """Numbers of distinct experts that `tokens` tokens can activate, doubling from top-k."""
    most = min(geometry.experts, tokens * geometry.top_k)
    counts = [geometry.top_k]
    while counts[-1] * 2 <= most:
        counts.append(counts[-1] * 2)
    return counts


class _Layer:
    def __init__(self, torch: Any, geometry: LayerGeometry, device: str, dtype: Any) -> None:
        self._torch, self._geometry, self._device = torch, geometry, device
        generator = torch.Generator(device=device).manual_seed(0)

        def weights(*shape: int) -> Any:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype) / shape[-1] ** 0.5

        experts, hidden, inner = geometry.experts, geometry.hidden, geometry.expert_hidden
        self._gate_up = weights(experts, 2 * inner, hidden)
        self._down = weights(experts, hidden, inner)
        self._input = weights(max(TOKENS), hidden)

    def _routing(self, tokens: int, active: int, first: int) -> list[tuple[int, Any]]:
        """Route `tokens` tokens evenly to `active` experts, starting at `first`, with top-k experts per token.

        Returns (expert, its tokens) for each expert.
        """
        geometry = self._geometry
        of_expert: dict[int, list[int]] = {}
        for slot in range(tokens * geometry.top_k):
            expert = (first + slot % active) % geometry.experts
            of_expert.setdefault(expert, []).append(slot // geometry.top_k)
        return [(expert, self._torch.tensor(at, device=self._device)) for expert, at in of_expert.items()]

    def _run(self, hidden: Any, routing: list[tuple[int, Any]]) -> Any:
        functional = self._torch.nn.functional
        output = self._torch.zeros_like(hidden)
        for expert, at in routing:
            gate, up = functional.linear(hidden[at], self._gate_up[expert]).chunk(2, dim=-1)
            output.index_add_(0, at, functional.linear(functional.silu(gate) * up, self._down[expert]))
        return output

    def least_us(self, tokens: int, active: int, repeats: int) -> float:
        hidden = self._input[:tokens]
        step = max(1, self._geometry.experts // ROTATIONS)
        routings = [self._routing(tokens, active, step * at) for at in range(ROTATIONS)]
        times = []
        for repeat in range(-2, repeats):  # the first two warm up
            seconds = self._timed(hidden, routings[repeat % ROTATIONS])
            if repeat >= 0:
                times.append(seconds)
        return 1e6 * min(times)

    def _timed(self, hidden: Any, routing: list[tuple[int, Any]]) -> float:
        """Seconds for one pass. CUDA replays it as a graph, so that kernel launches do not count, as in serving."""
        torch = self._torch
        if self._device != "cuda":
            start = time.perf_counter()
            self._run(hidden, routing)
            return time.perf_counter() - start
        self._run(hidden, routing)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(hidden, routing)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3
