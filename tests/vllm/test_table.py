"""BlockTable and the routing functions against plain Python."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eldr.engines.vllm.hostcopy import HostCopy
from eldr.engines.vllm.routing import distinct_experts, experts_at, tokens_at
from eldr.engines.vllm.table import BlockTable, row_dtype, unpack_sum

LAYERS, EXPERTS, TOP_K = 3, 7, 2


def random_experts(rng: np.random.Generator, tokens: int) -> NDArray[np.int32]:
    picks = rng.permuted(np.tile(np.arange(EXPERTS), (tokens, LAYERS, 1)), axis=2)
    return picks[:, :, :TOP_K].astype(np.int32)


@dataclass
class PlainBlock:
    """A block as a list of the tokens computed into it; loaded tokens are not among them."""

    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    loaded: bool = False


def plain_counts(blocks: list[PlainBlock]) -> NDArray[np.uint32]:
    counts = np.zeros((LAYERS, EXPERTS), dtype=np.uint32)
    for block in blocks:
        for token in block.tokens:
            for layer in range(LAYERS):
                for expert in token[layer]:
                    counts[layer, expert] += 1
    return counts


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    block_size=st.sampled_from([1, 2, 3, 16, 255, 256]),
    rounds=st.integers(1, 30),
)
def test_table_agrees_with_plain_python(seed: int, block_size: int, rounds: int) -> None:
    """Sequences come, grow by random steps, share full prefix blocks, and leave their blocks to others."""
    rng = np.random.default_rng(seed)
    blocks_in_all = 12
    table = BlockTable(blocks_in_all, block_size, LAYERS, EXPERTS, device="cpu")
    plain = [PlainBlock() for _ in range(blocks_in_all)]
    for _ in range(rounds):
        chosen = [int(b) for b in rng.permutation(blocks_in_all)[: int(rng.integers(1, 5))]]
        loaded = [b for b in chosen if rng.random() < 0.2]
        table.take(chosen, loaded=False)
        table.take(loaded, loaded=True)
        for b in chosen:
            plain[b] = PlainBlock(loaded=b in loaded)
        tokens = int(rng.integers(1, len(chosen) * block_size + 1))
        slots = np.array([chosen[t // block_size] * block_size + t % block_size for t in range(tokens)])
        experts = random_experts(rng, tokens)
        padding = int(rng.integers(0, 4))
        table.add(
            torch.from_numpy(np.concatenate([slots, np.full(padding, -1, dtype=slots.dtype)])),
            torch.from_numpy(np.concatenate([experts, random_experts(rng, padding)])),
        )
        for slot, choice in zip(slots, experts, strict=True):
            plain[slot // block_size].tokens.append(choice)

        asked = [int(b) for b in rng.permutation(blocks_in_all)[: int(rng.integers(1, 5))]]
        length = int(rng.integers(1, len(asked) * block_size + 1))
        used = asked[: -(-length // block_size)]
        holds = [block_size] * (len(used) - 1) + [length - (len(used) - 1) * block_size]
        got = unpack_sum(table.sum(asked, length).numpy(), LAYERS, EXPERTS)
        if any(plain[b].loaded for b in used):
            assert got == "kv_load"
        elif [len(plain[b].tokens) for b in used] != holds:
            assert got == "incomplete"
        else:
            np.testing.assert_array_equal(got, plain_counts([plain[b] for b in used]))


def test_one_expert_of_every_token_in_the_largest_block_of_each_dtype() -> None:
    for block_size in (255, 256, 40_000):
        table = BlockTable(1, block_size, 1, 2, device="cpu")
        table.take([0], loaded=False)
        table.add(torch.arange(block_size), torch.ones((block_size, 1, 1), dtype=torch.int32))
        np.testing.assert_array_equal(unpack_sum(table.sum([0], block_size).numpy(), 1, 2), [[0, block_size]])


def test_tokens_computed_twice_are_noticed() -> None:
    table = BlockTable(1, 4, 1, 2, device="cpu")
    table.take([0], loaded=False)
    for _ in range(2):
        table.add(torch.arange(4), torch.zeros((4, 1, 1), dtype=torch.int32))
    assert unpack_sum(table.sum([0], 4).numpy(), 1, 2) == "incomplete"


@pytest.mark.parametrize(("block_size", "size"), [(1, 1), (16, 1), (255, 1), (256, 2), (32_767, 2), (32_768, 4)])
def test_rows_are_as_small_as_they_can_be(block_size: int, size: int) -> None:
    dtype = row_dtype(block_size)
    assert dtype.itemsize == size
    assert torch.iinfo(dtype).max >= block_size


@pytest.mark.parametrize(
    ("experts", "moe_layers", "kv_bytes_per_token"),
    [
        # Qwen3-30B-A3B: 48 layers, keys and values of 4 heads x 128 in bfloat16.
        pytest.param(128, 48, 48 * 2 * 4 * 128 * 2, id="Qwen3-30B-A3B"),
        # GPT-OSS-120B: a block holds the 18 full-attention layers, or as many sliding-window ones.
        pytest.param(128, 36, 18 * 2 * 8 * 64 * 2, id="GPT-OSS-120B"),
    ],
)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_table_takes_less_than_a_percent_of_the_cache(
    experts: int, moe_layers: int, kv_bytes_per_token: int, block_size: int
) -> None:
    blocks = 2000
    table = BlockTable(blocks, block_size, moe_layers, experts, device="cpu")
    assert table.nbytes < 0.01 * blocks * block_size * kv_bytes_per_token


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), tokens=st.integers(1, 20))
def test_step_routing_agrees_with_plain_python(seed: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    slots = rng.permutation(100)[:tokens]
    experts = random_experts(rng, tokens)
    here, there = torch.from_numpy(slots), torch.from_numpy(experts)
    chosen = [t for t in range(tokens) if rng.random() < 0.5]

    def distinct(which: list[int]) -> list[int]:
        return [len({int(e) for t in which for e in experts[t, layer]}) for layer in range(LAYERS)]

    mask = tokens_at(here, [int(slots[t]) for t in chosen])
    assert mask.tolist() == [t in chosen for t in range(tokens)]
    assert distinct_experts(there, EXPERTS, mask).tolist() == distinct(chosen)
    assert distinct_experts(there, EXPERTS).tolist() == distinct(list(range(tokens)))
    rows = experts_at(here, there, [int(slots[t]) for t in chosen] + [1000])
    np.testing.assert_array_equal(rows[:-1].numpy(), experts[chosen])
    assert (rows[-1] == -1).all()


def test_host_copy_survives_pickling() -> None:
    copy = HostCopy(torch.tensor([[1, 2], [3, 4]]))
    assert copy.ready()
    assert Counter(pickle.loads(pickle.dumps(copy)).numpy().ravel().tolist()) == Counter([1, 2, 3, 4])
