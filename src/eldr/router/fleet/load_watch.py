"""Reads the engines' own load metrics, and derives how many requests a worker can take.

How vLLM writes them is said here. `sglang.py` has SGLang's.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from eldr.learning.step_counters import StepCounters
from eldr.router.config.endpoint import rank_of
from eldr.router.fleet.workers import Fleet, Worker
from eldr.router.http.client import Answer, UpstreamError
from eldr.router.http.pool import WorkerPool

TIMEOUT_S = 2.0
# Without jitter, routers that start together would poll together.
JITTER = 0.2
# One look may catch a request between its arrival and the next step. Two in a row mean a queue.
LOOKS = 2
# Above this share of the KV cache a worker is about to preempt requests, so it should get no more.
KV_FULL = 0.9

_WAITING, _WAITING_FOR, _KV_USAGE = (
    b"vllm:num_requests_waiting", b"vllm:num_requests_waiting_by_reason", b"vllm:kv_cache_usage_perc",
)  # fmt: skip
# From eldr's connector: distinct experts of a decode step in one MoE layer, over all steps and layers so far.
_ACTIVE_SUM, _ACTIVE_COUNT = b"vllm:eldr_active_experts_sum", b"vllm:eldr_active_experts_count"
# The gaps between two tokens of a request; the tokens of each step; requests that have their first token, and those put
# back (vllm/v1/metrics/loggers.py, 0.30 and 0.32).
_GAPS_S, _GAPS = b"vllm:inter_token_latency_seconds_sum", b"vllm:inter_token_latency_seconds_count"
_STEPS, _PROMPTS = b"vllm:iteration_tokens_total_count", b"vllm:time_to_first_token_seconds_count"
_PREEMPTIONS = b"vllm:num_preemptions_total"
# By where they came from. Those from a cache or another worker are not computed.
_PROMPT_TOKENS, _COMPUTED = b"vllm:prompt_tokens_by_source_total", b'source="local_compute"'
# The engine's settings as labels. vLLM 0.30 has no kv_cache_size_tokens.
_CACHE = b"vllm:cache_config_info"
_CACHE_LABEL = re.compile(rb'(?:^|,)(block_size|num_gpu_blocks|kv_cache_size_tokens)="([0-9]{1,15})"')
_NO_PREFIXES = b'enable_prefix_caching="False"'
_SAMPLE = re.compile(rb"\{([^\n]*)\} ([0-9.eE+-]+)(?:\n|\Z)")
_ENGINE = re.compile(rb'engine="([0-9]{1,9})"')


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The load of one engine.

    waiting: requests that wait for room in the batch or the KV cache, not for a transfer.
    kv_usage: 0..1.
    """

    waiting: int
    kv_usage: float


def parse_load(text: bytes) -> dict[int, EngineLoad]:
    """Parse vLLM's Prometheus exposition into engine -> load. Empty if it has none.

    A server has one engine per data-parallel rank.
    """
    found: defaultdict[int, dict[bytes, float]] = defaultdict(dict)
    text = b"\n" + text
    for name in (_WAITING, _WAITING_FOR, _KV_USAGE):
        for labels, value in samples(text, name):
            if name is not _WAITING_FOR or b'reason="capacity"' in labels:
                engine = _ENGINE.search(labels)
                found[int(engine[1]) if engine else 0][name] = value
    return {
        engine: EngineLoad(int(values.get(_WAITING_FOR, values.get(_WAITING, 0.0))), values.get(_KV_USAGE, 0.0))
        for engine, values in found.items()
    }


def samples(text: bytes, name: bytes) -> Iterator[tuple[bytes, float]]:
    """Yield the labels and values of a metric, from a text that starts with a line end.

    Only a few of several thousand lines matter, and a thousand streams wait meanwhile. So the lines are searched for
    instead of parsed.
    """
    sought = b"\n" + name + b"{"
    at = text.find(sought)
    while at >= 0:
        sample = _SAMPLE.match(text, at + len(sought) - 1)
        if sample is not None:
            with contextlib.suppress(ValueError):
                value = float(sample[2])
                if math.isfinite(value):  # 1e999 is not
                    yield sample[1], value
        at = text.find(sought, at + 1)


def parse_steps(text: bytes, engine: int) -> StepCounters | None:
    """Return what one engine counts of its steps, from the same exposition. None if it counts nothing of them."""
    text = b"\n" + text
    gaps_s, gaps, steps, prompts, preemptions, active, active_steps = (
        _of_engine(text, name, engine)
        for name in (_GAPS_S, _GAPS, _STEPS, _PROMPTS, _PREEMPTIONS, _ACTIVE_SUM, _ACTIVE_COUNT)
    )
    if gaps is None or gaps_s is None:
        gaps = gaps_s = None
    if active is None or active_steps is None:
        active = active_steps = None
    if gaps is None and active is None:
        return None
    return StepCounters(
        gaps=gaps or 0.0,
        gaps_s=gaps_s or 0.0,
        steps=steps or 0.0,
        experts=active or 0.0,
        expert_steps=active_steps or 0.0,
        prompt_tokens=_of_engine(text, _PROMPT_TOKENS, engine, _COMPUTED) or 0.0,
        prompts=prompts or 0.0,
        preemptions=preemptions or 0.0,
    )


