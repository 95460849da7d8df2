"""Compares policies on a trace. For each seed, every policy gets the same arrivals, draws and split."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.calibration import Calibration, fit_calibration, with_prompt_zones
from eldr.policies import POLICY_NAMES, PolicyOptions, make_policy
from eldr.policies.base import Policy
from eldr.policies.refit import RefitSchedule
from eldr.replay.calibrations import check_calibration
from eldr.replay.changes import FleetChange, Slowdown
from eldr.replay.engine import Engine
from eldr.replay.errors import ReplayError
from eldr.replay.fleet import FleetSpec
from eldr.replay.host_memory import CacheShape, HostComputed, HostLayout, HostMemory, most_used
from eldr.replay.learning import SimulatedLearning
from eldr.replay.measurements import RunResult
from eldr.replay.oracle import Clairvoyant, ToldProfiles
from eldr.replay.packed import PackedTrace, pack_trace
from eldr.replay.prompts import RecordedPrompts, SharedPrefixes, draw_prompts
from eldr.replay.ranks import ExpertParallel, ranks_of
from eldr.replay.reading import ReadingMaker, distinct_experts
from eldr.replay.refits import SimulatedRefits
from eldr.replay.replicas import Replica, Replicas, Sharing
from eldr.replay.split import Mix, Split, split_trace, take_requests
from eldr.replay.step_costs import SimulatedCosts
from eldr.replay.worker import WorkerLimits, worker_name
from eldr.replay.workload import (
    ServedKind,
    Workload,
    draw_order,
    mixed_draw_order,
    poisson_arrivals,
    traced_arrivals,
)
from eldr.trace import Trace
from eldr.zones import balanced_kmeans

BASELINES = ("rr", "random", "p2c", "jsq")
# A load balancer too, but on equal workers the same as jsq. It is compared where workers differ, or when asked for.
SPEED_BASELINE = "jsq-speed"
# Policies that exist only in the replay: expected-union without a calibration, expected-union with true profiles, and
# greedy with full knowledge. locality-band-refit is locality-band with background refits, even if no interval is given.
LAB_POLICIES = ("locality-band-refit", "expected-union-own", "expected-union-true", "clairvoyant")
CALIBRATED = ("locality-band", "locality-band-refit", "expected-union")
REFIT_INTERVAL_S = 2.5
# Requests that warm the fleet up, and that keep it loaded at the end, in multiples of the expected number in flight.
WARM_UP, COOL_DOWN = 2.0, 1.25
# Whether models are learned while serving. They then begin with the policy's fitted ones, if it has some.
LEARN = ("off", "online")
# Routers draw from seeds that are this far apart. The first one's is the seed of the run.
ROUTER_SEEDS = 10_000
RATE_TOLERANCE = 0.01
RATE_TRIALS = 8


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings that all policies, fleet sizes and seeds of a comparison share.

    requests: measured requests per run. Those of warm-up and cool-down come on top.
    max_output: cuts each request after this many generated tokens. None for no limit.
    mix: how the trace is split.
    limits: the capacity of each worker.
    recorded_arrivals_s: float64 [n], arrival times whose rhythm replaces the Poisson process.
    options: policy options. Their costs also apply to the simulated workers w0, w1, ...
    learn_costs: whether policies learn the step times of single workers from their reports, instead of being told
        `options.worker_costs`.
    kinds: the shares of the kinds of requests served. Empty draws from all served requests alike.
    fleet_changes: workers that join or leave during the measured run.
    slowdowns: workers that slow down for a while.
    learn: one of LEARN: whether policies learn from finished requests.
    learn_share: the share of the finished requests whose experts become known.
    aggregated: whether every worker also computes the prompts of its requests, `options.prefill_chunk` tokens a step.
    recorded_prompts: prompts whose lengths, and shared blocks if they have any, replace those of the trace.
    shared_prefixes: prefixes that the prompts begin with. They have an effect on aggregated workers only.
    sharing: how many routers there are, and what they know of each other's requests.
    ranks: how the ranks of a worker share its experts, if `options.expert_parallel` is above 1.
    host_memory: how workers divide their experts between device and host. None if the device holds all.
    """

    requests: int = 2000
    max_output: int | None = None
    mix: Mix = field(default_factory=Mix)
    limits: WorkerLimits = field(default_factory=WorkerLimits)
    recorded_arrivals_s: NDArray[np.float64] | None = None
    options: PolicyOptions = field(default_factory=PolicyOptions)
    learn_costs: bool = False
    kinds: tuple[ServedKind, ...] = ()
    fleet_changes: tuple[FleetChange, ...] = ()
    slowdowns: tuple[Slowdown, ...] = ()
    learn: str = "off"
    learn_share: float = 1.0
    aggregated: bool = False
    recorded_prompts: RecordedPrompts | None = None
    shared_prefixes: SharedPrefixes | None = None
    sharing: Sharing = field(default_factory=Sharing)
    ranks: ExpertParallel = field(default_factory=ExpertParallel)
    host_memory: HostLayout | None = None

    @property
    def unequal(self) -> bool:
        """Whether workers differ in speed."""
        return bool(self.options.worker_costs or self.slowdowns)


