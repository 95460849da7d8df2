"""What steps wait for, by each choice of replica: against enumeration and an LP solver on small cases."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linprog

from eldr.expert_ranks.placement import ExpertPlacement, PlacementError, contiguous
from eldr.expert_ranks.replicas import BalancedTokens, FewestActive, RandomReplica, ReplicaChoice

EXPERTS, LAYERS = 6, 2


def made(seed: int, ranks: int, redundant: int) -> ExpertPlacement:
    """Any placement, another one in each layer. Two copies may be on one rank."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(LAYERS):
        slots = np.concatenate((np.arange(EXPERTS), rng.integers(0, EXPERTS, redundant)))
        rows.append(rng.permutation(slots))
    return ExpertPlacement(EXPERTS, ranks, np.array(rows))


def slots_of(placement: ExpertPlacement, layer: int) -> list[list[int]]:
    """The ranks of the slots of every expert."""
    room = placement.expert_of_slot.shape[1] // placement.ranks
    row = placement.expert_of_slot[layer].tolist()
    return [[slot // room for slot, held in enumerate(row) if held == expert] for expert in range(EXPERTS)]


def drawn_tokens(seed: int, steps: int = 8, most: int = 3) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return (rng.integers(1, most + 1, (steps, LAYERS, EXPERTS)) * (rng.random((steps, LAYERS, EXPERTS)) < 0.6)).astype(
        np.uint8
    )


PLACED = st.tuples(st.integers(0, 1000), st.sampled_from([(2, 2), (2, 4), (4, 2), (3, 3), (5, 4)]))


@settings(max_examples=40)
@given(PLACED, st.integers(0, 1000))
def test_fewest_active_is_the_best_of_all_choices(placed: tuple[int, tuple[int, int]], seed: int) -> None:
    placement = made(placed[0], *placed[1])
    tokens = drawn_tokens(seed)
    expected = []
    for step in tokens:
        total = 0
        for layer in range(LAYERS):
            ranks = slots_of(placement, layer)
            active = [expert for expert in range(EXPERTS) if step[layer, expert]]
            total += min(
                max(np.bincount(chosen, minlength=1)) if chosen else 0
                for chosen in product(*[sorted(set(ranks[expert])) for expert in active])
            )
        expected.append(total)
    assert FewestActive(placement).reads(tokens).tolist() == expected


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_without_copies_every_choice_waits_for_the_busiest_rank(ranks: int) -> None:
    placement = made(1, ranks, 0)
    tokens = drawn_tokens(2)
    expected = []
    for step in tokens:
        ranks_of = [slots_of(placement, layer) for layer in range(LAYERS)]
        expected.append(
            sum(
                max(sum(1 for e in range(EXPERTS) if step[layer, e] and of[e] == [rank]) for rank in range(ranks))
                for layer, of in enumerate(ranks_of)
            )
        )
    assert FewestActive(placement).reads(tokens).tolist() == expected
    active = np.random.default_rng(3).random((5, LAYERS, EXPERTS))
    share = [
        sum(
            max(sum(step[layer, e] for e in range(EXPERTS) if of[e] == [rank]) for rank in range(ranks))
            for layer, of in enumerate(ranks_of)
        )
        for step in active
    ]
    assert FewestActive(placement).expected(active) == pytest.approx(share, rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 2), (3, 3), (4, 2)])
