"""Reports active experts, refused pulls and sent reports in vLLM's own statistics, next to those of NIXL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats, NixlPromMetrics
from vllm.v1.metrics.utils import create_metric_per_engine

from eldr.engines.vllm.reports import OUTCOMES

ACTIVE = "eldr_active_experts"
REFUSED = "eldr_refused_pulls"
REPORTS = "eldr_reports"
REFUSAL_REASONS = ("no_lease", "expired_before_pull", "expired_during_pull")
_BUCKETS = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]


@dataclass
class EldrStats(NixlKVConnectorStats):
    """NIXL's statistics of an interval, plus ours.

    data[ACTIVE]: distinct experts, one number for each decode step and MoE layer. data[REFUSED]: reasons, one for each
    pull that the lease ruled out. data[REPORTS]: outcomes of reports of finished requests, with how many had each.
    """

    @classmethod
    def of(
        cls,
        nixl: NixlKVConnectorStats | None,
        active_experts: Sequence[int] = (),
        refused: Mapping[str, int] = MappingProxyType({}),
        *,
        reports: Mapping[str, int] = MappingProxyType({}),
    ) -> EldrStats | None:
        """Return the statistics of an interval, or None if nothing happened in it."""
        stats = cls()
        if nixl is not None:
            stats.aggregate(nixl)
        stats.data[ACTIVE] += active_experts
        for reason, times in refused.items():
            stats.data[REFUSED] += [reason] * times
        stats.data[REPORTS] += [list(outcome) for outcome in reports.items()]
        return None if stats.is_empty() else stats

    def reset(self) -> None:
        super().reset()
        self.data |= {ACTIVE: [], REFUSED: [], REPORTS: []}

    def is_empty(self) -> bool:
        return super().is_empty() and not any(self.data[own] for own in (ACTIVE, REFUSED, REPORTS))

    def reduce(self) -> dict[str, int | float]:
        active = self.data[ACTIVE]
        mean = {"Mean active experts": round(sum(active) / len(active), 2)} if active else {}
        return {**super().reduce(), **mean, "Num pulls refused by lease": len(self.data[REFUSED])}


class EldrPromMetrics(NixlPromMetrics):
    """Exports vllm:eldr_active_experts and vllm:eldr_refused_pulls at vLLM's /metrics."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        active = self._histogram_cls(
            name=f"vllm:{ACTIVE}",
            documentation="Distinct experts that the generated tokens of one step activate in one MoE layer; "
            "one observation for each decode step and MoE layer.",
            buckets=_BUCKETS,
            labelnames=self._labelnames,
        )
        self._active = create_metric_per_engine(active, self.per_engine_labelvalues)
        refused = self._counter_cls(
            name=f"vllm:{REFUSED}",
            documentation="Pulls refused or discarded because the prefill worker's lease no longer covered them.",
            labelnames=[*self._labelnames, "reason"],
        )
        self._refused = {
            reason: create_metric_per_engine(
                refused, {engine: [*values, reason] for engine, values in self.per_engine_labelvalues.items()}
            )
            for reason in REFUSAL_REASONS
        }

        reports = self._counter_cls(
            name=f"vllm:{REPORTS}",
            documentation="Finished requests that were drawn to be reported to the router, by what became of it.",
            labelnames=[*self._labelnames, "outcome"],
        )
        self._reports = {
            outcome: create_metric_per_engine(
                reports, {engine: [*values, outcome] for engine, values in self.per_engine_labelvalues.items()}
            )
            for outcome in OUTCOMES
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        super().observe(transfer_stats_data, engine_idx)
        for experts in transfer_stats_data[ACTIVE]:
            self._active[engine_idx].observe(experts)
        for reason in transfer_stats_data[REFUSED]:
            self._refused[reason][engine_idx].inc()
        for outcome, times in transfer_stats_data[REPORTS]:
            self._reports[outcome][engine_idx].inc(times)
