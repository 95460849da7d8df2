"""EldrConnector: vLLM's NIXL pull connector plus expert counts, recorded experts and an enforced lease.

Select it with `"kv_connector": "EldrConnector"`; see docs/vllm.md. vLLM creates one object for an engine's scheduler
and one for each of its workers.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnector
from vllm.platforms import current_platform

from eldr.engines.vllm.lease import PullGuard, deadline_unix_s, grant
from eldr.engines.vllm.messages import StepPlan, StepResult
from eldr.engines.vllm.plugin import register
from eldr.engines.vllm.quiet import quiet_nixl
from eldr.engines.vllm.reports import KEY as REPORTS
from eldr.engines.vllm.reports import Reporter, report_options
from eldr.engines.vllm.scheduler import RequestTracker
from eldr.engines.vllm.stats import EldrPromMetrics, EldrStats
from eldr.engines.vllm.support import UnsupportedError, check_engine, full_attention_group, options
from eldr.engines.vllm.worker import ExpertCounter, make_counter

if TYPE_CHECKING:
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class EldrConnector(NixlPullConnector):
    """The KV connector of a prefill worker, a decode worker, or a single worker that is recorded."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        check_engine(vllm_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        own = options(extra)
        on_cpu = role == KVConnectorRole.WORKER and current_platform.is_cpu()
        with quiet_nixl(int(own["eldr_nixl_delay_us"])) if on_cpu else nullcontext():
            super().__init__(vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.WORKER:
            self._counter: ExpertCounter | None = None
            self._guard = PullGuard(time.time)
            return
        group = full_attention_group(kv_cache_config)
        self._group = group
        speculation = vllm_config.speculative_config
        reports = report_options(extra)
        if reports is not None and speculation is not None:
            raise UnsupportedError(
                f"{REPORTS} cannot be used with speculative decoding: generated tokens cannot be told from drafts"
            )
        self._reporter = None if reports is None else Reporter(reports)
        self._tracker = RequestTracker(
            group,
            kv_cache_config.kv_cache_groups[group].kv_cache_spec.block_size,
            draft_tokens=speculation.num_speculative_tokens if speculation is not None else 0,
            reports=self._reporter,
        )
        self._lease_s = float(extra.get("kv_lease_duration", 30))
        self._margin_s = own["eldr_lease_margin_s"]
        self._deadlines_unix_s: dict[str, float | None] = {}

    # ---- scheduler ----

    def on_new_request(self, request: Request) -> None:
        super().on_new_request(request)
        params = request.kv_transfer_params
        self._tracker.arrived(request.request_id, request.num_prompt_tokens, params)
        if params and params.get("do_remote_prefill"):
            self._deadlines_unix_s[request.request_id] = deadline_unix_s(
                params.get("eldr_lease"), time.time(), self._margin_s
            )

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        self._tracker.looked_up(request.request_id, num_computed_tokens)
        matched: tuple[int | None, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return matched

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        own_blocks = blocks.get_block_ids()[self._group]
        self._tracker.allocated(request.request_id, own_blocks, load=num_external_tokens > 0)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        metadata = super().build_connector_meta(scheduler_output)
        plan = self._tracker.plan(scheduler_output)
        for request_id, pull in metadata.reqs_to_recv.items():
            # The other pulls only tell the prefill worker to free its blocks.
            if pull.awaiting_kvs and request_id in self._deadlines_unix_s:
                plan.deadlines_unix_s[request_id] = self._deadlines_unix_s[request_id]
        metadata.eldr = plan
        return metadata

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        super().update_connector_output(connector_output)
        result = connector_output.kv_connector_worker_meta
        if isinstance(result, StepResult):
            self._tracker.received(result)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        held, params = super().request_finished_all_groups(request, block_ids)
        self._deadlines_unix_s.pop(request.request_id, None)
        answer = self._tracker.finished(request.request_id, request.num_output_tokens, params)
        if held and answer is not None and answer.get("do_remote_prefill"):
            answer["eldr_lease"] = grant(self._lease_s, time.time())
        return held, answer

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    # ---- worker ----

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        super().register_kv_caches(kv_caches)
        size = sum({cache.data_ptr(): cache.nbytes for cache in kv_caches.values()}.values())
        device = next(iter(kv_caches.values())).device
        self._counter = make_counter(self._vllm_config, self._kv_cache_config, size, device)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Called once per step, before its forward pass."""
        super().bind_connector_metadata(connector_metadata)
        if self._counter is not None:
            self._counter.begin_step()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        self._guard.admit(metadata.reqs_to_recv, self._plan().deadlines_unix_s)
        super().start_load_kv(forward_context, **kwargs)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Called once per step, after its forward pass and before its statistics are read."""
        results = super().get_transfer_results(finished_req_ids)
        self._guard.settle(results)
        if self._counter is not None:
            self._counter.count(self._plan())
        return results

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        nixl = super().get_kv_connector_stats()
        if self.role == KVConnectorRole.SCHEDULER:
            return nixl if self._reporter is None else EldrStats.of(nixl, reports=self._reporter.take_outcomes())
        if self._counter is None:
            return nixl
        stats = EldrStats.of(nixl, self._counter.take_distinct(), self._guard.events)
        self._guard.events.clear()
        return stats

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        return self._counter.take_result() if self._counter is not None else None

    def _plan(self) -> StepPlan:
        plan: StepPlan = self._get_connector_metadata().eldr
        return plan

    # ---- statistics ----

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return EldrStats(data=data) if data is not None else EldrStats()

    @classmethod
    def build_prom_metrics(cls, *args: Any, **kwargs: Any) -> KVConnectorPromMetrics:
        return EldrPromMetrics(*args, **kwargs)


# For configurations with the path of this module, where VLLM_PLUGINS leaves the plugin out. MultiConnector looks up the
# name whenever statistics arrive.
register()
