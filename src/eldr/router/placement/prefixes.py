"""Which worker has how much of a prompt in its prefix cache, as far as the router can know.

A prompt is a chain of chunks, each known by a hash of itself and of the hash before it, as in vLLM's own prefix cache
(vllm/v1/core/kv_cache_utils.py). The router remembers which chunks it sent where. It forgets them in the order in which
a worker evicts their blocks: least recently used first, and of one prompt the end before the beginning
(vllm/v1/core/single_type_kv_cache_manager.py frees the blocks of a request in reverse). So a worker that has a chunk
has all chunks before it.

This is an estimate. The workers' caches also hold generated tokens and the prompts of other routers, and a worker may
be told to drop its cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from eldr.router.fleet.workers import Worker

# vLLM's blocks have 16 tokens. A chunk of text has about eight of them.
CHUNK_BYTES: Final = 512
# The most that is remembered of one worker: four million tokens of text, in about five megabytes.
MOST_CHUNKS: Final = 32768


class Prefix:
    """The start of a prompt as a chain of chunks.

    chunks: the hashes of the whole chunks. They are 64 bits, and mean something within this process only.
    chunk_tokens: about how many tokens a chunk has.
    prompt_tokens: about how many tokens the prompt has.
    """

    __slots__ = ("chunk_tokens", "chunks", "prompt_tokens")

    def __init__(self, text: bytes, bytes_per_token: float, prompt_tokens: int, adapter: str = "") -> None:
        """text: the start of the prompt. adapter: the LoRA adapter that computes it, whose blocks are its own."""
        self.chunk_tokens = CHUNK_BYTES / bytes_per_token
        self.prompt_tokens = prompt_tokens
        self.chunks: list[int] = []
        # Python's own hash is keyed, so no client can make its chunks look like another's.
        chained = hash(adapter)
        for end in range(CHUNK_BYTES, len(text) + 1, CHUNK_BYTES):
            chained = hash((chained, text[end - CHUNK_BYTES : end]))
            self.chunks.append(chained)


class SeenPrefixes:
    """The chunks that each worker of a group has probably cached."""

    def __init__(self) -> None:
        # Worker -> hashes of chunks, the least recently used first.
        self._seen: dict[str, OrderedDict[int, None]] = {}

    def cached_tokens(self, prefix: Prefix, workers: Iterable[str]) -> dict[str, int]:
        """Of `workers`, those that have a part of this prompt: worker -> about how many tokens."""
        found: dict[str, int] = {}
        chunks = prefix.chunks
        if chunks:
            for worker in workers:
                seen = self._seen.get(worker)
                if seen is not None and chunks[0] in seen:
                    found[worker] = min(int(_known(chunks, seen) * prefix.chunk_tokens), prefix.prompt_tokens)
        return found

    def sent(self, prefix: Prefix, worker: Worker) -> None:
        """`worker` gets this prompt, and will have it cached."""
        most = MOST_CHUNKS
        if worker.cache_tokens is not None:
            most = min(most, int(worker.cache_tokens / prefix.chunk_tokens))
        seen = self._seen.get(worker.url)
        if seen is None:
            seen = self._seen[worker.url] = OrderedDict()
        for chunk in reversed(prefix.chunks):
            seen[chunk] = None
            seen.move_to_end(chunk)
        while len(seen) > most:
            seen.popitem(last=False)

    def forget(self, worker: str) -> None:
        """`worker` has left, or may have lost its cache."""
        self._seen.pop(worker, None)


def _known(chunks: list[int], seen: OrderedDict[int, None]) -> int:
    """How many of the first chunks are in `seen`, which has the first. By bisection: none is there without the rest."""
    low, high = 1, len(chunks)
    while low < high:
        middle = (low + high + 1) // 2
        if chunks[middle - 1] in seen:
            low = middle
        else:
            high = middle - 1
    return low