def _of_engine(text: bytes, name: bytes, engine: int, label: bytes = b"") -> float | None:
    """The value of one engine's metric that has this label. None if there is none."""
    for labels, value in samples(text, name):
        named = _ENGINE.search(labels)
        if (named is None or int(named[1]) == engine) and label in labels:
            return value
    return None


def parse_cache_tokens(text: bytes, engine: int) -> int | None:
    """Return how many tokens one engine's KV cache has room for. 0 if it keeps no prefixes, None if it says nothing."""
    for labels, _ in samples(b"\n" + text, _CACHE):
        named = _ENGINE.search(labels)
        if named is not None and int(named[1]) != engine:
            continue
        if _NO_PREFIXES in labels:
            return 0
        sizes = {name: int(size) for name, size in _CACHE_LABEL.findall(labels)}
        blocks = sizes.get(b"num_gpu_blocks", 0) * sizes.get(b"block_size", 0)
        return sizes.get(b"kv_cache_size_tokens", blocks) or None
    return None


class Capacity:
    """Learns how many requests a worker should have at most, between 1 and `most`, from what waits inside it.

    A request that waits in an engine uses up its lease and cannot move. One that waits in the router's queue can. So
    the limit drops at once to what the engine really runs, and rises by an eighth per look while it is the bottleneck.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = most
        self._looks = 0

    def heard(self, load: EngineLoad, in_flight: int) -> int:
        """Return the limit after one more look. in_flight: the requests of all routers at the worker."""
        self._looks = self._looks + 1 if load.waiting > 0 else 0
        if self._looks >= LOOKS:
            self.limit = max(1, min(self.limit, in_flight - load.waiting))
        elif load.waiting == 0 and load.kv_usage < KV_FULL and in_flight >= self.limit:
            self.limit += max(1, self.limit // 8)
        self.limit = min(self.limit, self.most)
        return self.limit


class LoadWatch:
    """Reads one worker's metrics every `interval_s` seconds, and sets the limit of one that runs decode legs.

    parse: reads the load of each engine out of an exposition.
    steps: reads out of it what one engine counts of its steps.
    """

    def __init__(
        self,
        fleet: Fleet,
        worker: Worker,
        pool: WorkerPool,
        interval_s: float,
        parse: Callable[[bytes], dict[int, EngineLoad]] = parse_load,
        steps: Callable[[bytes, int], StepCounters | None] = parse_steps,
    ) -> None:
        self._fleet = fleet
        self._worker = worker
        self._pool = pool
        self._interval_s = interval_s
        self._parse = parse
        self._steps = steps
        self.capacity = Capacity(worker.max_inflight)
        self._counted = StepCounters()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s * random.uniform(1 - JITTER, 1 + JITTER))
            if self._worker.healthy:
                await self.look()

    async def look(self) -> dict[int, EngineLoad]:
        """Return the load of each engine behind the worker's URL. Empty if it cannot be read, which changes nothing."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                connection = await self._pool.connection()
                answer = Answer(ours=True)
                connection.start(answer, self._pool.request(b"GET", b"/metrics"), TIMEOUT_S)
                await connection.finish(answer)
        except (UpstreamError, TimeoutError):
            return {}
        engines = self._parse(answer.body) if answer.status == 200 else {}
        rank = rank_of(self._worker.url) or 0
        if self._worker.leg == "decode":
            self._note_steps(self._steps(answer.body, rank))
            self._worker.cache_tokens = parse_cache_tokens(answer.body, rank)
        load = engines.get(rank)
        if load is not None:
            self._worker.load = (load.waiting, load.kv_usage)
            if self._worker.leg == "decode":
                self._fleet.set_limit(self._worker, self.capacity.heard(load, self._worker.busy))
        return engines

    def _note_steps(self, counted: StepCounters | None) -> None:
        """Pass on what it counts, and keep the mean of its active experts since the last look."""
        if counted is None:
            self._worker.active_experts = None
            return
        since = counted.since(self._counted)
        self._counted = counted
        # A restarted engine counts from zero, and one that ran nothing has no mean.
        known = since is not None and since.expert_steps > 0
        self._worker.active_experts = since.experts / since.expert_steps if since is not None and known else None
        self._fleet.tell_steps(self._worker, counted)
