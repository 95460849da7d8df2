"""What steps wait for, against counting by hand, and that a worker tells its reading of the steps that it made."""

import numpy as np
import pytest
from numpy.typing import NDArray

from eldr.cost import StepCost
from eldr.policies import make_policy
from eldr.replay.engine import Engine
from eldr.replay.fleet import FleetSpec
from eldr.replay.packed import pack_trace, union_rows
from eldr.replay.reading import DistinctExperts, Reading
from eldr.replay.replicas import alone
from eldr.replay.workload import Workload
from tests.synthetic import make_trace


def test_every_distinct_expert_is_a_read() -> None:
    trace = make_trace(requests=4, layers=3, experts=40, seed=1, steps=9)
    rows = [int(row) for row in trace.decode_offsets[:3]]
    expected = [
        sum(len({int(e) for row in rows for e in trace.decode_experts[row + step, layer]}) for layer in range(3))
        for step in range(4)
    ]
    assert DistinctExperts().of_batch(union_rows(pack_trace(trace).words, rows, 4)).tolist() == expected
    active = np.random.default_rng(1).random((5, 3 * 16))
    assert DistinctExperts().of_expected(active) == pytest.approx([row.sum() for row in active])


class Doubled(DistinctExperts):
    """Reads everything twice, and keeps what was made."""

    def __init__(self) -> None:
        self.steps: list[NDArray[np.uint64]] = []

    def of_batch(self, active: NDArray[np.uint64]) -> NDArray[np.float64]:
        return 2 * super().of_batch(active)

    def made(self, active: NDArray[np.uint64]) -> None:
        self.steps.extend(active)


def test_a_worker_pays_for_its_reads_and_tells_of_every_step_it_made() -> None:
    trace = make_trace(requests=4, layers=3, experts=16, seed=1, steps=9)
    readings: list[Doubled] = []

    def make(worker: int) -> Reading:
        readings.append(Doubled())
        return readings[-1]

    # The second arrival cuts the run of the first, whose later steps are computed anew.
    workload = Workload(np.array([0.0, 0.3]), np.arange(2), range(2))
    cost = StepCost(0.0, 1e-2, 0.0)
    fleet = FleetSpec((cost,), (cost,), reading=make)
    result = Engine(pack_trace(trace), workload, fleet, alone(make_policy("jsq"))).run()
    assert len(readings) == 1
    distinct = [sum(int(word).bit_count() for word in step) for step in readings[0].steps]
    ended_s = (result.arrival_s + result.request_s).max()
    assert ended_s == pytest.approx(sum(2 * 1e-2 * experts for experts in distinct))
    assert result.expert_reads_mean == pytest.approx(2 * result.active_experts_mean)
    steps = np.diff(trace.decode_offsets)[:2]
    assert steps.max() <= len(distinct) < steps.sum()
