"""Locality-band routing against the paper's rule in plain Python, under joins, leaves and full workers."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from numpy.typing import NDArray

from eldr.calibration import Calibration
from eldr.counts import ExpertCounts
from eldr.policies import POLICY_NAMES, PolicyError, PolicyOptions, make_policy
from eldr.policies.base import DecodeRequest
from eldr.policies.locality_band import LocalityBand
from eldr.policies.zone_owners import ZoneOwners
from tests.synthetic import make_calibration

LAYERS, EXPERTS, TOP_K = 3, 8, 2
# Similarities nearer than this to the edge of the band may fall either way in float32.
EDGE = 1e-4


def make_request(counts: NDArray[Any] | list[list[int]], top_k: int = TOP_K) -> DecodeRequest:
    counts = np.asarray(counts, dtype=np.uint32)
    return DecodeRequest("r", 10, ExpertCounts(counts, 10, top_k))


def similarities(calibration: Calibration, counts: list[list[int]]) -> list[float] | None:
    """The paper's formulas with Python floats: entries, IDF, mask, scaling, cosine."""
    formula: Callable[[Any, Any], float] = {
        "count_idf": lambda c, w: c * w,
        "count": lambda c, w: c,
        "sqrt_count": lambda c, w: math.sqrt(c),
        "binary": lambda c, w: float(c > 0),
    }[calibration.signature.transform_name]
    signature = [
        formula(int(counts[layer][expert]), float(calibration.signature.idf[layer][expert]))
        for layer in range(LAYERS)
        if calibration.signature.layer_mask[layer]
        for expert in range(EXPERTS)
    ]
    norm = math.sqrt(sum(entry * entry for entry in signature))
    if norm == 0:
        return None
    return [
        sum(entry / norm * float(part) for entry, part in zip(signature, centroid, strict=True))
        for centroid in calibration.centroids
    ]


def acceptable(nearness: dict[str, float], in_flight: Mapping[str, int], tau: float, two_nearest: bool) -> set[str]:
    """Every worker that the rule allows: the least loaded of the band; the whole of it where an edge is too near."""
    choices = set()
    for slack in (-EDGE, 0, EDGE):
        best = max(nearness.values())
        band = {worker for worker, value in nearness.items() if value >= best - tau - slack or value == best}
        if two_nearest and tau > 0 and len(band) == 1 and len(nearness) > 1:
            second = max(value for worker, value in nearness.items() if worker not in band)
            band |= {worker for worker, value in nearness.items() if value >= second - max(slack, 0)}
        fewest = min(in_flight[worker] for worker in band)
        choices |= {worker for worker in band if in_flight[worker] == fewest}
    return choices


def zones_of(zones: int, workers: Iterable[str]) -> dict[str, int]:
    """The zone of each worker."""
    owners = ZoneOwners(zones)
    for worker in workers:
        owners.join(worker)
    return dict(owners.zone_of)


counts_strategy = st.lists(
    st.lists(st.integers(0, 9), min_size=EXPERTS, max_size=EXPERTS), min_size=LAYERS, max_size=LAYERS
)


