"""The data of the page as one JSON object: the fleet, the counters, the policy's picture and the last decisions."""

from __future__ import annotations

import time
from typing import Any

import orjson

import eldr
from eldr.policies.worker_costs import LearnedCost
from eldr.router.api.metrics import expected_active_experts
from eldr.router.config.endpoint import ROLES
from eldr.router.fleet.groups import ModelGroup
from eldr.router.fleet.workers import Worker
from eldr.router.observe.counters import Histogram, Metrics
from eldr.router.peers.peers import Peers
from eldr.router.request.services import Services

DECISIONS = 60


class UiState:
    """Returns the current state. The page computes rates and quantiles itself, from the differences of two states."""

    def __init__(self, services: Services, peers: Peers | None) -> None:
        self._services = services
        self._peers = peers
        self._started_s = time.monotonic()

    def json(self) -> bytes:
        services = self._services
        metrics, admission, fleet = services.metrics, services.admission, services.fleet
        pictures = [picture for _, picture in services.lanes.pictures()]
        expected = {url: value for picture in pictures for url, value in expected_active_experts(picture).items()}
        costs = {url: learned for _, url, learned in services.lanes.learned_costs()}
        state: dict[str, Any] = {
            "unix_s": time.time(),
            "up_s": time.monotonic() - self._started_s,
            "version": eldr.__version__,
            "policy": services.config.placement.policy,
            "totals": _totals(metrics),
            "queue": {"admitted": admission.admitted, "queued": admission.queued, "slots": fleet.decode_slots},
            "peers": None if self._peers is None else _peers(self._peers),
            "histograms": {
                "ttft": _histogram(metrics.ttft),
                "tpot": _histogram(metrics.tpot),
                "itl": _histogram(metrics.itl),
            },
            "workers": [
                _worker(worker, fleet.group(worker), expected.get(worker.url), costs.get(worker.url))
                for role in ROLES
                for worker in fleet.of_role(role)
            ],
            "pictures": [
                {"kind": picture.kind, "most": picture.most, "rows": dict(picture.rows)}
                for picture in pictures
                if picture.rows
            ],
            "decisions": [placed._asdict() for placed in list(services.lanes.recent)[: -DECISIONS - 1 : -1]],
            "reasons": [
                {"policy": policy, "reason": reason, "count": count}
                for (policy, reason), count in sorted(metrics.decisions.items(), key=lambda item: -item[1])
            ],
        }
        return orjson.dumps(state)


def _totals(metrics: Metrics) -> dict[str, int]:
    return {
        "answered": sum(metrics.requests.values()),
        "failed": sum(count for (_, status), count in metrics.requests.items() if status >= 500),
        "events": metrics.stream_events,
        "handoffs": metrics.handoffs,
        "unusable": sum(metrics.counts_errors.values()),
        "retries": sum(metrics.retries.values()),
        "ejections": sum(metrics.ejections.values()),
        "broken": metrics.broken_streams,
    }


def _peers(peers: Peers) -> dict[str, Any]:
    others = peers.others
    return {"reachable": peers.up, "others": len(others), "synced": others.synced, "running": peers.elsewhere.running}


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {"bounds": histogram.bounds, "counts": histogram.counts}


def _worker(
    worker: Worker, group: ModelGroup | None, expected_experts: float | None, cost: LearnedCost | None
) -> dict[str, Any]:
    return {
        "url": worker.url,
        "role": worker.role,
        "model": "" if group is None else group.name,
        "state": worker.state,
        "problem": worker.problem,
        "in_flight": worker.in_flight,
        "elsewhere": worker.elsewhere,
        "max_inflight": worker.max_inflight,
        "kv_usage": None if worker.load is None else worker.load[1],
        "tpot_s": worker.tpot_s,
        "step_s": None if cost is None else cost.step_s,
        "step_relative": None if cost is None else cost.relative,
        "active_experts": worker.active_experts,
        "expected_experts": expected_experts,
    }
