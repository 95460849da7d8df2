"""The judgement of predictors on cases whose answer is known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from eldr.replay.packed import pack_trace
from eldr.replay.predictors import Judgement, judge
from eldr.trace import Trace
from tests.synthetic import make_trace


@pytest.fixture(scope="module")
def trace() -> Trace:
    return make_trace(requests=60, layers=3, experts=32, top_k=3, kinds=3, seed=1, steps=200)


def judge_with(trace: Trace, profiles_of: Callable[..., Any]) -> Judgement:
    """`profiles_of` maps true profiles [N, D] to predicted ones."""
    packed = pack_trace(trace)
    true = trace.decode_profiles().reshape(60, -1)
    predicted = profiles_of(true)
    of_counts = {id(counts): row for counts, row in zip(packed.counts, predicted, strict=True)}
    return judge(lambda counts: of_counts[id(counts)], packed, true, np.arange(60), batch=5)


def test_true_profiles_are_judged_right(trace: Trace) -> None:
    found = judge_with(trace, lambda true: true)
    assert found.r2 == pytest.approx(1)
    for unions in (found.random, found.similar):
        assert unions.predicted == unions.from_true_profiles
        assert unions.predicted == pytest.approx(unions.recorded, rel=0.02)
    assert found.similar.recorded < 0.9 * found.random.recorded
    used = found.reliability[found.reliability[:, 2] > 0]
    assert used[:, 0] == pytest.approx(used[:, 1])
    assert found.reliability[:, 2].sum() == 60 * 3 * 32


def test_the_mean_profile_predicts_no_variance_and_overstates_similar_batches(trace: Trace) -> None:
    found = judge_with(trace, lambda true: np.broadcast_to(true.mean(axis=0), true.shape))
    assert found.r2 == pytest.approx(0, abs=1e-5)
    assert found.similar.predicted > 1.2 * found.similar.recorded


def test_overconfident_predictions_show_in_the_reliability(trace: Trace) -> None:
    found = judge_with(trace, lambda true: np.clip(true + 0.5 * (true - 0.1), 0, 1))
    high = found.reliability[(found.reliability[:, 2] > 20) & (found.reliability[:, 0] > 0.5)]
    assert (high[:, 0] > high[:, 1]).all()
