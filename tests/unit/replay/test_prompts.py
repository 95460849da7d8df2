"""Prompts from files, shared prefixes and the prefix cache, against plain definitions."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.replay.errors import ReplayError
from eldr.replay.prompts import (
    PrefixCache,
    Prompt,
    RecordedPrompts,
    SharedPrefixes,
    draw_prompts,
    read_prompts,
)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_files_of_production_traces(tmp_path: Path) -> None:
    azure = tmp_path / "azure.csv"
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,4808,10\n2023-11-16 18:17:04,3,8\n")
    assert read_prompts(azure).tokens.tolist() == [4808, 3]
    assert read_prompts(azure).blocks is None
    mooncake = tmp_path / "mooncake.jsonl"
    mooncake.write_text('{"input_length": 600, "hash_ids": [0, 7]}\n{"input_length": 1024, "hash_ids": [0, 9]}\n')
    found = read_prompts(mooncake)
    assert found.tokens.tolist() == [600, 1024]
    assert found.blocks == ((0, 7), (0, 9))
    mooncake.write_text('{"input_length": 600, "hash_ids": [0, 7]}\n{"input_length": 1024}\n')
    assert read_prompts(mooncake).blocks is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "TIMESTAMP\n1\n", "entry 1: not a prompt"),
        ("a.csv", "ContextTokens\n5\n0\n", "entry 2: not a prompt"),
        ("a.csv", "ContextTokens\n", "no prompts"),
        ("a.jsonl", "[]\n", "entry 1: not a prompt"),
        ("a.jsonl", "7\n", "entry 1: not a prompt"),
        ("a.jsonl", '{"input_length": "7"}\n', "entry 1: not a prompt"),
        ("a.jsonl", '{"input_length": 7, "hash_ids": 3}\n', "entry 1: not a prompt"),
        ("a.jsonl", '{"input_length": 7, "hash_ids": ["x"]}\n', "entry 1: not a prompt"),
        ("a.txt", "7\n", "expected a .csv file"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ReplayError, match=message):
        read_prompts(tmp_path / name)


def test_recorded_prompts_keep_their_order() -> None:
    recorded = RecordedPrompts(np.array([600, 700, 1024]), ((0, 1), (2, 3), (0, 4)))
    prompts = draw_prompts(recorded, None, 7, rng())
    assert prompts is not None
    found = [prompts.of(arrival, 5) for arrival in range(7)]
    first = [600, 700, 1024].index(found[0].tokens)
    assert [prompt.tokens for prompt in found] == [[600, 700, 1024][(first + at) % 3] for at in range(7)]
    # A block that is not full is kept nowhere.
    full = {600: (0,), 700: (2,), 1024: (0, 4)}
    assert all(tuple(prompt.blocks) == full[prompt.tokens] and prompt.block_tokens == 512 for prompt in found)
    assert draw_prompts(None, None, 7, rng()) is None


def test_shared_prefixes_follow_zipf_and_come_on_top() -> None:
    prompts = draw_prompts(None, SharedPrefixes(3, 64), 4000, rng())
    assert prompts is not None
    found = [prompts.of(arrival, 40) for arrival in range(4000)]
    assert {(prompt.tokens, len(prompt.blocks)) for prompt in found} == {(104, 6)}
    share = sorted(count / 4000 for count in Counter(tuple(prompt.blocks[:4]) for prompt in found).values())
    assert share == pytest.approx([2 / 11, 3 / 11, 6 / 11], abs=0.03)
    # Prefixes have no block in common with each other, and the rest of a prompt none with any.
    assert len({block for prompt in found for block in prompt.blocks[:4]}) == 12
    assert len({block for prompt in found for block in prompt.blocks[4:]}) == 8000


def test_prefixes_are_shared_by_one_source_only() -> None:
    recorded = RecordedPrompts(np.array([600]), ((0, 1),))
    with pytest.raises(ReplayError, match="already share"):
        draw_prompts(recorded, SharedPrefixes(3, 64), 5, rng())
    longer = draw_prompts(RecordedPrompts(np.array([600])), SharedPrefixes(1, 64), 5, rng())
    assert longer is not None
    assert longer.of(0, 7).tokens == 664


class PlainCache:
    """The definition: a list of blocks by time of use, and a loop."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.used: list[int] = []

    def cached(self, blocks: tuple[int, ...], tokens: int) -> int:
        found = 0
        while found < len(blocks) and blocks[found] in self.used and (found + 1) * 16 <= tokens - 1:
            found += 1
        return found * 16

    def keep(self, blocks: tuple[int, ...]) -> None:
        self.used = [block for block in self.used if block not in blocks] + list(reversed(blocks))
        self.used = self.used[max(len(self.used) - self.most, 0) :]


@settings(deadline=None)
@given(
    capacity_tokens=st.integers(0, 200),
    prompts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 15)), max_size=30),
)
def test_the_cache_is_the_one_of_its_definition(capacity_tokens: int, prompts: list[tuple[int, int, int]]) -> None:
    cache, plain = PrefixCache(capacity_tokens), PlainCache(capacity_tokens // 16)
    unlimited, all_kept = PrefixCache(None), PlainCache(10**6)
    for kind, length, beyond in prompts:
        blocks = tuple(range(100 * kind, 100 * kind + length))
        prompt = Prompt(max(16 * length + beyond, 1), blocks)
        for mine, its in ((cache, plain), (unlimited, all_kept)):
            assert mine.cached_tokens(prompt) == its.cached(blocks, prompt.tokens)
            mine.keep(prompt)
            its.keep(blocks)