class Laboratory:
    """A trace, its settings, and everything fitted on it, once per seed."""

    def __init__(self, trace: Trace, settings: Settings, calibration: Calibration | None = None) -> None:
        self.trace = trace
        self.settings = settings
        self.packed: PackedTrace = pack_trace(trace, settings.max_output)
        self._steps = np.array([self.packed.steps(index) for index in range(self.packed.requests)])
        self._given = calibration
        self._fitted: dict[int, Calibration] = {}
        self._profiles: NDArray[np.float32] | None = None
        self._splits: dict[int, Split] = {}
        settings.ranks.check(trace.meta.experts, settings.options.expert_parallel)
        if settings.host_memory is not None and settings.options.expert_parallel > 1:
            raise ReplayError("expert parallelism and experts in host memory are not simulated together")
        if self.packed.prompts is None and settings.options.signature == "prompt":
            raise ReplayError("the trace holds no prompts, so there are no words; record it with --keep-prompts")
        if calibration is not None:
            check_calibration(calibration, trace.meta)

    def with_options(self, **options: Any) -> Laboratory:
        """Return a laboratory with the same trace, splits and fits, but other policy options (tau, cost_scope, ...)."""
        return self.with_settings(
            dataclasses.replace(self.settings, options=dataclasses.replace(self.settings.options, **options))
        )

    def with_settings(self, settings: Settings) -> Laboratory:
        """Return a laboratory with the same trace, splits and fits, but other options, requests or learning."""
        other = copy.copy(self)
        other.settings = settings
        return other

    @property
    def packed_geometry(self) -> tuple[int, int, int]:
        return self.packed.layers, self.packed.experts, self.packed.top_k

    def split(self, seed: int) -> Split:
        if seed not in self._splits:
            rng = np.random.default_rng([seed, 0])
            self._splits[seed] = split_trace(self.packed.label, self._steps, self.settings.mix, rng)
        return self._splits[seed]

    def calibration(self, workers: int, seed: int) -> Calibration | None:
        """Return the given calibration, or fit one to the seed's calibration requests. None if there are none."""
        if self._given is not None:
            return self._given
        chosen = self.split(seed).calibrate
        if not len(chosen):
            return None
        if seed not in self._fitted:
            part = take_requests(self.trace, chosen)
            self._fitted[seed] = fit_calibration(part, workers, seed=seed, compare=False)
        fitted = self._fitted[seed]
        if fitted.workers != workers:  # only the zones depend on the number of workers
            signatures = fitted.signature.transform(self.trace.prefill_counts[chosen])
            zones = balanced_kmeans(signatures, workers, seed=seed)
            fitted = dataclasses.replace(fitted, centroids=zones.centroids, zone_sizes=zones.sizes)
            if fitted.prompts is not None:
                part = take_requests(self.trace, chosen)
                fitted = with_prompt_zones(fitted, part, part.decode_profiles(), seed)
            self._fitted[seed] = fitted
        return fitted

    def policy(self, name: str, workers: int, seed: int, router: int = 0) -> Policy:
        """Make a fresh policy for the router of this number.

        Raises PolicyError for an unknown name or a missing calibration.
        """
        if name == "clairvoyant":
            return Clairvoyant(self.packed)
        calibration = self.calibration(workers, seed) if name in CALIBRATED else None
        draws = seed + ROUTER_SEEDS * router
        if name == "expected-union-true":
            return self.told(self._true_profiles(), draws)
        plain = name.removesuffix("-own").removesuffix("-refit") if name in LAB_POLICIES else name
        return make_policy(plain, self._options(name), calibration=calibration, seed=draws)

    def told(self, profiles: NDArray[np.float32], seed: int) -> Policy:
        """Make a fresh expected-union that is told the profile of every request, float32 [N, D]."""
        layers, _, top_k = self.packed_geometry
        return ToldProfiles(profiles, layers, top_k, **self._options("").of_expected_union(), seed=seed)

    def _options(self, name: str) -> PolicyOptions:
        options = self.settings.options
        if self.settings.learn_costs:
            options = dataclasses.replace(options, worker_costs={})
        if name == "locality-band-refit" and not options.refits:
            return dataclasses.replace(options, refit_interval_s=REFIT_INTERVAL_S)
        return options

    def _true_profiles(self) -> NDArray[np.float32]:
        if self._profiles is None:
            self._profiles = self.trace.decode_profiles().reshape(self.packed.requests, -1)
        return self._profiles

    def workload(self, rate: float | None, in_flight: float, seed: int, requests: int | None = None) -> Workload:
        """Make a workload with arrivals at `rate` requests/s, of which about `in_flight` run at a time.

        Without a rate the loop is closed, and exactly so many run.
        """
        settings = self.settings
        measured = settings.requests if requests is None else requests
        warm_up = math.ceil(WARM_UP * in_flight) + 1
        count = warm_up + measured + math.ceil(COOL_DOWN * in_flight) + 1
        rng = np.random.default_rng([seed, 1])
        recorded = settings.recorded_arrivals_s
        arrival_s = None
        if rate is not None:
            if recorded is None:
                arrival_s = poisson_arrivals(rate, count, rng)
            else:
                arrival_s = traced_arrivals(recorded, rate, count)
        split = self.split(seed)
        if split.serve_before is None or settings.mix.switch_at is None:
            request = self._draw(split.serve, count, in_flight, rng)
        else:
            before = warm_up + round(measured * settings.mix.switch_at)
            request = np.concatenate(
                (
                    self._draw(split.serve_before, before, in_flight, rng),
                    self._draw(split.serve, count - before, in_flight, rng),
                )
            )
        changes: dict[int, int] = {}
        for change in settings.fleet_changes if requests is None else ():
            arrival = warm_up + round(change.at * measured)
            changes[arrival] = changes.get(arrival, 0) + change.workers
        slowdowns: dict[int, dict[str, float]] = {}
        for slowdown in settings.slowdowns if requests is None else ():
            for at, factor in ((slowdown.begins, slowdown.factor), (slowdown.ends, 1.0)):
                slowdowns.setdefault(warm_up + round(at * measured), {})[slowdown.worker] = factor
        prompt_rng = np.random.default_rng([seed, 3])
        replicas = settings.sharing.replicas
        router = None if replicas == 1 else np.random.default_rng([seed, 4]).integers(replicas, size=count)
        return Workload(
            arrival_s,
            request,
            range(warm_up, warm_up + measured),
            settings.max_output,
            fleet_changes=changes,
            slowdowns=slowdowns,
            aggregated=settings.aggregated,
            prompts=draw_prompts(settings.recorded_prompts, settings.shared_prefixes, count, prompt_rng),
            router=router,
            in_flight=round(in_flight),
        )

    def _draw(
        self, pool: NDArray[np.int64], count: int, in_flight: float, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        pools = self._pools_by_kind(pool)
        return mixed_draw_order(pools, count, in_flight, rng) if pools else draw_order(pool, count, in_flight, rng)

    def _pools_by_kind(self, pool: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], float]]:
        """Return (requests, share) for each kind of the settings that `pool` has."""
        labels = np.array(self.packed.label)[pool]
        pools = [(pool[np.isin(labels, kind.labels)], kind.share) for kind in self.settings.kinds]
        return [(requests, share) for requests, share in pools if len(requests)]

    def fleet(self, workers: int, reading: ReadingMaker = distinct_experts) -> FleetSpec:
        options, layers = self.settings.options, self.packed.layers
        models = [options.worker_costs.get(worker_name(index), options.cost) for index in range(workers)]
        return FleetSpec(
            tuple(model.step_cost(layers, options.cost_scope) for model in models),
            tuple(model.step_cost(layers, "moe") for model in models),
            dataclasses.replace(self.settings.limits, prefill_chunk=options.prefill_chunk),
            reading,
        )

    def reading(self, batch: float, seed: int) -> ReadingMaker:
        """What the steps of workers wait for. Experts are placed on ranks for batches of this size."""
        ranks, layout = self.settings.options.expert_parallel, self.settings.host_memory
        if ranks > 1:
            return ranks_of(self.packed, ranks, self.settings.ranks, self.split(seed).calibrate, batch, seed)
        if layout is None:
            return distinct_experts
        layers, experts, _ = self.packed_geometry
        ratio, capacity = layout.host.ratio, layout.host.capacity(experts)
        if layout.host.computed:
            resident = most_used(self._uses(seed), capacity)
            return lambda _: HostComputed(resident, ratio)
        shape = CacheShape(layers, experts, capacity, layout.by_frequency)
        return lambda _: HostMemory(shape, ratio)

    def _uses(self, seed: int) -> NDArray[np.float64]:
        """How often the decode steps of the seed's calibration requests activate each expert, float64 [L, E]."""
        calibrate = self.split(seed).calibrate
        if not len(calibrate):
            raise ReplayError(
                "which experts the device holds for good follows from the calibration requests, and there are none; "
                "raise the calibrate fraction"
            )
        layers, experts, _ = self.packed_geometry
        return np.asarray(self._true_profiles()[calibrate].sum(axis=0, dtype=np.float64).reshape(layers, experts))

    def run(
        self,
        name: str,
        workers: int,
        rate: float | None,
        batch: float,
        seed: int,
        requests: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> RunResult:
        """Run one policy once. batch: the mean batch expected at this rate, which sets warm-up, cool-down and draws."""
        policies = [self.policy(name, workers, seed, router) for router in range(self.settings.sharing.replicas)]
        return self._run(policies, workers, rate, batch, seed, requests, progress)

    def run_policy(
        self,
        policy: Policy,
        workers: int,
        rate: float | None,
        batch: float,
        seed: int,
        requests: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> RunResult:
        """Run a policy made elsewhere, which must be fresh, in a single router. The parameters are those of `run`."""
        return self._run([policy], workers, rate, batch, seed, requests, progress)

    def _run(
        self,
        policies: Sequence[Policy],
        workers: int,
        rate: float | None,
        batch: float,
        seed: int,
        requests: int | None,
        progress: Callable[[int], None] | None,
    ) -> RunResult:
        """Run a policy, of which every router has its own object."""
        workload = self.workload(rate, workers * batch, seed, requests)
        options = self.settings.options
        interval_s = options.refit_interval_s if options.refits else REFIT_INTERVAL_S
        routers = []
        for number, policy in enumerate(policies):
            schedule = RefitSchedule(interval_s, options.refit_window_s)
            # Refits have no effect on a policy that keeps no signatures.
            learning = self._learning(policy, seed + ROUTER_SEEDS * number)
            costs = self._costs(policy, seed + ROUTER_SEEDS * number)
            routers.append(Replica(policy, SimulatedRefits(policy, schedule), learning, costs))
        fleet = self.fleet(workers, self.reading(batch, seed))
        engine = Engine(self.packed, workload, fleet, Replicas(routers, self.settings.sharing))
        for policy in policies:
            if isinstance(policy, Clairvoyant):
                policy.attach(engine)
        return engine.run(progress)

    def _learning(self, policy: Policy, seed: int) -> SimulatedLearning | None:
        if self.settings.learn == "off" or not (policy.wants_words(with_counts=True) or policy.corrects_counts):
            return None
        return SimulatedLearning(policy, self.packed, self.settings.learn_share, seed)

    def _costs(self, policy: Policy, seed: int) -> SimulatedCosts | None:
        if not self.settings.learn_costs or not policy.prices_steps:
            return None
        return SimulatedCosts(policy, self._options(policy.name), seed)

    def served_steps(self, seed: int) -> float:
        """Mean number of decode steps of the served requests."""
        return float(self._steps[self.split(seed).serve].mean())

    def batch_at(self, rate: float, workers: int, seed: int = 0) -> float:
        """Estimate the mean batch at a rate from the step times of random batches. It grows until it fits the rate."""
        # What is left of a worker's time when it has computed the prompts.
        left = max(1 - rate / workers * self._prompt_s(seed), 0.05)
        per_worker = rate / workers * self.served_steps(seed) / left
        batch = 1.0
        for _ in range(60):
            wanted = per_worker * self._random_step_s(max(1, round(batch)), seed)
            if wanted <= batch:
                break
            batch = max(wanted, batch * 1.1)
            if batch * workers > len(self.split(seed).serve):
                break
        return max(batch, 0.05)

    def _prompt_tokens(self, seed: int) -> float:
        """Mean length of the prompts of the served requests."""
        settings = self.settings
        recorded, shared = settings.recorded_prompts, settings.shared_prefixes
        if recorded is not None:
            own = float(recorded.tokens.mean())
        else:
            own = float(np.array(self.packed.prompt_tokens)[self.split(seed).serve].mean())
        return own if shared is None else own + shared.tokens

    def _prompt_s(self, seed: int) -> float:
        """The time that an average prompt takes on an aggregated worker, at most: every chunk reads every expert."""
        if not self.settings.aggregated:
            return 0.0
        tokens, packed, cost = self._prompt_tokens(seed), self.packed, self.fleet(1).costs[0]
        chunks = math.ceil(tokens / self.settings.options.prefill_chunk)
        return cost.per_token_s * tokens + chunks * cost.per_expert_s * packed.layers * packed.experts

    def _random_step_s(self, batch: int, seed: int) -> float:
        """Step time of a batch of random requests, each at a random point of its decode."""
        rng = np.random.default_rng([seed, 2])
        serve = self.split(seed).serve
        size = min(batch, len(serve))
        packed, cost = self.packed, self.fleet(1).costs[0]
        # Ranks share the experts, more or less.
        ranks = self.settings.options.expert_parallel
        reading = distinct_experts(0) if ranks > 1 else self.reading(batch, seed)(0)
        times = []
        for _ in range(32):
            chosen = rng.choice(serve, size, replace=False).tolist()
            rows = [packed.first_row[i] + int(rng.integers(packed.steps(i))) for i in chosen]
            context = sum(
                packed.prompt_tokens[i] + row - packed.first_row[i] for i, row in zip(chosen, rows, strict=True)
            )
            reads = reading.of_batch(np.bitwise_or.reduce(packed.words[rows], axis=0, keepdims=True))
            times.append(cost.step_s(float(reads[0]) / ranks, size, float(context)))
        return float(np.mean(times))

    def rate_for_batch(self, batch: float, workers: int, seed: int = 0) -> float:
        """Find the rate that gives mean batch `batch` under jsq, by secant steps on logarithms."""
        self._check_in_flight(batch, workers, seed)
        requests = max(600, int(6 * workers * batch))
        decode_s = self.served_steps(seed) * self._random_step_s(max(1, round(batch)), seed)
        rate = workers * batch / (decode_s + batch * self._prompt_s(seed))
        slope, previous = 1.5, None
        for _ in range(RATE_TRIALS):
            measured = self.run("jsq", workers, rate, batch, seed, requests).batch_mean
            gap = math.log(batch / measured)
            if abs(gap) < RATE_TOLERANCE:
                break
            if previous is not None and rate != previous[0]:
                slope = (math.log(measured) - previous[1]) / math.log(rate / previous[0])
                slope = min(max(slope, 0.5), 6.0)
            previous = (rate, math.log(measured))
            rate *= math.exp(gap / slope)
        return rate

    def _check_in_flight(self, batch: float, workers: int, seed: int) -> None:
        split = self.split(seed)
        parts = [part for part in (split.serve, split.serve_before) if part is not None]
        smallest = min(len(part) for part in parts)
        for part in parts:  # a kind with a large share and few requests runs out first
            pools = self._pools_by_kind(part)
            total = sum(share for _, share in pools)
            smallest = min([smallest, *(int(len(requests) * total / share) for requests, share in pools)])
        if batch * workers >= smallest:
            raise ReplayError(
                f"a mean batch of {batch:g} on {workers} workers keeps {batch * workers:.0f} requests in flight, the "
                f"trace has {smallest} to serve, and none may run twice at once; lower the batch, the number of "
                "workers or the calibrate fraction, or record a longer trace"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """All seeds of one (policy, workers, rate, routers). In a closed loop, the rate is what came of it."""

    policy: str
    workers: int
    rate: float
    runs: list[RunResult]
    sharing: Sharing = field(default_factory=Sharing)

    @property
    def is_baseline(self) -> bool:
        """Whether it is a load balancer that sees every request. Changes are given against the best of them."""
        return self.policy in (*BASELINES, SPEED_BASELINE) and self.sharing.replicas == 1

    def per_seed(self, measure: Callable[[RunResult], float]) -> NDArray[np.float64]:
        """Apply `measure` to each run: float64 [S]."""
        return np.array([measure(run) for run in self.runs])


def compare(
    laboratory: Laboratory,
    policies: Sequence[str],
    workers: int,
    rate: float | None,
    batch: float,
    seeds: int,
    progress: Callable[[int], None] | None = None,
    sharings: Sequence[Sharing] = (Sharing(),),
) -> list[Cell]:
    """Run the load balancers in a single router, and `policies` in each of `sharings`, under the same seeds.

    rate: requests per second. None for a closed loop of `workers * batch` requests.

    Returns one cell for each.
    """
    cells = []
    for name, sharing in compared(policies, sharings, laboratory.settings.unequal):
        shared = laboratory.with_settings(dataclasses.replace(laboratory.settings, sharing=sharing))
        runs = [shared.run(name, workers, rate, batch, seed, progress=progress) for seed in range(seeds)]
        cells.append(Cell(name, workers, resulting_rate(runs) if rate is None else rate, runs, sharing))
    return cells


def resulting_rate(runs: Sequence[RunResult]) -> float:
    """Requests per second that arrived, on average over runs."""
    return float(np.mean([(len(run.arrival_s) - 1) / np.ptp(run.arrival_s) for run in runs]))


def compared(policies: Sequence[str], sharings: Sequence[Sharing], unequal: bool) -> list[tuple[str, Sharing]]:
    """What a comparison runs: the load balancers in a single router, and each policy in each of `sharings`.

    unequal: whether workers differ in speed, which one of the load balancers knows.
    """
    alone = Sharing()
    baselines = [(name, alone) for name in (*BASELINES, *([SPEED_BASELINE] if unequal else []))]
    # A single router shares nothing.
    asked = [(name, sharing if sharing.replicas > 1 else alone) for sharing in sharings for name in policies]
    return list(dict.fromkeys((*baselines, *asked)))


def check_names(policies: Sequence[str]) -> None:
    """Raise ReplayError if a policy does not exist."""
    for name in policies:
        if name not in POLICY_NAMES and name not in LAB_POLICIES:
            known = ", ".join((*POLICY_NAMES, *LAB_POLICIES))
            raise ReplayError(f"there is no policy {name!r} to replay; choose from {known}")
