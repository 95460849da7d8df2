"""Which worker has which zone: the same for all routers, evenly shared, and kept while others come and go."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.policies.zone_owners import ZoneOwners

NAMES = st.lists(st.text(max_size=6), min_size=1, max_size=20, unique=True)


def owners(zones: int, workers: list[str]) -> ZoneOwners:
    found = ZoneOwners(zones)
    for worker in workers:
        found.join(worker)
    return found


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 12), NAMES)
def test_zones_follow_from_who_is_there_and_are_even(data: st.DataObject, zones: int, names: list[str]) -> None:
    leavers = data.draw(st.lists(st.sampled_from(names), max_size=len(names) - 1, unique=True))
    stay = [name for name in names if name not in leavers]
    seen = owners(zones, names)
    for worker in leavers:
        seen.leave(worker)
    assert list(seen.zone_of) == stay
    other_router = owners(zones, data.draw(st.permutations(stay)))
    assert other_router.zone_of == seen.zone_of
    counts = Counter(dict.fromkeys(range(zones), 0))
    counts.update(seen.zone_of.values())
    assert len(counts) == zones
    assert max(counts.values()) - min(counts.values()) <= 1


@settings(max_examples=100, deadline=None)
@given(st.data(), NAMES, NAMES)
def test_a_refits_owners_keep_their_zones_and_newcomers_take_the_free_ones(
    data: st.DataObject, fitted: list[str], names: list[str]
) -> None:
    seen = owners(3, names)
    seen.replace(fitted)
    assert set(seen.zone_of) == set(names)
    for worker in names:
        if worker in fitted:
            assert seen.zone_of[worker] == fitted.index(worker)
    counts = Counter(dict.fromkeys(range(len(fitted)), 0))
    counts.update(seen.zone_of.values())
    assert len(counts) == len(fitted)
    assert max(counts.values()) - min(counts.values()) <= 1
    again = owners(3, data.draw(st.permutations(names)))
    again.replace(fitted)
    assert again.zone_of == seen.zone_of


@pytest.mark.parametrize(("zones", "workers"), [(8, 8), (16, 16), (8, 16), (16, 12), (40, 40), (5, 23)])
def test_few_change_their_zones_when_one_comes_or_goes(zones: int, workers: int) -> None:
    """Dealt out in the order of names, half of them would: 4 of 8, and 20 of 40."""
    names = [f"http://10.0.0.{number}:8000" for number in range(workers)]
    changes = []
    for gone in names:
        seen = owners(zones, names)
        before = dict(seen.zone_of)
        seen.leave(gone)
        changes.append(sum(before[worker] != zone for worker, zone in seen.zone_of.items()))
        seen.join(gone)
        assert seen.zone_of == before
    assert sum(changes) / len(changes) <= 2
    assert max(changes) <= 6


def test_a_fleets_zones_are_spread_over_names_that_differ_in_a_digit() -> None:
    """Each of 64 workers is alone in turn: none of 8 zones gets all of them."""
    alone = Counter(owners(8, [f"http://w{number}:8000"]).zone_of.popitem()[1] for number in range(64))
    assert len(alone) == 8
    assert max(alone.values()) < 24


def test_a_worker_that_has_no_zone_cannot_leave() -> None:
    with pytest.raises(KeyError):
        owners(2, ["a"]).leave("b")
