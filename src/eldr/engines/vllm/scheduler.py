"""The scheduler side: follows every request through its blocks, plans what the worker counts, and answers requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from eldr.counts import CountsError, ExpertCounts, encode_counts, encode_unavailable
from eldr.engines.vllm.messages import EndedPrefill, Geometry, RecordedRows, RecordedSpan, StepPlan, StepResult
from eldr.engines.vllm.table import unpack_sum
from eldr.expert_rows import encode_rows


class Reports(Protocol):
    """Takes the experts of finished requests (reports.py)."""

    def draws(self, request_id: str) -> bool: ...

    def put(self, request_id: str, counts: ExpertCounts) -> None: ...

    def incomplete(self) -> None: ...


class _Tally:
    """Counts the decode rows of a request that will be reported.

    A position counts once, when it is first seen. A preempted request computes its tokens again.
    """

    __slots__ = ("_complete", "_counts", "_next", "_rows")

    def __init__(self, prompt_tokens: int) -> None:
        self._next = prompt_tokens
        self._rows = 0
        self._counts: NDArray[np.uint32] | None = None
        self._complete = True

    def add(self, first_position: int, rows: NDArray[np.integer[Any]], geometry: Geometry) -> None:
        """Count `rows`, [T, L, k], of consecutive positions."""
        if self._counts is None:
            self._counts = np.zeros((geometry.layers, geometry.experts), dtype=np.uint32)
        fresh = rows[max(0, self._next - first_position) :]
        if first_position > self._next or (fresh < 0).any():
            self._complete = False
        if not self._complete:
            return
        layers = np.arange(geometry.layers)[:, None]
        for row in fresh:
            self._counts[layers, row] += 1  # a token chooses an expert once
        self._rows += len(fresh)
        self._next += len(fresh)

    def counts(self, generated_tokens: int, geometry: Geometry) -> ExpertCounts | None:
        """The counts of all decode rows. None if they are not all there."""
        if self._counts is None or not self._complete or self._rows != generated_tokens - 1:
            return None
        return ExpertCounts(self._counts, self._rows, geometry.top_k)


@dataclass(slots=True)
class _Request:
    prompt_tokens: int
    counted: bool
    recorded: bool
    tally: _Tally | None = None
    blocks: list[int] = field(default_factory=list)
    local_hit_tokens: int = 0
    counts: dict[str, Any] | None = None
    rows: dict[int, NDArray[np.integer[Any]]] = field(default_factory=dict)  # position -> [L, k]
    marked_blocks: int = 0  # the first so many blocks need not be named in StepPlan.drafted again


class RequestTracker:
    """Follows requests from arrival to finish.

    group: the index of the full-attention KV cache group.
    block_size: tokens per block of that group.
    draft_tokens: the most tokens that are drafted for a request in a step (speculative decoding). If there are any,
        generated tokens cannot be attributed to positions.
    reports: takes the experts of finished requests. None if nobody does.
    """

    def __init__(self, group: int, block_size: int, *, draft_tokens: int = 0, reports: Reports | None = None) -> None:
        self._group = group
        self._block_size = block_size
        self._draft_tokens = draft_tokens
        self._reports = None if draft_tokens else reports
        self._geometry: Geometry | None = None  # known after the first result
        self._requests: dict[str, _Request] = {}
        self._plan = StepPlan()
        # Requests that finished in the step whose result is still to come, with the answer that was already returned.
        # It is None for requests that are only reported.
        self._answered: dict[str, tuple[_Request, int, dict[str, Any] | None]] = {}

    def arrived(self, request_id: str, prompt_tokens: int, params: dict[str, Any] | None) -> None:
        """A request was added. params: its kv_transfer_params."""
        params = params or {}
        recorded = params.get("eldr_record") is True
        counted = recorded or bool(params.get("do_remote_decode"))
        reports = self._reports
        # The one token that a prefill worker generates has no decode row.
        reported = reports is not None and not params.get("do_remote_decode") and reports.draws(request_id)
        tally = _Tally(prompt_tokens) if reported else None
        self._requests[request_id] = _Request(prompt_tokens, counted, recorded, tally)

    def looked_up(self, request_id: str, local_hit_tokens: int) -> None:
        """The prefix cache holds the request's first `local_hit_tokens` tokens."""
        if request := self._requests.get(request_id):
            request.local_hit_tokens = local_hit_tokens

    def allocated(self, request_id: str, blocks: Sequence[int], *, load: bool) -> None:
        """The request was given `blocks`, in order. If `load`, a KV load into them starts.

        Also called for requests that are cached or aborted before any step computes them.
        """
        if request := self._requests.get(request_id):
            fresh = blocks[request.local_hit_tokens // self._block_size :]
            (self._plan.loaded if load else self._plan.taken).extend(fresh)

    def plan(self, step: Any) -> StepPlan:
        """Plan what the worker does in `step` (vLLM's SchedulerOutput), given what was allocated since the last one."""
        self._answered.clear()
        plan, self._plan = self._plan, StepPlan()
        plan.tokens = step.total_num_scheduled_tokens
        generated = 0
        for new in step.scheduled_new_reqs:
            if request := self._requests.get(new.req_id):
                self._place(plan, request, new.block_ids[self._group], new.num_computed_tokens)
                generated += self._advance(plan, step, new.req_id, request, new.num_computed_tokens)
        cached = step.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            request = self._requests.get(request_id)
            if request is None:
                continue
            new_blocks, computed = cached.new_block_ids[i], cached.num_computed_tokens[i]
            if request_id in cached.resumed_req_ids:
                self._place(plan, request, new_blocks[self._group], computed)
            elif new_blocks:
                request.blocks += new_blocks[self._group]
                plan.taken += new_blocks[self._group]
            generated += self._advance(plan, step, request_id, request, computed)
        if generated and generated == plan.tokens:
            plan.decode_slots = None
        return plan

    def received(self, result: StepResult) -> None:
        """The worker's result of a step arrived."""
        self._geometry = result.geometry
        for request_id, packed in result.sums.items():
            request = self._find(request_id)
            # A preempted request ends its prefill a second time, with generated tokens in the last block.
            if request and (request.counts is None or "unavailable" in request.counts):
                request.counts = _encode(packed.numpy(), request.prompt_tokens, result.geometry)
        if result.rows is not None:
            self._received_rows(result.rows, result.geometry)
        for request_id, (request, generated_tokens, answer) in self._answered.items():
            if answer is not None:
                self._fill(request, generated_tokens, answer)
            if request.tally is not None:
                self._report(request_id, request.tally, generated_tokens, result.geometry)
        self._answered.clear()

    def _received_rows(self, found: RecordedRows, geometry: Geometry) -> None:
        rows, at = found.experts.numpy(), 0
        for request_id, first_position, tokens in found.spans:
            own, at = rows[at : at + tokens], at + tokens
            request = self._find(request_id)
            if request is None:
                continue
            if request.recorded:
                for offset, row in enumerate(own):
                    request.rows[first_position + offset] = row
            if request.tally is not None:
                request.tally.add(first_position, own, geometry)

    def _report(self, request_id: str, tally: _Tally, generated_tokens: int, geometry: Geometry) -> None:
        if self._reports is None or generated_tokens < 2:
            return
        counts = tally.counts(generated_tokens, geometry)
        if counts is None:
            self._reports.incomplete()
        else:
            self._reports.put(request_id, counts)

    def finished(self, request_id: str, generated_tokens: int, params: dict[str, Any] | None) -> dict[str, Any] | None:
        """The request finished. Returns the kv_transfer_params of its answer; `params` are NIXL's.

        vLLM calls this before it delivers the result of the last step, and sends the answer afterwards. The answer is
        filled in between.
        """
        request = self._requests.pop(request_id, None)
        if request is None:
            return params
        if not request.counted or (params is None and not request.recorded):
            if request.tally is not None:
                self._answered[request_id] = (request, generated_tokens, None)
            return params
        answer = {} if params is None else params
        self._fill(request, generated_tokens, answer)
        self._answered[request_id] = (request, generated_tokens, answer)
        return answer

    def _find(self, request_id: str) -> _Request | None:
        if request_id in self._answered:
            return self._answered[request_id][0]
        return self._requests.get(request_id)

    def _place(self, plan: StepPlan, request: _Request, blocks: Sequence[int], computed: int) -> None:
        """The request starts with `computed` tokens in `blocks`: first local hits, then loaded tokens, then none."""
        request.blocks = list(blocks)
        request.marked_blocks = 0
        hits = min(request.local_hit_tokens, computed) // self._block_size
        held = -(-computed // self._block_size)
        plan.loaded += request.blocks[hits:held]
        plan.taken += request.blocks[held:]

    def _advance(self, plan: StepPlan, step: Any, request_id: str, request: _Request, computed: int) -> int:
        """Plan the tokens of one request in this step. Returns how many of them are generated ones."""
        end: int = computed + step.num_scheduled_tokens[request_id]
        drafts = len(step.scheduled_spec_decode_tokens.get(request_id, ()))
        if drafts and computed < request.prompt_tokens:
            # vLLM fills up the step of a last prompt token, so that all requests of a step have equally many tokens.
            plan.padding += self._slots(request, end - drafts, end)
            end -= drafts
        elif drafts:
            # Those that are rejected are computed again, so they are counted twice.
            last = -(-end // self._block_size)
            plan.drafted += request.blocks[max(computed // self._block_size, request.marked_blocks) : last]
            request.marked_blocks = max(last, request.marked_blocks)
        if request.counted and computed < request.prompt_tokens <= end:
            plan.ended.append(EndedPrefill(request_id, list(request.blocks), request.prompt_tokens))
        first = max(computed, request.prompt_tokens)
        if first >= end:
            return 0
        if (request.recorded or request.tally is not None) and not self._draft_tokens:
            plan.recorded.append(RecordedSpan(request_id, first, self._slots(request, first, end)))
        assert plan.decode_slots is not None
        # Asynchronous scheduling takes the drafts of the step before for accepted. The tokens' true positions are lower
        # by the number of those that are rejected.
        plan.decode_slots += self._slots(request, max(first - self._draft_tokens, request.prompt_tokens), end)
        return end - first

    def _slots(self, request: _Request, first: int, end: int) -> list[int]:
        size = self._block_size
        return [request.blocks[position // size] * size + position % size for position in range(first, end)]

    def _fill(self, request: _Request, generated_tokens: int, answer: dict[str, Any]) -> None:
        _put(answer, "eldr_counts", request.counts or encode_unavailable("not_counted"))
        if not request.recorded:
            return
        # The last generated token is never an input, so no forward pass chose experts for it.
        positions = range(request.prompt_tokens, request.prompt_tokens + generated_tokens - 1)
        if self._draft_tokens or self._geometry is None:
            reason = "speculative_decoding" if self._draft_tokens else "not_counted"
            _put(answer, "eldr_decode_experts", encode_unavailable(reason))
            return
        rows = np.full((len(positions), self._geometry.layers, self._geometry.top_k), -1, dtype=np.int32)
        for i, position in enumerate(positions):
            if position in request.rows:
                rows[i] = request.rows[position]
        complete = bool((rows >= 0).all())
        _put(answer, "eldr_decode_experts", encode_rows(rows) if complete else encode_unavailable("incomplete"))


def _put(answer: dict[str, Any], key: str, value: dict[str, Any]) -> None:
    """Set `key` inside the value that is there already: MultiConnector may have copied it into another answer."""
    held = answer.setdefault(key, {})
    held.clear()
    held.update(value)


def _encode(packed: NDArray[np.int32], prompt_tokens: int, geometry: Geometry) -> dict[str, Any]:
    counts = unpack_sum(packed, geometry.layers, geometry.experts)
    if isinstance(counts, str):
        return encode_unavailable(counts)
    try:
        return encode_counts(ExpertCounts(counts, prompt_tokens, geometry.top_k))
    except CountsError as error:
        return encode_unavailable(error.reason)
