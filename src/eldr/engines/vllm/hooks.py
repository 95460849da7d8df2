"""Captures which experts each token of a step chose, and where its KV was written.

vLLM's own capturer knows its routers, its monolithic kernels and the batch layouts of data, expert and sequence
parallelism. This one adds the KV slots, and finds the layers without access to the model object.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    RoutedExpertsCaptureSource,
    bind_routed_experts_capturer,
)

from eldr.engines.vllm.shape import WITHOUT_COUNTS, common_shape
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
        found = _moe_layers(config)
        self.experts, self.top_k = common_shape(config, found)
        sources = sorted(found.values(), key=lambda layer: int(layer.layer_id))
        self.layers = len(sources)
        self._index = {source.layer_id: i for i, source in enumerate(sources)}
        self._attention_layer = attention_layer
        most = config.scheduler_config.max_num_batched_tokens
        # The inherited `capture` reads these three attributes.
        self.device_buffer = torch.zeros((most, self.layers, self.top_k), dtype=torch.int32, device=device)
        self.dp_rank = config.parallel_config.data_parallel_rank
        self.tp_size = config.parallel_config.tensor_parallel_size
        self.slots = torch.full((most,), -1, dtype=torch.int64, device=device)
        # How many tokens each layer routed in the forward pass seen last.
        self._pass: weakref.ref[ForwardContext] | None = None
        self._routed: dict[int, int] = {}
        self._serving = False
        try:
            bind_routed_experts_capturer(torch.nn.ModuleList(sources), self)
        except ValueError as error:
            raise UnsupportedError(f"this model's expert choices cannot be captured: {error}") from None

    def begin_step(self) -> None:
        """Forget the forward passes seen so far. The first step ends vLLM's warm-up."""
        self._serving = True
        self._pass = None
        self._routed.clear()

    def complete(self, tokens: int) -> bool:
        """Whether the buffers hold the choices of the first `tokens` tokens of this step in every layer.

        They do not if the model took some tokens around a layer, or ran a layer twice. A replayed CUDA graph calls no
        hook, and fills the buffers as it did when it was captured.
        """
        return not self._routed or (len(self._routed) == self.layers and min(self._routed.values()) >= tokens)

    def capture(self, layer_id: int, topk_ids: torch.Tensor) -> None:
        """Called inside the forward pass of each MoE layer, with integer ids [T, k].

        Raises UnsupportedError in vLLM's warm-up if the model runs the layer twice in one pass.
        """
        index = self._index[layer_id]
        context = get_forward_context()
        if self._pass is None or self._pass() is not context:
            self._pass = weakref.ref(context)
            self._routed.clear()
        # With data parallelism the inherited method finds this rank's tokens, and fails if there is another number.
        routed = len(topk_ids) if context.dp_metadata is None else len(self.slots)
        if index in self._routed:
            if not self._serving:
                raise UnsupportedError(
                    f"the model runs the experts of MoE layer {layer_id} several times for each token, and only the "
                    f"choices of the last time can be seen. {WITHOUT_COUNTS}"
                )
            routed = 0
        self._routed[index] = routed
        super().capture(index, topk_ids)
        by_layer = context.slot_mapping
        if index == 0 and by_layer:  # empty while memory is profiled
            slots = by_layer[self._attention_layer]
            self.slots[: len(slots)].copy_(slots)


def _moe_layers(config: VllmConfig) -> dict[str, Any]:
    found = {
        name: layer
        for name, layer in config.compilation_config.static_forward_context.items()
        if isinstance(layer, MoERunner | RoutedExpertsCaptureSource)
    }
    if config.speculative_config is None:
        return found
    counted = of_target(found, config.model_config.get_total_num_hidden_layers())
    if drafters := [name for name in found if name not in counted]:
        logger.info("eldr leaves out the MoE layers of the drafter: %s", ", ".join(drafters))
    return {name: found[name] for name in counted}