class Fleet(RuleBasedStateMachine):
    """Workers come, go, fill up and empty; every choice is one that the rule allows."""

    @initialize(
        zones=st.integers(1, 5),
        seed=st.integers(0, 50),
        tau=st.sampled_from([0.0, 0.02, 0.1, 0.3, 2.0]),
        two_nearest=st.booleans(),
        transform=st.sampled_from(["count_idf", "count", "sqrt_count", "binary"]),
        mask=st.sampled_from([[1, 1, 1], [0, 1, 0], [1, 0, 1]]),
    )
    def start(self, zones: int, seed: int, tau: float, two_nearest: bool, transform: str, mask: list[int]) -> None:
        of_layers = np.array(mask, dtype=bool)
        self.calibration = make_calibration(zones, LAYERS, EXPERTS, TOP_K, seed, transform, of_layers)
        self.policy = make_policy(
            "locality-band", PolicyOptions(tau=tau, two_nearest=two_nearest), calibration=self.calibration, seed=seed
        )
        self.tau, self.two_nearest = tau, two_nearest
        self.zone: dict[str, int] = {}
        self.load: dict[str, int] = {}

    def divide(self) -> None:
        """Who has which zone follows from who is there (test_zone_owners.py)."""
        self.zone = zones_of(self.calibration.workers, self.zone)

    @rule(number=st.integers(0, 200), load=st.integers(0, 4))
    def join(self, number: int, load: int) -> None:
        worker = f"w{number}"
        if worker not in self.zone:
            self.zone[worker], self.load[worker] = 0, load
            self.divide()
            self.policy.joined(worker)

    @precondition(lambda self: self.zone)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.zone)))
        del self.zone[worker], self.load[worker]
        self.policy.left(worker)
        self.divide()

    @precondition(lambda self: self.zone)
    @rule(data=st.data(), counts=counts_strategy)
    def choose(self, data: st.DataObject, counts: list[list[int]]) -> None:
        eligible = data.draw(st.sets(st.sampled_from(sorted(self.zone)), min_size=1))
        in_flight = {worker: self.load[worker] for worker in eligible}
        decision = self.policy.choose(make_request(counts), in_flight)
        of_zone = similarities(self.calibration, counts)
        if of_zone is None:
            assert decision.reason == "zero_signature"
            assert self.load[decision.worker] == min(in_flight.values())
        else:
            nearness = {worker: of_zone[self.zone[worker]] for worker in eligible}
            assert decision.reason == "locality"
            assert decision.worker in acceptable(nearness, in_flight, self.tau, self.two_nearest)
        if decision.worker in self.load:
            self.load[decision.worker] += 1

    @precondition(lambda self: self.zone)
    @rule(data=st.data(), reason=st.sampled_from(["no_signature", "wrong_geometry"]))
    def choose_without(self, data: st.DataObject, reason: str) -> None:
        eligible = data.draw(st.sets(st.sampled_from(sorted(self.zone)), min_size=1))
        in_flight = {worker: self.load[worker] for worker in eligible}
        other = make_request(np.ones((LAYERS, EXPERTS + 1)))
        request = DecodeRequest("r", 10) if reason == "no_signature" else other
        decision = self.policy.choose(request, in_flight)
        assert decision.reason == reason
        assert in_flight[decision.worker] == min(in_flight.values())


TestFleet = Fleet.TestCase
TestFleet.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)


def policy_of(calibration: Calibration, workers: dict[str, int] | str, **options: Any) -> LocalityBand:
    policy = make_policy("locality-band", PolicyOptions(**options), calibration=calibration)
    for worker in workers:
        policy.joined(worker)
    assert isinstance(policy, LocalityBand)
    return policy


@settings(max_examples=100, deadline=None)
@given(counts_strategy, st.integers(0, 99), st.lists(st.integers(0, 5), min_size=5, max_size=5))
def test_tau_zero_is_pure_locality(counts: list[list[int]], seed: int, loads: list[int]) -> None:
    calibration = make_calibration(5, LAYERS, EXPERTS, TOP_K, seed)
    of_zone = similarities(calibration, counts)
    assume(of_zone is not None)
    assert of_zone is not None
    ordered = sorted(of_zone)
    assume(ordered[-1] - ordered[-2] > EDGE)
    in_flight = {f"w{i}": load for i, load in enumerate(loads)}
    policy = policy_of(calibration, in_flight, tau=0)
    chosen = policy.choose(make_request(counts), in_flight).worker
    assert zones_of(5, in_flight)[chosen] == of_zone.index(ordered[-1])


