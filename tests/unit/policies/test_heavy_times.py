"""The memory of the tail guard, against sorting everything it was told."""

from hypothesis import given
from hypothesis import strategies as st

from eldr.policies.heavy_times import EVERY, SHARE, STARTS, HeavyTimes


@given(st.lists(st.floats(1e-4, 1.0), max_size=3 * STARTS))
def test_it_is_the_quantile_of_the_last_starts(limits_s: list[float]) -> None:
    heavy = HeavyTimes()
    for limit_s in limits_s:
        heavy.add(limit_s)
    told = limits_s[: len(limits_s) // EVERY * EVERY][-STARTS:]
    if not told:
        assert heavy.limit_s == 0
        return
    assert heavy.limit_s in told
    not_longer = sum(limit_s <= heavy.limit_s for limit_s in told)
    shorter = sum(limit_s < heavy.limit_s for limit_s in told)
    assert shorter <= SHARE * len(told) <= not_longer + 1


def test_it_forgets() -> None:
    heavy = HeavyTimes()
    for limit_s in [5.0] * STARTS + [1.0] * STARTS:
        heavy.add(limit_s)
    assert heavy.limit_s == 1.0
