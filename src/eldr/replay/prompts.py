"""The prompts of a replay: their lengths and the blocks of the prefix cache that they share.

The experts of a prompt are those of the trace. Its length may come from the published files of production traces, and
so may the blocks that prompts have in common. Otherwise shared prefixes can be drawn.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.replay.errors import ReplayError
from eldr.replay.recorded import read_entries

# Tokens of a block: of Mooncake's traces, and of vLLM's prefix cache.
MOONCAKE_BLOCK, VLLM_BLOCK = 512, 16
# More blocks than any prompt has. Blocks of different prompts then have different numbers.
_SPREAD = 2**32


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    tokens: its length.
    blocks: its full blocks in order, each named by a number that stands for everything up to its end. Prompts that
        begin alike share them. Empty if nothing is known of them.
    block_tokens: the tokens of a block.
    """

    tokens: int
    blocks: Sequence[int] = ()
    block_tokens: int = VLLM_BLOCK


@dataclass(frozen=True, slots=True, eq=False)
class RecordedPrompts:
    """The prompts of a production trace, in order of arrival.

    tokens: int64 [n], at least 1.
    blocks: the blocks of each. None if the trace does not have them.
    """

    tokens: NDArray[np.int64]
    blocks: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Every prompt begins with one of a few prefixes, such as system prompts or documents, drawn by Zipf's law.

    The i-th prefix is drawn with a probability that goes with 1 / i, whatever the request's kind.

    count: how many prefixes there are.
    tokens: the length of each. It comes on top of the prompt's own.
    """

    count: int
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """The prompts of a run, by arrival.

    recorded: prompts of a file, one for each arrival. None for the lengths of the trace.
    prefix: int64 [n], the prefix that each arrival's prompt begins with. None without shared prefixes.
    prefix_tokens: the length of a prefix.
    block_tokens: the tokens of a block.
    """

    recorded: RecordedPrompts | None = None
    prefix: NDArray[np.int64] | None = None
    prefix_tokens: int = 0
    block_tokens: int = VLLM_BLOCK

    def of(self, arrival: int, trace_tokens: int) -> Prompt:
        """Return the prompt of an arrival. trace_tokens: the length of the prompt in the trace."""
        tokens = trace_tokens if self.recorded is None else int(self.recorded.tokens[arrival])
        if self.prefix is not None:
            shared = self.prefix_tokens // self.block_tokens
            tokens += self.prefix_tokens
            own = tokens // self.block_tokens - shared
            first, first_own = _SPREAD * int(self.prefix[arrival]), -_SPREAD * (arrival + 1)
            blocks = (*range(first, first + shared), *range(first_own, first_own + own))
            return Prompt(tokens, blocks, self.block_tokens)
        if self.recorded is not None and self.recorded.blocks is not None:
            return Prompt(tokens, self.recorded.blocks[arrival][: tokens // self.block_tokens], self.block_tokens)
        return Prompt(tokens)


def draw_prompts(
    recorded: RecordedPrompts | None, shared: SharedPrefixes | None, count: int, rng: np.random.Generator
) -> Prompts | None:
    """Draw the prompts of `count` arrivals. None if they are those of the trace.

    Recorded prompts keep their order and begin at a random place, because a conversation's turns follow each other.
    Raises ReplayError if both are given and the recorded ones have blocks of their own.
    """
    if recorded is not None:
        start = int(rng.integers(len(recorded.tokens)))
        at = (np.arange(count) + start) % len(recorded.tokens)
        blocks = None if recorded.blocks is None else tuple(recorded.blocks[index] for index in at.tolist())
        recorded = RecordedPrompts(recorded.tokens[at], blocks)
    has_blocks = recorded is not None and recorded.blocks is not None
    if shared is None:
        block_tokens = MOONCAKE_BLOCK if has_blocks else VLLM_BLOCK
        return None if recorded is None else Prompts(recorded, block_tokens=block_tokens)
    if has_blocks:
        raise ReplayError("the recorded prompts already share prefixes; omit --shared-prefixes")
    weights = 1 / np.arange(1, shared.count + 1)
    prefix = rng.choice(shared.count, count, p=weights / weights.sum())
    return Prompts(recorded, np.asarray(prefix, dtype=np.int64), shared.tokens)


def read_prompts(path: Path) -> RecordedPrompts:
    """Read the prompts of a production trace.

    path: a .csv file with a ContextTokens column (Azure LLM inference traces), or a .jsonl file of objects with an
        "input_length" and, optionally, "hash_ids" of blocks of 512 tokens (Mooncake traces).
    Raises ReplayError with the file and the line.
    """
    parsers: dict[str, Callable[[Any], tuple[int, tuple[int, ...] | None]]] = {".csv": _azure, ".jsonl": _mooncake}
    found = read_entries(path, "prompts", "a prompt", parsers, "a .csv file of Azure or a .jsonl file of Mooncake")
    if not found:
        raise ReplayError(f"prompts {path}: no prompts")
    tokens = np.array([length for length, _ in found], dtype=np.int64)
    blocks = tuple(blocks for _, blocks in found if blocks is not None)
    return RecordedPrompts(tokens, blocks if len(blocks) == len(found) else None)


def _azure(row: dict[str, str]) -> tuple[int, None]:
    return _length(int(row["ContextTokens"])), None


def _mooncake(line: str) -> tuple[int, tuple[int, ...] | None]:
    entry = json.loads(line)
    tokens = _length(entry["input_length"])
    blocks = entry.get("hash_ids")
    return tokens, None if blocks is None else tuple([int(block) for block in blocks])


def _length(tokens: int) -> int:
    if type(tokens) is not int or not 1 <= tokens < 2**31:
        raise ValueError(f"a prompt of {tokens!r} tokens")
    return tokens


class PrefixCache:
    """The blocks of prompts that a worker has kept, least recently used first.

    capacity_tokens: tokens that it keeps, at most. None for no limit.

    A worker computes prompts in order of arrival and keeps a block as soon as it is to be computed. So a prompt finds
    what earlier arrivals have left, and the cache can be asked and told when a request arrives.
    """

    def __init__(self, capacity_tokens: int | None) -> None:
        self._capacity_tokens = capacity_tokens
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def cached_tokens(self, prompt: Prompt) -> int:
        """The tokens of `prompt` that need not be computed: whole blocks from its start, but never its last token."""
        found = 0
        for block in prompt.blocks[: (prompt.tokens - 1) // prompt.block_tokens]:
            if block not in self._blocks:
                break
            found += 1
        return found * prompt.block_tokens

    def keep(self, prompt: Prompt) -> None:
        """Keep the prompt's blocks, its first as the most recently used: a chain is of no use without its start."""
        blocks = self._blocks
        for block in reversed(prompt.blocks):
            blocks[block] = None
            blocks.move_to_end(block)
        most = np.inf if self._capacity_tokens is None else self._capacity_tokens // prompt.block_tokens
        while len(blocks) > most:
            blocks.popitem(last=False)
