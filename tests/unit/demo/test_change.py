"""Changes of TPOT from one policy to another: paired by round, with Student's interval, against scipy and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from eldr.demo.change import in_words, tpot_changes
from eldr.demo.measure import PolicyRun, Round
from eldr.load.outcome import Outcome
from eldr.replay.statistics import Change


def a_round(tpot_s: list[float], measured: bool = True) -> Round:
    """A request of two tokens for each TPOT."""
    return Round(measured, [Outcome(n, "code", 0.0, "", [1, 1], [1.0, 1.0 + tpot]) for n, tpot in enumerate(tpot_s)])


def test_changes_are_those_of_scipys_one_sample_interval() -> None:
    rng = np.random.default_rng(3)
    base, own = rng.uniform(0.04, 0.09, (5, 40)), rng.uniform(0.03, 0.07, (5, 40))
    runs = [
        PolicyRun(name, [a_round(turn.tolist()) for turn in times]) for name, times in (("jsq", base), ("other", own))
    ]
    changes = tpot_changes(runs)
    assert list(changes) == ["other"]
    for name, figure in (
        ("p50", lambda times: np.median(times, axis=1)),
        ("p99", lambda times: np.quantile(times, 0.99, axis=1)),
        ("mean", lambda times: np.mean(times, axis=1)),
    ):
        expected = 100 * (figure(own) / figure(base) - 1)
        interval = stats.ttest_1samp(expected, 0.0).confidence_interval(0.95)
        change = changes["other"][name]
        assert change.percent == pytest.approx(expected.mean())
        assert (change.low, change.high) == pytest.approx((interval.low, interval.high))


def test_the_warm_up_does_not_count_and_rounds_are_paired() -> None:
    jsq = PolicyRun("jsq", [a_round([9.0], measured=False), a_round([0.1]), a_round([1.0])])
    union = PolicyRun("union", [a_round([0.001], measured=False), a_round([0.05]), a_round([0.5])])
    # Twice -50 percent, although the rounds differ tenfold.
    change = tpot_changes([jsq, union])["union"]["p50"]
    assert (change.percent, change.low, change.high) == pytest.approx((-50.0, -50.0, -50.0))


def test_each_policy_is_compared_with_the_first() -> None:
    runs = [PolicyRun(name, [a_round([tpot])]) for name, tpot in (("a", 0.1), ("b", 0.2), ("c", 0.05))]
    changes = tpot_changes(runs)
    assert [changes[name]["mean"].percent for name in ("b", "c")] == pytest.approx([100.0, -50.0])
    assert math.isnan(changes["b"]["mean"].low)


def test_a_round_that_did_not_end_for_all_is_left_out() -> None:
    jsq = PolicyRun("jsq", [a_round([0.1]), a_round([0.1]), a_round([])])
    union = PolicyRun("union", [a_round([0.08]), a_round([])])
    assert tpot_changes([jsq, union])["union"]["p50"].percent == pytest.approx(-20.0)
    assert tpot_changes([jsq, PolicyRun("nothing", [a_round([])])]) == {}


def test_a_change_in_words() -> None:
    assert in_words(Change(-18.24, -20.06, -16.0)) == "-18.2 % (-20.1 to -16.0)"
    assert in_words(Change(1.0, math.nan, math.nan)) == "+1.0 %"
