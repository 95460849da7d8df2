"""The compiled loops and the numpy ones: both against plain arithmetic, and what is called wrongly is refused."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import eldr.kernels
import eldr.kernels._numpy
from eldr.counts import pack
from eldr.kernels import FleetState, PlacementWeights, PrefillTerms

NUMPY = eldr.kernels._numpy
needs_compiler = pytest.mark.skipif(not eldr.kernels.COMPILED, reason="this installation could not compile the kernels")
BOTH = [
    pytest.param(NUMPY, id="numpy"),
    pytest.param(eldr.kernels, id="compiled", marks=needs_compiler),
]


@pytest.fixture(params=BOTH)
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    found: ModuleType = request.param
    return found


Shape = tuple[int, int, int]


def shapes() -> st.SearchStrategy[Shape]:
    """Layers, experts, a seed."""
    return st.tuples(st.integers(1, 5), st.sampled_from((1, 3, 16, 33, 128)), st.integers(0, 2**32 - 1))


@given(shapes(), st.integers(0, 32), st.data())
@settings(max_examples=60)
@pytest.mark.parametrize("kernels", BOTH)
def test_packed_counts_become_the_numbers_they_are_of(
    kernels: ModuleType, shape: Shape, bits: int, data: st.DataObject
) -> None:
    layers, experts, seed = shape
    rng = np.random.default_rng(seed)
    wanted = (rng.random((layers, experts)) ** 4 * (2**bits - 1)).astype(np.uint32)
    low, high, packed = pack(wanted.reshape(-1))
    out = np.full((layers, experts), 7, dtype=np.uint32)
    sums = {sum(map(int, row)) for row in wanted}
    same = len(sums) == 1
    total, most = sums.pop(), int(wanted.max())
    assert kernels.unpack_counts(packed, low, high, layers, experts, total, most, out) == same
    assert np.array_equal(out, wanted)
    assert kernels.unpack_counts(packed, low, high, layers, experts, total + 1, most, out) == 0
    if most:
        assert kernels.unpack_counts(packed, low, high, layers, experts, total, most - 1, out) == 0
    assert kernels.unpack_counts(packed + b"x", low, high, layers, experts, total, most, out) == -1
    if packed:
        assert kernels.unpack_counts(packed[:-1], low, high, layers, experts, total, most, out) == -1


@given(st.binary(max_size=200), st.integers(0, 16), st.integers(0, 16), st.integers(1, 3), st.integers(1, 40))
@settings(max_examples=200)
@needs_compiler
def test_both_read_the_same_from_any_bytes(data: bytes, low: int, high: int, layers: int, experts: int) -> None:
    found = []
    for kernels in (NUMPY, eldr.kernels):
        out = np.zeros((layers, experts), dtype=np.uint32)
        found.append((kernels.unpack_counts(data, low, high, layers, experts, 5, 5, out), out.tolist()))
    assert found[0] == found[1]


def test_frequencies(kernels: ModuleType) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 500, 384, dtype=np.uint32)
    mean = rng.random(384, dtype=np.float32)
    out = np.empty(384, dtype=np.float32)
    kernels.own_frequencies(counts, mean, 4.0, 1 / 504, out)
    assert out == pytest.approx([(int(c) + 4 * float(m)) / 504 for c, m in zip(counts, mean, strict=True)], rel=1e-6)


@given(shapes())
@settings(max_examples=30)
@pytest.mark.parametrize("kernels", BOTH)
def test_probabilities_of_a_layer(kernels: ModuleType, shape: Shape) -> None:
    layers, experts, seed = shape
    scores = np.random.default_rng(seed).normal(0.1, 0.3, layers * experts).astype(np.float32)
    out = np.empty_like(scores)
    target = min(8.0, 0.5 * experts)
    expected = []
    for row in scores.reshape(layers, experts).tolist():
        clipped = [min(max(value, 1e-4), 0.98) for value in row]
        expected += [min(max(value * target / sum(clipped), 1e-4), 0.98) for value in clipped]
    kernels.to_probabilities(scores, layers, 1e-4, 0.98, target, out)
    assert out.tolist() == pytest.approx(expected, rel=1e-5)


def test_every_code_of_a_signature_survives(kernels: ModuleType) -> None:
    signature = ((np.arange(256) / 255) ** 2).astype(np.float32)
    out = np.zeros(256, dtype=np.uint8)
    kernels.encode_signature(signature, out)
    assert out.tolist() == list(range(256))


def test_every_code_of_an_exposure_survives(kernels: ModuleType) -> None:
    scale = 255**2 / -math.log2(1 - 0.98)
    profile = np.array([1 - 2 ** -(code**2 / scale) for code in range(256)], dtype=np.float32)
    out = np.zeros(256, dtype=np.uint8)
    kernels.encode_exposure(profile, 0.98, scale, out)
    assert out.tolist() == list(range(256))
    kernels.encode_exposure(np.linspace(0.98, 1, 256, dtype=np.float32), 0.98, scale, out)
    assert set(out.tolist()) == {255}


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=70))
@pytest.mark.parametrize("kernels", BOTH)
def test_codes_are_nearest_to_their_exposure(kernels: ModuleType, profile: list[float]) -> None:
    scale = 255**2 / -math.log2(1 - 0.98)
    out = np.zeros(len(profile), dtype=np.uint8)
    kernels.encode_exposure(np.array(profile, dtype=np.float32), 0.98, scale, out)
    exact = [math.sqrt(-math.log2(1 - min(p, 0.98)) * scale) for p in profile]
    assert out == pytest.approx(np.array(exact), abs=0.51)


def test_survival_follows_its_exposure_and_cancels(kernels: ModuleType) -> None:
    rng = np.random.default_rng(1)
    unit = 2.0**-18
    exposures = np.full((3, 1000), 5, dtype=np.uint32)
    survivals = np.full((3, 1000), 7, dtype=np.uint16)
    exposures[1] = 0
    exposure, survival = exposures[1], survivals[1]
    added = [rng.integers(0, 256, 1000, dtype=np.uint8) for _ in range(40)]
    for count, codes in enumerate(added, 1):
        union = kernels.shift_exposure(codes, 1, unit, exposures, survivals, 1)
        exact = np.sum([codes.astype(np.int64) ** 2 for codes in added[:count]], axis=0)
        assert np.array_equal(exposure, exact)
        expected = 2.0 ** -(exact * unit)
        assert np.abs(survival / 65535 - expected).max() <= 0.51 / 65535
        assert union == pytest.approx(1000 - expected.sum(), rel=1e-5)
    for codes in added:
        union = kernels.shift_exposure(codes, -1, unit, exposures, survivals, 1)
    assert not exposure.any()
    assert (survival == 65535).all()
    assert union == 0
    assert (exposures[::2] == 5).all()
    assert (survivals[::2] == 7).all()


@pytest.mark.parametrize("exposure", [126 * 2**20, 2**31 - 1, 2**31, 2**32 - 1])
def test_what_is_surely_activated_does_not_survive(kernels: ModuleType, exposure: int) -> None:
    survival = np.full((1, 3), 7, dtype=np.uint16)
    none, exposures = np.zeros(3, dtype=np.uint8), np.full((1, 3), exposure, dtype=np.uint32)
    assert kernels.shift_exposure(none, 1, 2.0**-20, exposures, survival, 0) == 3
    assert survival.tolist() == [[0, 0, 0]]


def test_moving_towards(kernels: ModuleType) -> None:
    own = np.array([0, 1, 2], dtype=np.float32)
    length = kernels.move_towards(own, np.array([4, 1, 0], dtype=np.float32), 0.25)
    assert own.tolist() == [1, 1, 1.5]
    assert length == pytest.approx(math.sqrt(4.25))


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
@pytest.mark.parametrize("kernels", BOTH)
def test_the_direction_is_of_unit_length(kernels: ModuleType, layers: int, experts: int, every: int, seed: int) -> None:
    own, mean = np.random.default_rng(seed).random((2, layers * experts), dtype=np.float32)
    out = np.empty(-(-layers // every) * experts, dtype=np.float32)
    assert kernels.unit_direction(own, mean, layers, every, out)
    assert out @ out == pytest.approx(1, rel=1e-5)
    of_layers = (own - mean).reshape(layers, experts)[::every].reshape(-1)
    assert out == pytest.approx(of_layers / np.sqrt(of_layers @ of_layers), rel=1e-5, abs=1e-7)
    assert not kernels.unit_direction(own, own, layers, every, out)
    assert not out.any()


def test_row_products(kernels: ModuleType) -> None:
    rng = np.random.default_rng(2)
    rows, vector = rng.random((5, 77), dtype=np.float32), rng.random(77, dtype=np.float32)
    out = np.empty(5)
    kernels.row_products(rows, vector, out)
    expected = [sum(float(a) * float(b) for a, b in zip(row, vector, strict=True)) for row in rows]
    assert out == pytest.approx(expected)
    fractions = (rows * 65535).astype(np.uint16)
    kernels.row_products(fractions, vector, out)
    assert out == pytest.approx(expected, abs=77 / 65535)


def plain_placement_cost(
    columns: NDArray[np.float64],
    workers: Sequence[tuple[float, ...]],
    context_tokens: float,
    weights: PlacementWeights,
    allowed_s: float,
) -> tuple[list[float], float]:
    others_weight, anchor, tail_guard, guard_share = weights
    base, expert, token, context = columns.tolist()
    count = len(base)
    longer, cost, experts, saved = [], [], 0.0, 0.0
    for w, (union, added, held, _, at_random, load) in enumerate(workers):
        added_s = expert[w] * added + token[w] + context[w] * context_tokens
        step_s = base[w] + expert[w] * union + token[w] * load + context[w] * held
        longer.append(step_s + added_s)
        cost.append(step_s + added_s + others_weight * load * added_s)
        experts += expert[w] * (union + added) / count
        saved += expert[w] * (at_random - union - added) / count
    mean_load = sum(worker[5] for worker in workers) / count
    nearest = max(worker[3] for worker in workers)
    limit = sum(longer) / count + tail_guard * (max(saved, 0) + guard_share * experts) + 1e-12
    most = max(limit, allowed_s)
    costs = [
        math.inf if longer[w] > most else cost[w] + anchor * (mean_load + 1) * experts * (nearest - workers[w][3])
        for w in range(count)
    ]
    return costs, limit


@given(
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
    st.sampled_from((0.0, 0.3, math.inf)),
    st.sampled_from((0.0, 0.01, 0.02, 1.0)),
    st.booleans(),
)
@settings(max_examples=40)
@pytest.mark.parametrize("kernels", BOTH)
def test_placement_cost(
    kernels: ModuleType, workers: int, seed: int, tail_guard: float, allowed_s: float, dense: bool
) -> None:
    rng = np.random.default_rng(seed)
    columns = rng.random((4, workers)) * [[1e-3], [1e-5], [1e-5], [1e-9]]
    union, added, context = (
        rng.random(workers) * 3000,
        rng.random(workers) * 100,
        rng.integers(0, 10**5, workers).tolist(),
    )
    products, length = rng.random(workers), rng.random(workers).astype(np.float32) + 0.1
    at_random = np.append(0, np.cumsum(rng.random(65) * (4 if dense else 100)))
    rows = rng.permutation(workers)[: rng.integers(1, workers + 1)]
    load = rng.integers(0, 64, len(rows)).tolist()
    fleet, weights = FleetState(columns, union, context, length), PlacementWeights(1.0, 0.1, tail_guard, 0.02)
    out = np.empty(len(rows))
    best, limit_s = kernels.placement_cost(fleet, weights, added, products, at_random, rows, load, 500, allowed_s, out)
    of = [
        (union[w], added[w], context[w], products[w] / length[w], at_random[int(own) + 1], own)
        for w, own in zip(rows, load, strict=True)
    ]
    costs, limit = plain_placement_cost(columns[:, rows], of, 500, weights, allowed_s)
    assert out.tolist() == pytest.approx(costs, rel=1e-9)
    assert limit_s == pytest.approx(limit, rel=1e-9)
    assert math.isfinite(out[best])
    assert out[best] == min(out)


@needs_compiler
@given(shapes(), st.integers(1, 128), st.sampled_from((0, 3, 50)))
@settings(max_examples=40, deadline=None)
@needs_compiler
def test_both_keep_the_same_cache(shape: Shape, capacity: int, halve_every: int) -> None:
    layers, experts, seed = shape
    rng = np.random.default_rng(seed)
    flags = np.zeros((20, -(-layers * experts // 64) * 64), dtype=np.uint8)
    flags[:, : layers * experts] = rng.random((20, layers * experts)) < rng.random(layers * experts) ** 2
    active = np.packbits(flags, axis=1, bitorder="little").view(np.uint64)
    found = []
    for kernels in (NUMPY, eldr.kernels):
        priority = np.zeros((layers, experts), dtype=np.uint64)
        resident = np.zeros((layers, experts), dtype=np.uint8)
        resident[:, :capacity] = 1
        missing = np.empty(20, dtype=np.int64)
        for first in (0, 8):
            steps = slice(first, first + 12)
            kernels.cache_experts(
                active[steps], layers, experts, first + 1, halve_every, priority, resident, missing[steps]
            )
        found.append((missing.tolist(), priority.tolist(), resident.tolist()))
    assert found[0] == found[1]


def test_arrays_that_do_not_fit_are_refused() -> None:
    _compiled = importlib.import_module("eldr.kernels._compiled")

    floats, codes, wide = np.zeros(8, np.float32), np.zeros(8, np.uint8), np.zeros(8, np.uint32)
    doubles, fractions = np.zeros(8), np.zeros(8, np.uint16)
    frozen = np.zeros(8, np.float32)
    frozen.setflags(write=False)

    fitting = FleetState(np.zeros(32), doubles, [0] * 8, floats)
    weights: Any = PlacementWeights(1.0, 1.0, 1.0, 1.0)

    def cost(
        rows: Any,
        load: Any,
        batches: int,
        added: Any = doubles,
        products: Any = doubles,
        weights: Any = weights,
        **changes: Any,
    ) -> None:
        at_random, out = np.zeros(batches), np.zeros(len(rows))
        fleet = fitting._replace(**changes)
        _compiled.placement_cost(fleet, weights, added, products, at_random, np.array(rows), load, 1, 0, out)

    terms: Any = PrefillTerms(8.0, 0.5, 9.0, 1.0)

    def prefill(rows: Any, numbers: Any, terms: Any = terms, **changes: Any) -> None:
        given: Any = {"load": numbers, "waiting": numbers, "uncached": numbers} | changes
        fleet = fitting._replace(**{key: given.pop(key) for key in list(given) if key in FleetState._fields})
        _compiled.add_prefill(fleet, terms, np.array(rows), *given.values(), 1.0, 1.0, np.zeros(len(rows)))

    flags, counts = np.zeros(1, np.uint64), np.zeros(1, np.int64)

    def cache(layers: int = 2, active: Any = flags, priority: Any = None, resident: Any = codes) -> None:
        priority = np.zeros(8, np.uint64) if priority is None else priority
        _compiled.cache_experts(active, layers, 4, 1, 0, priority, resident, counts)

    cost([7], [3], 5)
    prefill([7], [3])
    cache()
    for call in (
        lambda: cache(layers=0),
        lambda: cache(layers=3),
        lambda: cache(active=np.zeros(2, np.uint64)),
        lambda: cache(active=counts),
        lambda: cache(priority=np.zeros(7, np.uint64)),
        lambda: cache(priority=np.zeros(8, np.int64)),
        lambda: cache(resident=np.zeros(8, np.bool_)),
        lambda: cache(resident=codes[:7]),
        lambda: _compiled.unpack_counts(b"123456", 8, 0, 2, 3, 0, 0, np.zeros(5, np.uint32)),
        lambda: _compiled.unpack_counts(b"123456", 17, 16, 2, 3, 0, 0, np.zeros(6, np.uint32)),
        lambda: _compiled.unpack_counts(b"123456", -1, 16, 2, 3, 0, 0, np.zeros(6, np.uint32)),
        lambda: _compiled.unpack_counts(b"", 8, 0, 0, 3, 0, 0, np.zeros(0, np.uint32)),
        lambda: _compiled.unpack_counts(b"", 8, 0, 2**40, 2**40, 0, 0, np.zeros(0, np.uint32)),
        lambda: _compiled.own_frequencies(np.zeros(7, np.uint32), floats, 1.0, 1.0, floats),
        lambda: _compiled.to_probabilities(floats, 3, 0.1, 0.9, 1.0, floats),
        lambda: _compiled.to_probabilities(floats, 0, 0.1, 0.9, 1.0, floats),
        lambda: _compiled.to_probabilities(floats, 2, 0.1, 0.9, 1.0, floats[:7]),
        lambda: _compiled.encode_signature(floats, codes[:7]),
        lambda: _compiled.encode_exposure(floats, 0.9, 1.0, codes[:7]),
        lambda: _compiled.shift_exposure(codes, 1, 1.0, wide[:7], fractions[:7], 0),
        lambda: _compiled.shift_exposure(codes, 1, 1.0, wide, fractions[:7], 0),
        lambda: _compiled.shift_exposure(codes, 1, 1.0, wide, fractions, 1),
        lambda: _compiled.shift_exposure(codes, 1, 1.0, wide, fractions, -1),
        lambda: _compiled.shift_exposure(codes[:0], 1, 1.0, wide, fractions, 0),
        lambda: _compiled.shift_exposure(codes, 1, 1.0, doubles, fractions, 0),
        lambda: _compiled.shift_exposure(codes, 1, 1.0, wide.byteswap().view(">u4"), fractions, 0),
        lambda: _compiled.move_towards(frozen, floats, 1.0),
        lambda: _compiled.move_towards(np.zeros(16, np.float32)[::2], floats, 1.0),
        lambda: _compiled.move_towards([0.0] * 8, floats, 1.0),
        lambda: _compiled.move_towards(floats, floats[:7], 1.0),
        lambda: _compiled.unit_direction(floats, floats[:7], 2, 1, floats),
        lambda: _compiled.unit_direction(floats, floats, 3, 1, floats),
        lambda: _compiled.unit_direction(floats, floats, 2, 2, floats),
        lambda: _compiled.unit_direction(floats, floats, 2, 0, floats),
        lambda: _compiled.row_products(np.zeros((2, 7), np.float32), floats, np.zeros(2)),
        lambda: _compiled.row_products(np.zeros((2, 8)), floats, np.zeros(2)),
        lambda: _compiled.row_products([floats], floats, np.zeros(1)),
        lambda: prefill([8], [3]),
        lambda: prefill([-1], [3]),
        lambda: prefill([], []),
        lambda: prefill([7], [3, 4]),
        lambda: prefill([7], [3], waiting=[]),
        lambda: prefill([7], [3], uncached=(3,)),
        lambda: prefill([7], [3], context=[0] * 7),
        lambda: prefill([7], [3], union=np.zeros(7)),
        lambda: prefill([7], [3], columns=np.zeros(31)),
        lambda: cost([8], [3], 5),
        lambda: cost([-1], [3], 5),
        lambda: cost([7], [4], 5),
        lambda: cost([7], [-1], 5),
        lambda: cost([7, 1], [1], 5),
        lambda: cost([7], (3,), 5),
        lambda: cost([7], [3], 5, context=[0] * 7),
        lambda: cost([7], [3], 5, columns=np.zeros(31)),
        lambda: cost([7], [3], 5, columns=np.zeros((8, 4)).T),
        lambda: cost([7], [3], 5, columns=[0.0] * 32),
        lambda: cost([7], [3], 5, union=doubles[:7]),
        lambda: cost([7], [3], 5, union=floats),
        lambda: cost([7], [3], 5, length=floats[:7]),
        lambda: cost([7], [3], 5, length=doubles),
        lambda: cost([7], [3], 5, added=np.zeros(16)[::2]),
        lambda: cost([7], [3], 5, products=doubles[:7]),
        lambda: cost(np.array([7], dtype=np.int32), [3], 5),
        lambda: cost([], [], 5),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            call()
    for call in (
        lambda: prefill([7], [3], load=[3.5]),
        lambda: prefill([7], [3], terms=(8.0, 0.5, 9.0, 1.0)),
        lambda: prefill([7], [3], terms=terms._replace(missed="a")),
        lambda: cost([7], [3.0], 5),
        lambda: cost([7], [2**70], 5),
        lambda: cost([7], [3], 5, weights=(1.0, 1.0, 1.0, 1.0)),
        lambda: cost([7], [3], 5, weights=fitting),
        lambda: cost([7], [3], 5, weights=weights._replace(anchor="a")),
        lambda: cost([7], [3], 5, context=[0] * 7 + ["a"]),
        lambda: _compiled.move_towards(floats, floats),
        lambda: _compiled.move_towards(floats, floats, "a"),
        lambda: _compiled.to_probabilities(floats, 2.0, 0.1, 0.9, 1.0, floats),
        lambda: _compiled.unpack_counts("123456", 8, 0, 2, 3, 0, -1, np.zeros(6, np.uint32)),
    ):
        with pytest.raises((TypeError, OverflowError)):
            call()


@needs_compiler
@pytest.mark.parametrize("position", [0, 1, 4])
@pytest.mark.parametrize(
    "unfit",
    [
        pytest.param(lambda array: array.astype(np.complex64), id="dtype"),
        pytest.param(lambda array: np.concatenate((array, array[:1])), id="too long"),
        pytest.param(lambda array: array[:-1], id="too short"),
        pytest.param(lambda array: np.concatenate((array, array))[::2], id="every second item"),
        pytest.param(lambda array: array[::-1], id="backwards"),
        pytest.param(lambda array: array.view(array.dtype.newbyteorder()), id="byte order"),
        pytest.param(lambda array: np.frombuffer(b"x" + array.tobytes(), array.dtype, offset=1), id="unaligned"),
        pytest.param(memoryview, id="no array"),
        pytest.param(lambda array: None, id="none"),
    ],
)
def test_no_array_is_taken_that_is_not_as_it_must_be(position: int, unfit: Callable[[NDArray[Any]], object]) -> None:
    """Each array of one call in turn: every kernel takes its arrays in the same way."""
    _compiled = importlib.import_module("eldr.kernels._compiled")

    arguments: list[Any] = [np.zeros(8, np.uint32), np.zeros(8, np.float32), 1.0, 1.0, np.zeros(8, np.float32)]
    _compiled.own_frequencies(*arguments)
    arguments[position] = unfit(arguments[position])
    with pytest.raises(ValueError, match="does not fit"):
        _compiled.own_frequencies(*arguments)


@pytest.mark.parametrize("wish", ["1", ""])
def test_the_environment_asks_for_numpy(wish: str) -> None:
    found = not wish and importlib.util.find_spec("eldr.kernels._compiled") is not None
    show = "from eldr import kernels; print(kernels.COMPILED, kernels.placement_cost.__module__)"
    environment = os.environ | {"ELDR_NO_EXTENSIONS": wish}
    shown = subprocess.run([sys.executable, "-c", show], env=environment, check=True, capture_output=True, text=True)
    assert shown.stdout.split() == [str(found), "eldr.kernels._compiled" if found else "eldr.kernels._numpy"]
