"""The metrics of the component, under the names that the router gives them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from eldr.router.api.metrics import counter, expected_active_experts
from eldr.router.config.endpoint import LEGS
from eldr.router.fleet.workers import Fleet
from eldr.router.observe.counters import Metrics
from eldr.router.placement.lanes import Lanes


class ComponentCollector(Collector):
    """Turns the counters and the state of the fleet into metric families."""

    def __init__(self, metrics: Metrics, fleet: Fleet, lanes: Lanes) -> None:
        self._metrics = metrics
        self._fleet = fleet
        self._lanes = lanes
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def exposition(self) -> str:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry).decode()

    def collect(self) -> Iterator[Metric]:
        m = self._metrics
        yield counter("eldr_decisions", "Decode workers chosen.", ("policy", "reason"), m.decisions)
        yield counter("eldr_policy_errors", "Failures of the policy, replaced by jsq.", (), {(): m.policy_errors})
        yield counter("eldr_handoffs", "Decode requests with a hand-off.", (), {(): m.handoffs})
        yield counter("eldr_counts_errors", "Hand-offs without usable expert counts.", ("reason",), m.counts_errors)
        yield counter("eldr_retries", "Legs that were tried again.", ("leg", "reason"), m.retries)
        yield counter("eldr_prefill_spills", "Prefills that left a full worker.", (), {(): m.prefill_spills})
        yield counter("eldr_broken_streams", "Streams that a worker did not finish.", (), {(): m.broken_streams})
        yield counter("eldr_learning_fits", "Fits of the models that are learned.", ("outcome",), m.learning)
        yield counter("eldr_zone_refits", "Background refits of zones.", ("outcome",), m.refits)
        labels = ("role", "worker", "reason")
        yield counter("eldr_worker_failures", "Legs that failed through the worker's fault.", labels, m.failures)
        yield counter("eldr_ejections", "Workers taken out of service for their failures.", labels, m.ejections)
        yield from self._worker_families()

    def _worker_families(self) -> Iterator[Metric]:
        labels = ("role", "worker")
        in_flight = GaugeMetricFamily("eldr_inflight", "Requests in flight at the worker.", labels=labels)
        ejected = GaugeMetricFamily("eldr_worker_ejected", "Whether the worker is out of service.", labels=labels)
        expected = GaugeMetricFamily(
            "eldr_expected_active_experts", "Distinct experts per layer, as expected of the next step.", labels=labels
        )
        for leg in LEGS:
            for worker in self._fleet.workers(leg).values():
                in_flight.add_metric((leg, worker.url), worker.in_flight)
                ejected.add_metric((leg, worker.url), worker.ejected or worker.on_trial)
        for _, picture in self._lanes.pictures():
            for url, experts in expected_active_experts(picture).items():
                expected.add_metric(("decode", url), experts)
        yield from (in_flight, ejected, expected)
