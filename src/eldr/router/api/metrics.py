"""GET /metrics: the counters and the state of the fleet in Prometheus' exposition format."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from eldr.policies.base import Picture
from eldr.router.config.endpoint import LEGS, ROLES
from eldr.router.config.settings import RouterConfig
from eldr.router.fleet.workers import Fleet
from eldr.router.http.body_memory import BodyMemory
from eldr.router.http.media_types import accepts
from eldr.router.observe.counters import Histogram, Metrics
from eldr.router.observe.decision_log import DecisionLog
from eldr.router.peers.peers import Peers
from eldr.router.placement.admission import Admission
from eldr.router.placement.lanes import Lanes
from eldr.router.protocols import openai
from eldr.router.request.quotas import KINDS, REQUESTS, TOKENS, Quotas

OPENMETRICS_TYPE = b"application/openmetrics-text"
OPENMETRICS = f"{OPENMETRICS_TYPE.decode()}; version=1.0.0"
# How often the exposition is rendered: this many times in a burst, and this many per second in the long run. Rendering
# takes milliseconds in which no token moves, so a client that asks more often gets the previous text again.
FRESH_BURST = 50
FRESH_PER_S = 5.0

# The labels of fault counters. Their series exist from the start, because Prometheus's rate() misses the count with
# which a series begins, and for a rare fault that is the one that matters.
ENDPOINTS = tuple(path.decode() for path in openai.ENDPOINTS)
STATUSES = (200, 400, 429, 500, 502, 503, 504)
QUEUE_REFUSALS = ("full", "displaced", "timeout")
COUNTS_ERRORS = ("missing", "unavailable", "malformed", "version", "inconsistent")
FAILURES = ("refused", "failed", "status", "wrong_answer", "timeout", "broken_stream", "transfer")
EJECTIONS = ("consecutive", "rate", "trial")
RETRIES = ("refused", "failed", "status", "overloaded", "wrong_answer", "timeout", "lease", "unserved")
PEER_FRAMES = ("events", "heartbeat", "snapshot", "ask", "bye", "taught")
SOURCES = ("dns", "kubernetes")
TIMEOUTS = ("connect", "prefill", "first_byte", "answer", "idle", "total")


class RouterCollector(Collector):
    """Turns the counters and the state of the fleet into metric families."""

    def __init__(
        self,
        metrics: Metrics,
        fleet: Fleet,
        admission: Admission,
        lanes: Lanes,
        memory: BodyMemory,
        decision_log: DecisionLog | None,
        quotas: Quotas,
        peers: Peers | None,
        config: RouterConfig,
    ) -> None:
        self._config = config
        self._peers = peers
        self._decision_log = decision_log
        self._lanes = lanes
        self._memory = memory
        self._metrics = metrics
        self._fleet = fleet
        self._admission = admission
        self._fresh = float(FRESH_BURST)
        self._fresh_at_s = time.monotonic()
        self._written: dict[tuple[str, bool], bytes] = {}  # by content type, and whether clients are named
        self._registries = {named: CollectorRegistry() for named in (False, True)}
        for registry in self._registries.values():
            registry.register(self)
            ProcessCollector(registry=registry)
        self._registries[True].register(ClientCollector(quotas))

    def exposition(self, accept: bytes, named: bool) -> tuple[bytes, str]:
        """Return the text of all metrics and its content type, in the format that an Accept header asks for.

        named: whether to include the metrics of clients, which show their names.
        """
        # Do not pass the header itself: prometheus_client echoes versions that it does not know.
        encode, content_type = choose_encoder(OPENMETRICS if accepts(accept, OPENMETRICS_TYPE) else "")
        now_s = time.monotonic()
        self._fresh = min(FRESH_BURST, self._fresh + (now_s - self._fresh_at_s) * FRESH_PER_S)
        self._fresh_at_s = now_s
        key = content_type, named
        if self._fresh >= 1 or key not in self._written:
            self._fresh -= 1
            self._written[key] = encode(self._registries[named])
        return self._written[key], content_type

    def collect(self) -> Iterator[Metric]:
        m = self._metrics
        requests = _from_zero(product(ENDPOINTS, STATUSES), m.requests)
        yield counter("eldr_request", "Requests answered.", ("endpoint", "status"), requests)
        yield counter(
            "eldr_client_disconnects", "Clients that left before the end of their answer.", (), {(): m.disconnects}
        )
        yield counter("eldr_decisions", "Decode workers chosen.", ("policy", "reason"), m.decisions)
        yield counter("eldr_policy_errors", "Failures of the policy, replaced by jsq.", (), {(): m.policy_errors})
        yield counter("eldr_handoffs", "Prefill answers with a hand-off.", (), {(): m.handoffs})
        errors = _from_zero(COUNTS_ERRORS, m.counts_errors)
        yield counter("eldr_counts_errors", "Hand-offs without usable expert counts.", ("reason",), errors)
        reports = _from_zero((), m.expert_reports)
        yield counter(
            "eldr_expert_reports", "Experts of finished requests that became known.", ("source", "outcome"), reports
        )
        yield counter("eldr_passthrough", "Requests that could not be handed off.", ("reason",), m.passthrough)
        retries = _from_zero(product(LEGS, RETRIES), m.retries)
        yield counter("eldr_retries", "Legs that were tried again.", ("leg", "reason"), retries)
        denied = _from_zero(product(LEGS, ("tries", "budget")), m.retries_denied)
        yield counter("eldr_retries_denied", "Failed legs that were not tried again.", ("leg", "reason"), denied)
        yield counter("eldr_timeouts", "Deadlines that passed.", ("leg",), _from_zero(TIMEOUTS, m.timeouts))
        sources = _from_zero(SOURCES, m.discovery_failures)
        yield counter("eldr_discovery_failures", "Looks for workers that failed.", ("source",), sources)
        yield counter("eldr_prefill_spills", "Prefills that left a full worker.", (), {(): m.prefill_spills})
        yield counter(
            "eldr_prompt_tokens", "Estimated tokens of prompts sent to aggregated workers.", (), {(): m.prompt_tokens}
        )
        yield counter(
            "eldr_prompt_tokens_cached",
            "Estimated tokens among them that the worker had in its prefix cache.",
            (),
            {(): m.prompt_tokens_cached},
        )
        yield counter("eldr_broken_streams", "Streams that a worker did not finish.", (), {(): m.broken_streams})
        yield counter("eldr_stream_events", "Server-sent events forwarded to clients.", (), {(): m.stream_events})
        decisions = self._decision_log
        written, dropped = (0, 0) if decisions is None else (decisions.written, decisions.dropped)
        yield counter("eldr_decision_log_lines", "Lines written to the decision log.", (), {(): written})
        yield counter(
            "eldr_decision_log_dropped",
            "Lines that the decision log lost because its file could not be written fast enough.",
            (),
            {(): dropped},
        )
        yield from self._refit_families()
        yield from self._learning_families()
        yield _histogram(
            m.ttft, "eldr_time_to_first_token_seconds", "Streams: from request received to first token forwarded."
        )
        yield _histogram(
            m.tpot, "eldr_time_per_output_token_seconds", "Streams: mean time between tokens of a request."
        )
        yield _histogram(m.itl, "eldr_inter_token_latency_seconds", "Streams: time between two forwarded pieces.")
        yield _histogram(m.prefill, "eldr_prefill_seconds", "From prefill request sent to hand-off received.")
        yield _histogram(m.queue, "eldr_queue_seconds", "Wait for a decode slot, for requests that waited.")
        queued = GaugeMetricFamily("eldr_queued", "Requests waiting for a decode slot.", labels=("priority",))
        for priority, count in self._admission.queued_by_priority.items():
            queued.add_metric((priority,), count)
        yield queued
        refusals = _from_zero(QUEUE_REFUSALS, self._admission.refusals)
        yield counter("eldr_queue_refusals", "Requests that got no turn in the queue.", ("reason",), refusals)
        tasks = len(asyncio.all_tasks())
        yield GaugeMetricFamily("eldr_tasks", "Tasks of the event loop: one per request, some per worker.", value=tasks)
        memory = self._memory
        yield GaugeMetricFamily(
            "eldr_bodies_bytes", "Memory of the bodies of requests and answers.", value=memory.held_bytes
        )
        no_room = {"request": memory.refused_requests, "answer": memory.refused_answers}
        yield counter("eldr_bodies_refused", "Bodies that found no room in memory.", ("body",), no_room)
        yield GaugeMetricFamily("eldr_admitted", "Requests past the queue.", value=self._admission.admitted)
        yield from self._model_families()
        yield self._roles()
        if self._peers is not None:
            yield from self._peer_families(self._peers)
        yield from self._worker_families()
        yield from self._worker_faults()

    def _learning_families(self) -> Iterator[Metric]:
        m = self._metrics
        fits = _from_zero(("adopted", "kept", "failed"), m.learning)
        yield counter("eldr_learning_fits", "Fits of the models that are learned.", ("outcome",), fits)
        if m.learning:
            yield GaugeMetricFamily(
                "eldr_learning_fit_duration_seconds", "Duration of the last fit.", value=m.learning_duration_s
            )
            yield GaugeMetricFamily(
                "eldr_prompt_model_r2",
                "Share of the variance of profiles that prompts' words explain, cross-validated.",
                value=m.learning_r2,
            )
        if m.learning_trust is not None:
            yield GaugeMetricFamily(
                "eldr_activation_trust",
                "Share of what was learned about counts by which predictions are corrected.",
                value=m.learning_trust,
            )

    def _refit_families(self) -> Iterator[Metric]:
        m = self._metrics
        refits = _from_zero(("applied", "failed"), m.refits)
        yield counter("eldr_zone_refits", "Background refits of zones.", ("outcome",), refits)
        yield counter(
            "eldr_zones_moved", "Zones that a refit moved nearer to another's old place.", (), {(): m.zones_moved}
        )
        if m.last_refit_s is not None:
            age_s = time.monotonic() - m.last_refit_s
            yield GaugeMetricFamily("eldr_zone_refit_age_seconds", "Time since zones were last refitted.", value=age_s)
            yield GaugeMetricFamily(
                "eldr_zone_refit_duration_seconds", "Duration of the last refit.", value=m.refit_duration_s
            )
            yield GaugeMetricFamily(
                "eldr_zone_refit_shift", "Mean cosine distance that the last refit moved zones.", value=m.refit_shift
            )

    def _peer_families(self, peers: Peers) -> Iterator[Metric]:
        others, counters = peers.others, peers.counters
        yield GaugeMetricFamily(
            "eldr_peers_reachable", "Whether other replicas can be heard. If not, they are unknown.", value=peers.up
        )
        states = GaugeMetricFamily("eldr_peers", "Other replicas that were heard lately.", labels=("state",))
        states.add_metric(("synced",), others.synced)
        states.add_metric(("resyncing",), len(others) - others.synced)
        yield states
        running = GaugeMetricFamily(
            "eldr_inflight_elsewhere", "Requests in flight at the worker for other replicas.", labels=("role", "worker")
        )
        for worker in self._fleet.workers("decode").values():
            running.add_metric((worker.role, worker.url), worker.elsewhere)
        yield running
        received = _from_zero(PEER_FRAMES, counters.received)
        yield counter("eldr_peer_frames_received", "Frames of other replicas.", ("kind",), received)
        for name, text, value in (
            ("eldr_peer_frames_sent", "Frames to other replicas.", counters.sent),
            ("eldr_peer_sent_bytes", "Bytes of the frames to other replicas.", counters.sent_bytes),
            ("eldr_peer_frames_lost", "Frames to other replicas that could not be sent.", counters.lost),
            ("eldr_peer_frames_refused", "Frames of others beyond what is believed.", counters.refused),
            ("eldr_peer_gaps", "Times that something of another replica was missed.", counters.gaps),
            ("eldr_peer_resyncs", "Snapshots of other replicas that were taken over.", counters.resyncs),
            ("eldr_peers_expired", "Other replicas that were not heard any more.", counters.expired),
        ):
            yield counter(name, text, (), {(): value})

    def _model_families(self) -> Iterator[Metric]:
        workers = GaugeMetricFamily(
            "eldr_model_workers", "Available workers that serve the model.", labels=("model", "role")
        )
        for served in self._fleet.listed():
            for leg in LEGS:
                available = sum(worker.available for worker in served.workers(leg))
                workers.add_metric((served.name, served.role(leg)), available)
        yield workers
        policies = GaugeMetricFamily(
            "eldr_model_policy", "The policy that places the model's requests.", labels=("model", "policy")
        )
        for lane in self._lanes:
            policies.add_metric((lane.group.name, lane.placements.policy_name), 1)
        yield policies

    def _roles(self) -> Metric:
        present = {worker.role for leg in LEGS for worker in self._fleet.workers(leg).values()}
        needed = self._config.needed_roles(present)
        family = GaugeMetricFamily(
            "eldr_role_needed", "Whether requests cannot be answered without a worker of the role.", labels=("role",)
        )
        for role in ROLES:
            family.add_metric((role,), role in needed)
        return family

    def _worker_families(self) -> Iterator[Metric]:
        labels = ("role", "worker")
        up = GaugeMetricFamily("eldr_worker_up", "Whether the worker answers its probes.", labels=labels)
        ejected = GaugeMetricFamily("eldr_worker_ejected", "Whether the worker is out of service.", labels=labels)
        in_flight = GaugeMetricFamily("eldr_inflight", "Requests in flight at the worker.", labels=labels)
        limit = GaugeMetricFamily("eldr_inflight_limit", "Limit on requests in flight at the worker.", labels=labels)
        skew = GaugeMetricFamily(
            "eldr_worker_clock_skew_seconds", "The worker's clock minus the router's, to a second.", labels=labels
        )
        waiting = GaugeMetricFamily("eldr_worker_waiting", "Requests waiting inside the worker.", labels=labels)
        kv_usage = GaugeMetricFamily("eldr_worker_kv_usage_ratio", "KV cache in use at the worker.", labels=labels)
        tpot = GaugeMetricFamily(
            "eldr_worker_time_per_output_token_seconds", "Mean over the worker's last streams.", labels=labels
        )
        active = GaugeMetricFamily(
            "eldr_active_experts",
            "Distinct experts of a decode step in a layer, as the worker measured.",
            labels=labels,
        )
        expected = GaugeMetricFamily(
            "eldr_expected_active_experts", "Distinct experts per layer, as expected of the next step.", labels=labels
        )
        step = GaugeMetricFamily(
            "eldr_worker_step_seconds", "Time of the worker's mean step, as learned from its reports.", labels=labels
        )
        relative = GaugeMetricFamily(
            "eldr_worker_step_relative", "Time of its step over that of the median worker, as learned.", labels=labels
        )
        parts = GaugeMetricFamily(
            "eldr_worker_step_cost_seconds",
            "What a step takes for its base, and for each expert, token and token of context, as learned.",
            labels=(*labels, "part"),
        )
        for group, url, learned in self._lanes.learned_costs():
            decoding = (group.whole.role("decode"), url)
            step.add_metric(decoding, learned.step_s)
            relative.add_metric(decoding, learned.relative)
            cost = learned.cost.times(learned.unit)
            for part, seconds in (
                ("base", cost.base_s),
                ("expert", cost.per_expert_s),
                ("token", cost.per_token_s),
                ("context", cost.per_context_token_s),
            ):
                parts.add_metric((*decoding, part), seconds)
        for group, picture in self._lanes.pictures():
            for url, experts in expected_active_experts(picture).items():
                expected.add_metric((group.whole.role("decode"), url), experts)
        for role in ROLES:
            for worker in self._fleet.of_role(role):
                key = (role, worker.url)
                up.add_metric(key, worker.healthy)
                ejected.add_metric(key, worker.ejected or worker.on_trial)
                in_flight.add_metric(key, worker.in_flight)
                if worker.leg == "decode":
                    limit.add_metric(key, worker.max_inflight)
                if worker.load is not None:
                    waiting.add_metric(key, worker.load[0])
                    kv_usage.add_metric(key, worker.load[1])
                if worker.active_experts is not None:
                    active.add_metric(key, worker.active_experts)
                if worker.tpot_s is not None:
                    tpot.add_metric(key, worker.tpot_s)
                if worker.clock_skew_s is not None:
                    skew.add_metric(key, worker.clock_skew_s)
        yield from (up, ejected, in_flight, limit, waiting, kv_usage, skew, tpot, active, expected)
        yield from (step, relative, parts)

    def _worker_faults(self) -> Iterator[Metric]:
        here = [(role, worker.url) for role in ROLES for worker in self._fleet.of_role(role)]
        for name, text, reasons, counts in (
            ("eldr_worker_failures", "Legs that failed through the worker's fault.", FAILURES, self._metrics.failures),
            ("eldr_ejections", "Workers taken out of service for their failures.", EJECTIONS, self._metrics.ejections),
        ):
            values = {(*worker, reason): counts.get((*worker, reason), 0) for worker in here for reason in reasons}
            yield counter(name, text, ("role", "worker", "reason"), values)


class ClientCollector(Collector):
    """What each client with a name has used. The names are the operator's, so only the admin key shows them."""

    def __init__(self, quotas: Quotas) -> None:
        self._quotas = quotas

    def collect(self) -> Iterator[Metric]:
        quotas = self._quotas.clients
        requests = {client: quota.used[REQUESTS] for client, quota in quotas.items()}
        yield counter("eldr_client_requests", "Requests that the client's quota let in.", ("client",), requests)
        tokens = {client: quota.used[TOKENS] for client, quota in quotas.items()}
        yield counter("eldr_client_tokens", "Tokens of the client's prompts and answers.", ("client",), tokens)
        refused = {(client, kind): quota.refused[kind] for client, quota in quotas.items() for kind in KINDS}
        yield counter("eldr_client_refusals", "Requests beyond the client's quota.", ("client", "limit"), refused)


def expected_active_experts(picture: Picture) -> dict[str, float]:
    """Decode worker -> expected distinct experts of a step, averaged over layers. Empty if the policy expects none."""
    if picture.kind != "expected_union":
        return {}
    return {worker: sum(row) / len(row) for worker, row in picture.rows.items()}


def counter(name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, int]) -> CounterMetricFamily:
    """A counter with the value of each combination of its labels: a tuple, or one label's value by itself."""
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric([str(part) for part in (key if isinstance(key, tuple) else (key,))], value)
    return family


def _from_zero(known: Iterable[Any], counts: Mapping[Any, int]) -> dict[Any, int]:
    """Return the counts, with zeros for label values in `known` that have none yet."""
    return {**dict.fromkeys(known, 0), **counts}


def _histogram(histogram: Histogram, name: str, text: str) -> HistogramMetricFamily:
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.sum)
