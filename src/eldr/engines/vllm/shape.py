"""Finds the shape that the counts of a model have, and refuses models whose counts would not be exact.

Counts are a matrix of layers and experts in which every row sums to tokens x top-k. A model fits if each token takes
part in each MoE layer once, if all layers have the same top-k, and if the ids that its router reports name the routed
experts and nothing else. Layers may differ in their experts: the rows of smaller ones end in zeros.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter

from eldr.engines.vllm.support import UnsupportedError

# A child of vLLM's own logger, which writes to the worker's log.
logger = logging.getLogger("vllm.eldr")

WITHOUT_COUNTS = 'Serve it with vLLM\'s own "kv_connector": "NixlConnector", without expert counts'


def common_shape(config: VllmConfig, layers: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many experts the largest of the MoE `layers` has, and how many of them a token chooses in each.

    layers: by name, each a MoERunner or a RoutedExpertsCaptureSource.
    Raises UnsupportedError if there are no layers, or if their choices do not make one exact matrix of counts.
    """
    model = config.model_config.model
    if not layers:
        raise UnsupportedError(
            f"the model {model} has no mixture-of-experts layers that use vLLM's fused MoE, so there are no expert "
            f"choices to count. {WITHOUT_COUNTS}"
        )
    if getattr(config.model_config, "is_diffusion", False):  # vLLM 0.30 has no such models
        raise UnsupportedError(
            f"the model {model} generates by diffusion: it computes each token several times, with other experts each "
            f"time. {WITHOUT_COUNTS}"
        )
    if config.cache_config.kv_sharing_fast_prefill:
        raise UnsupportedError(
            "--kv-sharing-fast-prefill skips the last layers for most prompt tokens, whose experts would be missing "
            "from the counts: drop it"
        )
    _check_one_group_per_layer(model, layers)
    for name, layer in layers.items():
        _check_router(model, name, getattr(layer, "router", None))
    return _padded_shape(config, layers)


def _check_one_group_per_layer(model: str, layers: Mapping[str, Any]) -> None:
    # For example ERNIE 4.5 VL: text tokens go to one group, tokens of images to the other.
    groups = defaultdict(list)
    for name, layer in layers.items():
        groups[int(layer.layer_id)].append(name)
    for names in groups.values():
        if len(names) > 1:
            raise UnsupportedError(
                f"the model {model} has several groups of experts in one layer, {' and '.join(names)}, and a token "
                f"goes to one of them only, so they have no common counts. {WITHOUT_COUNTS}"
            )


def _check_router(model: str, name: str, router: Any) -> None:
    if isinstance(router, ZeroExpertRouter):
        raise UnsupportedError(
            f"the model {model} has zero-computation experts. vLLM reports them as expert 0, so the choices of "
            f"expert 0 cannot be counted. {WITHOUT_COUNTS}"
        )
    if getattr(router, "num_fused_shared_experts", 0):
        raise UnsupportedError(
            f"vLLM adds the shared experts of {name} to the chosen ones. Set "
            "VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0 to compute them separately"
        )


def _padded_shape(config: VllmConfig, layers: Mapping[str, Any]) -> tuple[int, int]:
    by_experts, by_top_k = defaultdict(list), defaultdict(list)
    for name, layer in layers.items():
        if isinstance(layer, MoERunner):
            experts, top_k = int(layer.moe_config.num_logical_experts), int(layer.moe_config.experts_per_token)
        else:
            experts, top_k = config.model_config.get_num_experts(), config.model_config.get_num_experts_per_tok()
        by_experts[experts].append(name)
        by_top_k[top_k].append(name)
    if len(by_top_k) > 1:
        found = ", ".join(f"{len(names)} top-{top_k} (such as {names[0]})" for top_k, names in sorted(by_top_k.items()))
        raise UnsupportedError(
            f"the MoE layers of {config.model_config.model} differ in the experts that a token chooses: {found}. "
            "Counts are checked by their sum, tokens x top-k in every layer, and the experts of a generated token are "
            f"one matrix, layers x top-k. {WITHOUT_COUNTS}"
        )
    if len(by_experts) > 1:
        logger.info(
            "eldr pads the counts of smaller MoE layers with zeros: %s",
            ", ".join(f"{len(names)} with {experts} experts" for experts, names in sorted(by_experts.items())),
        )
    return max(by_experts), next(iter(by_top_k))