def test_random_replicas_are_drawn_for_every_token(shape: tuple[int, int]) -> None:
    """The mean over many draws, against all draws of a step of few tokens."""
    placement = made(7, *shape)
    tokens = drawn_tokens(5, steps=2, most=2)
    expected = []
    for step in tokens:
        total = 0.0
        for layer in range(LAYERS):
            room = placement.expert_of_slot.shape[1] // placement.ranks
            row = placement.expert_of_slot[layer].tolist()
            of_tokens = [
                [slot for slot, held in enumerate(row) if held == expert]
                for expert in range(EXPERTS)
                for _ in range(step[layer, expert])
            ]
            every = [max(np.bincount([s // room for s in set(chosen)])) for chosen in product(*of_tokens)]
            total += float(np.mean(every))
        expected.append(total)
    choice = RandomReplica(placement, 1)
    found = choice.reads(np.repeat(tokens, 4000, axis=0)).reshape(2, 4000).mean(axis=1)
    assert found == pytest.approx(expected, abs=0.05)


def least_tokens(placement: ExpertPlacement, layer: int, tokens: list[float]) -> float:
    """The tokens of the busiest rank, by a linear programme: minimise m, sum of shares 1, load of every rank <= m."""
    ranks = slots_of(placement, layer)
    variables = [(expert, rank) for expert in range(EXPERTS) for rank in ranks[expert]]
    cost = np.zeros(len(variables) + 1)
    cost[-1] = 1
    load = np.zeros((placement.ranks, len(cost)))
    load[:, -1] = -1
    share = np.zeros((EXPERTS, len(cost)))
    for at, (expert, rank) in enumerate(variables):
        load[rank, at] += 1
        share[expert, at] = 1
    solved = linprog(cost, load, np.zeros(placement.ranks), share, tokens)
    assert solved.fun is not None
    return float(solved.fun)


@settings(max_examples=25, deadline=None)
@given(PLACED, st.integers(0, 1000))
def test_tokens_are_balanced_as_the_linear_programme_says(placed: tuple[int, tuple[int, int]], seed: int) -> None:
    placement = made(placed[0], *placed[1])
    tokens = drawn_tokens(seed, steps=4, most=9)
    by_layer = tokens.transpose(1, 0, 2).astype(np.float32)
    divided = BalancedTokens(placement).divided(by_layer)
    several = placement.copies() > 1
    for layer in range(LAYERS):
        ranks = slots_of(placement, layer)
        replicated = np.flatnonzero(several[layer]).tolist()
        for step in range(len(tokens)):
            load = np.zeros(placement.ranks)
            for expert in range(EXPERTS):
                if not several[layer, expert]:
                    load[ranks[expert][0]] += tokens[step, layer, expert]
                    continue
                shares = divided[layer, step, replicated.index(expert), : len(ranks[expert])]
                assert shares.min() >= -1e-4
                assert shares.sum() == pytest.approx(float(tokens[step, layer, expert]), abs=1e-3)
                np.add.at(load, ranks[expert], shares)
            best = least_tokens(placement, layer, tokens[step, layer].astype(float).tolist())
            assert best - 1e-3 <= load.max() <= 1.01 * best + 0.05


def test_a_copy_is_read_if_it_gets_a_token() -> None:
    """Two ranks; expert 0 is on both, 1 on the first and 2 on the second."""
    placement = ExpertPlacement(3, 2, np.array([[0, 1, 0, 2]]))
    balanced = BalancedTokens(placement)
    # Four tokens of expert 0 go two and two, so each rank reads it. With one token only one rank does.
    assert balanced.reads(np.array([[[4, 1, 1]], [[1, 0, 0]], [[0, 3, 0]]], dtype=np.uint8)).tolist() == [2, 1, 1]
    # The five tokens of expert 1 keep its rank busy, so the two of expert 0 go to the other.
    assert balanced.reads(np.array([[[2, 5, 0]], [[2, 5, 1]]], dtype=np.uint8)).tolist() == [1, 2]


@pytest.mark.parametrize("make", [lambda p: RandomReplica(p, 0), BalancedTokens, FewestActive])
def test_expected_reads_are_between_what_certainty_gives(make: type[ReplicaChoice]) -> None:
    placement = made(11, 4, 2)
    choice = make(placement)  # type: ignore[call-arg]
    nothing = choice.expected(np.zeros((3, LAYERS, EXPERTS)))
    likely = choice.expected(np.full((3, LAYERS, EXPERTS), 0.5))
    assert nothing.tolist() == [0, 0, 0]
    assert (likely > 0).all()
    everything = choice.expected(np.ones((3, LAYERS, EXPERTS)))
    assert (everything > likely).all()
    assert (everything <= LAYERS * 2 + 1e-6).all(), "no rank has more than its two slots"


def test_random_copies_of_poisson_tokens_are_independent() -> None:
    """p = 0.75: four tokens in the mean of Poisson's ln 4, half of them for each copy, which is idle with 1/2."""
    placement = ExpertPlacement(2, 2, np.array([[0, 1, 0, 1]]))
    assert RandomReplica(placement, 0).expected(np.array([[[0.75, 0.0]]])) == pytest.approx([0.5])


def test_too_many_ranks_for_an_exact_choice_are_refused() -> None:
    with pytest.raises(PlacementError, match="at most 10 ranks, not 16"):
        FewestActive(contiguous(1, 16, 16, 16))
    FewestActive(contiguous(1, 16, 16))
