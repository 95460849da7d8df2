"""A trace as bit sets: one row of words per decode step of a request, one bit per (layer, expert)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.counts import ExpertCounts
from eldr.prompt.words import Words, words_of_text
from eldr.replay.errors import ReplayError
from eldr.trace import Trace

# This many rows are unpacked to one byte per (layer, expert) at a time, to bound the working memory.
ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, eq=False)
class PackedTrace:
    """The parts of a trace that a replay needs.

    words: uint64 [T, ceil(L * E / 64)]. Bit l * E + e is set if the step activates expert e in layer l.
    first_row, end_row: int [N], the rows of each request.
    prompt_tokens: int [N].
    label: str [N].
    counts: the expert counts of each prompt, as the router would receive them.
    prompts: the words of each prompt, as the router would read them. None if the trace has no prompts.
    """

    words: NDArray[np.uint64]
    first_row: list[int]
    end_row: list[int]
    prompt_tokens: list[int]
    label: list[str]
    counts: list[ExpertCounts]
    layers: int
    experts: int
    top_k: int
    prompts: list[Words] | None = None

    @property
    def requests(self) -> int:
        return len(self.first_row)

    def steps(self, request: int) -> int:
        """Decode steps of one request, which is one less than its generated tokens."""
        return self.end_row[request] - self.first_row[request]

    def decode_counts(self, request: int) -> ExpertCounts:
        """The experts of a request's decode steps, counted. Its `prompt_tokens` are these steps."""
        rows = self.words[self.first_row[request] : self.end_row[request]]
        bits = np.unpackbits(rows.view(np.uint8), axis=1, bitorder="little", count=self.layers * self.experts)
        counts = bits.sum(axis=0, dtype=np.uint32).reshape(self.layers, self.experts)
        return ExpertCounts(counts, len(rows), self.top_k)

    def untouched(self, request: int, tokens: int) -> NDArray[np.float64]:
        """Probability that so many tokens of a request's prompt activate none of each (layer, expert), float64 [L * E].

        Each token counts as an independent draw from the experts that the whole prompt used.
        """
        counts = self.counts[request]
        return np.asarray((1 - counts.counts.reshape(-1) / counts.prompt_tokens) ** tokens)


def pack_trace(trace: Trace, max_output: int | None = None) -> PackedTrace:
    """Pack `trace` into bit sets. Each request is cut after `max_output` generated tokens.

    Raises ReplayError if no request has a decode step left.
    """
    meta = trace.meta
    first_row = trace.decode_offsets[:-1]
    steps = np.diff(trace.decode_offsets)
    if max_output is not None:
        steps = np.minimum(steps, max_output - 1)
    if not steps.any():
        raise ReplayError("no request of the trace has a decode step; record with more generated tokens")
    return PackedTrace(
        words=pack_rows(trace.decode_experts, meta.experts),
        first_row=first_row.tolist(),
        end_row=(first_row + steps).tolist(),
        prompt_tokens=trace.prompt_tokens.tolist(),
        label=trace.label.tolist(),
        counts=[
            ExpertCounts(counts, int(tokens), meta.top_k)
            for counts, tokens in zip(trace.prefill_counts, trace.prompt_tokens, strict=True)
        ],
        layers=meta.layers,
        experts=meta.experts,
        top_k=meta.top_k,
        prompts=_prompts(trace) if trace.has_prompts else None,
    )


def _prompts(trace: Trace) -> list[Words]:
    return [words_of_text(trace.prompt(request)) for request in range(trace.requests)]


def pack_rows(decode_experts: NDArray[np.unsignedinteger[Any]], experts: int) -> NDArray[np.uint64]:
    """Pack expert ids [T, L, k] into bit sets, uint64 [T, ceil(L * E / 64)]."""
    rows, layers, _ = decode_experts.shape
    bits = layers * experts
    words = np.zeros((rows, -(-bits // 64)), dtype=np.uint64)
    layer_start = (np.arange(layers) * experts)[:, None]
    for start in range(0, rows, ROWS_AT_ONCE):
        ids = decode_experts[start : start + ROWS_AT_ONCE].astype(np.int64) + layer_start
        flags = np.zeros((len(ids), words.shape[1] * 64), dtype=np.uint8)
        np.put_along_axis(flags, ids.reshape(len(ids), -1), 1, axis=1)
        words[start : start + len(ids)] = np.packbits(flags, axis=1, bitorder="little").view(np.uint64)
    return words


def request_rows(words: NDArray[np.uint64], rows: list[int], steps: int) -> list[NDArray[np.uint64]]:
    """For each of `rows` the experts of this row and the next ones, as views, uint64 [steps, words]."""
    return [words[row : row + steps] for row in rows]


def union_rows(words: NDArray[np.uint64], rows: list[int], steps: int) -> NDArray[np.uint64]:
    """The experts of each step as bit sets, uint64 [steps, words]. Step s is the union over the rows `row + s`."""
    if not rows:
        return np.zeros((steps, words.shape[1]), dtype=np.uint64)
    first, *others = request_rows(words, rows, steps)
    if not others:
        return first
    union = first | others[0]
    for more in others[1:]:
        np.bitwise_or(union, more, out=union)
    return union
