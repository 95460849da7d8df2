"""Prefix affinity against its definition."""

import math
import random
from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from eldr.policies import make_policy
from eldr.policies.base import DecodeRequest
from eldr.policies.prefix_affinity import PrefixAffinity, most_cached

WORKERS = st.sampled_from("abcdef")


def asked(cached_tokens: Mapping[str, int] | None) -> DecodeRequest:
    return DecodeRequest("r", 10, computes_prompt=True, cached_tokens=cached_tokens)


@given(st.dictionaries(WORKERS, st.integers(0, 20), min_size=1), st.dictionaries(WORKERS, st.integers(0, 5)))
def test_the_chosen_worker_is_the_one_of_the_definition(loads: dict[str, int], cached: dict[str, int]) -> None:
    chosen = most_cached(asked(cached), loads, random.Random(0))
    most_load = math.ceil(1.25 * (sum(loads.values()) + 1) / len(loads))
    allowed = {worker for worker in loads if loads[worker] + 1 <= most_load}
    cached = {worker: tokens for worker, tokens in cached.items() if tokens >= 3}  # of 10
    if cached:
        assert chosen in allowed
        assert cached.get(chosen, 0) == max(cached.get(worker, 0) for worker in allowed)
        equal = [worker for worker in allowed if cached.get(worker, 0) == cached.get(chosen, 0)]
    else:
        equal = list(loads)
    assert loads[chosen] == min(loads[worker] for worker in equal)


def test_a_cached_prefix_attracts_until_its_worker_is_overloaded() -> None:
    policy = make_policy("prefix-affinity")
    assert isinstance(policy, PrefixAffinity)
    request = asked({"a": 8, "b": 3, "c": 2})
    assert policy.choose(request, {"a": 4, "b": 4, "c": 3}).worker == "a"
    # 12 requests on three workers: none may have more than five.
    assert policy.choose(request, {"a": 5, "b": 4, "c": 2}).worker == "b"
    assert policy.choose(request, {"a": 5, "b": 5, "c": 1}).worker == "c"
    assert policy.choose(request, {"a": 0, "b": 0}).reason == "prefix_cached"
    assert policy.choose(asked(None), {"a": 1, "b": 0}).worker == "b"
    assert policy.choose(asked(None), {"a": 1, "b": 0}).reason == "least_loaded"
    assert policy.choose(asked({"gone": 9}), {"a": 1, "b": 0}).reason == "least_loaded"