@settings(max_examples=100, deadline=None)
@given(counts_strategy, st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_the_widest_band_is_the_shortest_queue(counts: list[list[int]], loads: list[int]) -> None:
    in_flight = {f"w{i}": load for i, load in enumerate(loads)}
    policy = policy_of(make_calibration(), in_flight, tau=2)
    chosen = {policy.choose(make_request(counts), in_flight).worker for _ in range(60)}
    assert chosen == {worker for worker, load in in_flight.items() if load == min(loads)}


def narrow(tau: float, two_nearest: bool) -> tuple[LocalityBand, DecodeRequest]:
    """The zones of a, b and c are along three experts of a request that leans to the first, then the second."""
    calibration = make_calibration(3, LAYERS, EXPERTS, TOP_K, transform="count")
    zones = zones_of(3, "abc")
    calibration.centroids[[zones[worker] for worker in "abc"]] = np.eye(3, LAYERS * EXPERTS)
    counts = np.zeros((LAYERS, EXPERTS))
    counts[0, :3] = [9, 4, 1]
    return policy_of(calibration, "abc", tau=tau, two_nearest=two_nearest), make_request(counts)


def test_a_band_of_one_takes_the_second_nearest_in() -> None:
    policy, request = narrow(0.1, True)
    assert policy.choose(request, {"a": 3, "b": 1, "c": 0}).worker == "b"
    assert policy.choose(request, {"a": 1, "b": 3, "c": 0}).worker == "a"
    assert policy.choose(request, {"a": 3, "c": 0}).worker == "c"
    assert policy.choose(request, {"a": 3}).worker == "a"


@pytest.mark.parametrize(("tau", "two_nearest"), [(0.1, False), (0, True)])
def test_a_band_of_one_stays_one(tau: float, two_nearest: bool) -> None:
    policy, request = narrow(tau, two_nearest)
    assert policy.choose(request, {"a": 3, "b": 1, "c": 0}).worker == "a"


def test_the_band_is_that_of_the_eligible_workers() -> None:
    """Were it measured from the zone of a worker that is full, nobody would be near enough."""
    policy, request = narrow(0.4, False)
    assert policy.choose(request, {"b": 3, "c": 0}).worker == "c"  # 0.40 and 0.10, of which a has 0.91
    policy, request = narrow(0.2, False)
    assert policy.choose(request, {"b": 3, "c": 0}).worker == "b"


def test_the_order_in_which_workers_join_does_not_matter() -> None:
    """Several routers find the same workers, each in an order of its own, and some see one come and go in between."""
    calibration = make_calibration(5, LAYERS, EXPERTS, TOP_K)
    workers = [f"http://w{number}:8000" for number in range(13)]
    zones = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        policy = policy_of(calibration, dict.fromkeys(rng.permutation(workers), 0))
        policy.joined("http://passing:8000")
        policy.left("http://passing:8000")
        picture = policy.picture()
        assert picture is not None
        order = list(picture.rows)
        zones.append([[picture.rows[one][order.index(other)] for other in workers] for one in workers])
    assert zones[0] == zones[1] == zones[2] == zones[3]
    of = zones_of(5, workers)  # 13 workers share 5 zones
    for one, alike in zip(workers, zones[0], strict=True):
        for other, likeness in zip(workers, alike, strict=True):
            assert (likeness > 0.9999) == (of[one] == of[other])


def test_another_top_k_is_another_geometry() -> None:
    policy, request = narrow(0, False)
    other = make_request(request.counts.counts, top_k=4)
    assert policy.choose(other, {"a": 3, "b": 1, "c": 0}).reason == "wrong_geometry"


def test_policies_by_name() -> None:
    assert {"rr", "random", "p2c", "jsq", "domain", "locality-band"} <= set(POLICY_NAMES)
    calibration = make_calibration()
    for name in POLICY_NAMES:
        policy = make_policy(name, calibration=calibration)
        policy.joined("a")
        assert policy.name == name
        assert policy.choose(DecodeRequest("r", 10), {"a": 0}).worker == "a"


def test_policies_that_cannot_be_made() -> None:
    with pytest.raises(PolicyError, match="no policy 'jqs'; choose from rr, random, p2c, jsq"):
        make_policy("jqs")
    with pytest.raises(PolicyError, match="needs a calibration"):
        make_policy("locality-band")
    for tau in (-0.1, math.nan, math.inf):
        with pytest.raises(PolicyError, match="tau is"):
            PolicyOptions(tau=tau)
