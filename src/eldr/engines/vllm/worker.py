"""The worker side: counts the tokens of each step, and reads from it what the scheduler side asked for."""

from __future__ import annotations

import logging
from collections import deque

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.kv_cache_interface import KVCacheConfig

from eldr.engines.vllm.hooks import ExpertCapture
from eldr.engines.vllm.hostcopy import HostCopy
from eldr.engines.vllm.messages import Geometry, RecordedRows, RecordedSpan, StepPlan, StepResult
from eldr.engines.vllm.routing import distinct_experts, experts_at, tokens_at
from eldr.engines.vllm.support import full_attention_group
from eldr.engines.vllm.table import BlockTable

# A child of vLLM's own logger, which writes to the worker's log.
logger = logging.getLogger("vllm.eldr")


class ExpertCounter:
    """Adds the routing that `capture` saw to `table`. Without a table it does nothing."""

    def __init__(self, capture: ExpertCapture, table: BlockTable | None) -> None:
        self._capture = capture
        self._table = table
        self._geometry = Geometry(capture.layers, capture.experts, capture.top_k)
        self._distinct: deque[HostCopy] = deque()
        self._result: StepResult | None = None
        self._warned = False

    def begin_step(self) -> None:
        """A forward pass is about to start."""
        self._capture.begin_step()

    def count(self, plan: StepPlan) -> None:
        """Count the step that just ran, or that is queued to run before this on the device."""
        self._result = None
        if self._table is None:
            return
        self._table.take(plan.taken, loaded=False)
        self._table.take(plan.loaded, loaded=True)
        if not plan.tokens:
            return
        slots, experts = self._capture.slots[: plan.tokens], self._capture.device_buffer[: plan.tokens]
        if plan.padding:
            slots = torch.where(tokens_at(slots, plan.padding), -1, slots)
        complete = self._capture.complete(plan.tokens)
        if complete:
            self._table.add(slots, experts)
        else:  # the blocks stay short of tokens, and the recorded slots are not found
            self._warn_of_gaps()
            slots = torch.full_like(slots, -1)
        self._table.distrust(plan.drafted)
        if complete and (plan.decode_slots is None or plan.decode_slots):
            chosen = None if plan.decode_slots is None else tokens_at(slots, plan.decode_slots)
            self._distinct.append(HostCopy(distinct_experts(experts, self._geometry.experts, chosen)))
        if plan.ended or plan.recorded:
            self._result = StepResult(
                self._geometry,
                {done.request_id: HostCopy(self._table.sum(done.blocks, done.tokens)) for done in plan.ended},
                _rows_of(plan.recorded, slots, experts) if plan.recorded else None,
            )

    def _warn_of_gaps(self) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "eldr has no counts for some prompts: the model took some of their tokens around a MoE layer, or ran "
                "the layer several times"
            )

    def take_result(self) -> StepResult | None:
        """Return what the scheduler side asked for about the step counted last."""
        result, self._result = self._result, None
        return result

    def take_distinct(self) -> list[int]:
        """Return the distinct experts of each (decode step, layer) that became known since the last call."""
        values: list[int] = []
        while self._distinct and self._distinct[0].ready():
            values += self._distinct.popleft().numpy().tolist()
        return values


def _rows_of(recorded: list[RecordedSpan], slots: torch.Tensor, experts: torch.Tensor) -> RecordedRows:
    """The rows of all spans, read and copied in one piece: each kernel costs more than its work."""
    spans = [(span.request_id, span.first_position, len(span.slots)) for span in recorded]
    wanted = [slot for span in recorded for slot in span.slots]
    return RecordedRows(spans, HostCopy(experts_at(slots, experts, wanted)))


def make_counter(
    config: VllmConfig, kv_cache: KVCacheConfig, kv_cache_bytes: int, device: torch.device
) -> ExpertCounter:
    """Make the counter of one worker.

    Only the first tensor-parallel rank counts, because every rank routes every token. The other ranks only take part in
    the collectives of the capture.
    """
    group = kv_cache.kv_cache_groups[full_attention_group(kv_cache)]
    capture = ExpertCapture(config, group.layer_names[0], device)
    if get_tensor_model_parallel_rank() > 0:
        return ExpertCounter(capture, None)
    table = BlockTable(
        kv_cache.num_blocks, group.kv_cache_spec.block_size, capture.layers, capture.experts, device=device
    )
    logger.info(
        "eldr counts %d MoE layers x %d experts, top-%d; its table takes %.2f MiB, %.2f %% of the KV cache",
        capture.layers,
        capture.experts,
        capture.top_k,
        table.nbytes / 2**20,
        100 * table.nbytes / kv_cache_bytes,
    )
    return ExpertCounter(capture, table)
