"""Captures which experts each token of a step chose, and where its KV was written.

vLLM's own capturer knows its routers, its monolithic kernels and the batch layouts of data, expert and sequence
parallelism. This one adds the KV slots, and finds the layers without access to the model object.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    RoutedExpertsCaptureSource,
    bind_routed_experts_capturer,
)
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter

from eldr.engines.vllm.support import UnsupportedError
from eldr.engines.vllm.target import of_target

# A child of vLLM's own logger, which writes to the worker's log.
logger = logging.getLogger("vllm.eldr")


class ExpertCapture(RoutedExpertsCapturer):
    """The routing of the most recent step, in static buffers so that CUDA graphs can write to them.

    device_buffer: int32 [T_max, L, k], logical expert ids, before load balancing moves experts. L counts the MoE layers
        in model order.
    slots: int64 [T_max], the KV slot of each token in the cache group of `attention_layer`.
    """

    def __init__(self, config: VllmConfig, attention_layer: str, device: torch.device) -> None:
        sources = _moe_layers(config)
        self.layers = len(sources)
        self.experts, self.top_k = _geometry(config, sources)
        self._index = {source.layer_id: i for i, source in enumerate(sources)}
        self._attention_layer = attention_layer
        most = config.scheduler_config.max_num_batched_tokens
        # The inherited `capture` reads these three attributes.
        self.device_buffer = torch.zeros((most, self.layers, self.top_k), dtype=torch.int32, device=device)
        self.dp_rank = config.parallel_config.data_parallel_rank
        self.tp_size = config.parallel_config.tensor_parallel_size
        self.slots = torch.full((most,), -1, dtype=torch.int64, device=device)
        try:
            bind_routed_experts_capturer(torch.nn.ModuleList(sources), self)
        except ValueError as error:
            raise UnsupportedError(f"this model's expert choices cannot be captured: {error}") from None

    def capture(self, layer_id: int, topk_ids: torch.Tensor) -> None:
        """Called inside the forward pass of each MoE layer, with integer ids [T, k]."""
        index = self._index[layer_id]
        super().capture(index, topk_ids)
        if index == 0 and is_forward_context_available():
            by_layer = get_forward_context().slot_mapping
            if by_layer:  # empty while memory is profiled
                slots = by_layer[self._attention_layer]
                self.slots[: len(slots)].copy_(slots)


def _moe_layers(config: VllmConfig) -> list[Any]:
    found = {
        name: layer
        for name, layer in config.compilation_config.static_forward_context.items()
        if isinstance(layer, MoERunner | RoutedExpertsCaptureSource)
    }
    if config.speculative_config is not None:
        counted = of_target(found, config.model_config.get_total_num_hidden_layers())
        if drafters := [name for name in found if name not in counted]:
            logger.info("eldr leaves out the MoE layers of the drafter: %s", ", ".join(drafters))
        found = {name: found[name] for name in counted}
    if not found:
        raise UnsupportedError(
            f"no mixture-of-experts layer of {config.model_config.model} uses vLLM's fused MoE, "
            "so expert choices cannot be captured"
        )
    return sorted(found.values(), key=lambda layer: int(layer.layer_id))


def _geometry(config: VllmConfig, sources: list[Any]) -> tuple[int, int]:
    if any(isinstance(getattr(source, "router", None), ZeroExpertRouter) for source in sources):
        raise UnsupportedError("models with zero-computation experts are not supported")
    shapes = {
        (source.moe_config.num_logical_experts, source.moe_config.experts_per_token)
        for source in sources
        if isinstance(source, MoERunner)
    } or {(config.model_config.get_num_experts(), config.model_config.get_num_experts_per_tok())}
    if len(shapes) > 1:
        raise UnsupportedError(f"MoE layers of different (experts, top-k) are not supported: {sorted(shapes)}")
    experts, top_k = shapes.pop()
    return int(experts), int(top_k)
