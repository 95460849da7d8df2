"""What vLLM says of its own load, and how many requests a worker can therefore take."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from eldr.fleet import Fleet, Worker
from eldr.router.upstream import Answer, UpstreamError, WorkerPool
from eldr.router.urls import rank_of

TIMEOUT_S = 2.0
# Routers that look together would go on doing so.
JITTER = 0.2
# One look may catch a request between its arrival and the next step; two in a row are a queue.
LOOKS = 2
# Above this share of the KV cache a worker is about to preempt: no time to give it more.
KV_FULL = 0.9

# The few lines that matter, of some thousand: no parser has to read them all.
_LINE = re.compile(
    rb"^vllm:(num_requests_waiting|num_requests_waiting_by_reason|kv_cache_usage_perc)"
    rb"\{([^\n]*)\} ([0-9.eE+-]+)$",
    re.MULTILINE,
)
# From eldr's connector: distinct experts of a decode step in one MoE layer, over all steps and layers so far.
_ACTIVE = re.compile(rb"^vllm:eldr_active_experts_(sum|count)\{([^\n]*)\} ([0-9.eE+-]+)$", re.MULTILINE)
_ENGINE = re.compile(rb'engine="([0-9]+)"')


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """waiting: requests that wait for room in the batch or the KV cache, not for a transfer. kv_usage: 0..1."""

    waiting: int
    kv_usage: float


def parse_load(text: bytes) -> dict[int, EngineLoad]:
    """Engine -> its load, from vLLM's Prometheus exposition; empty if it holds none.

    A server has an engine for every data-parallel rank.
    """
    found: defaultdict[int, dict[bytes, float]] = defaultdict(dict)
    for name, labels, value in _LINE.findall(text):
        engine = _ENGINE.search(labels)
        if name.endswith(b"_by_reason"):
            if b'reason="capacity"' not in labels:
                continue
            name = b"capacity"
        try:
            found[int(engine[1]) if engine else 0][name] = float(value)
        except ValueError:
            continue
    return {
        engine: EngineLoad(
            int(values.get(b"capacity", values.get(b"num_requests_waiting", 0.0))),
            values.get(b"kv_cache_usage_perc", 0.0),
        )
        for engine, values in found.items()
    }


def parse_active_experts(text: bytes, engine: int) -> tuple[float, float] | None:
    """Sum and count of one engine's active experts, from the same exposition; None if it holds none."""
    found: dict[bytes, float] = {}
    for name, labels, value in _ACTIVE.findall(text):
        named = _ENGINE.search(labels)
        if named is None or int(named[1]) == engine:
            with contextlib.suppress(ValueError):
                found[name] = float(value)
    return (found[b"sum"], found[b"count"]) if len(found) == 2 else None


class Capacity:
    """How many requests a worker shall have at most, between 1 and `most`, learned from what waits inside it.

    Requests that wait in an engine let their lease run and cannot go elsewhere any more; in the router's queue they
    can. So the limit falls at once to what the engine really runs, and rises by an eighth a look while it binds.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = most
        self._looks = 0

    def heard(self, load: EngineLoad, in_flight: int) -> int:
        """The limit after one more look. in_flight: requests that the router has at the worker."""
        self._looks = self._looks + 1 if load.waiting > 0 else 0
        if self._looks >= LOOKS:
            self.limit = max(1, min(self.limit, in_flight - load.waiting))
        elif load.waiting == 0 and load.kv_usage < KV_FULL and in_flight >= self.limit:
            self.limit += max(1, self.limit // 8)
        self.limit = min(self.limit, self.most)
        return self.limit


class LoadWatch:
    """Reads one worker's metrics every `interval_s` seconds; sets the limit of a decode worker, and tells `changed`."""

    def __init__(
        self, fleet: Fleet, worker: Worker, pool: WorkerPool, interval_s: float, changed: Callable[[], None]
    ) -> None:
        self._fleet = fleet
        self._worker = worker
        self._pool = pool
        self._interval_s = interval_s
        self._changed = changed
        self.capacity = Capacity(worker.max_inflight)
        self._active = (0.0, 0.0)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s * random.uniform(1 - JITTER, 1 + JITTER))
            if self._worker.healthy:
                await self.look()

    async def look(self) -> dict[int, EngineLoad]:
        """The load of each engine behind the worker's URL; empty where it cannot be had, which changes nothing."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                connection = await self._pool.connection()
                answer = Answer()
                connection.start(answer, self._pool.request(b"GET", b"/metrics"), TIMEOUT_S)
                await connection.finish(answer)
        except (UpstreamError, TimeoutError):
            return {}
        engines = parse_load(answer.body) if answer.status == 200 else {}
        rank = rank_of(self._worker.url) or 0
        if self._worker.role == "decode":
            self._note_active(parse_active_experts(answer.body, rank))
        load = engines.get(rank)
        if load is not None:
            self._worker.load = (load.waiting, load.kv_usage)
            if self._worker.role == "decode":
                self._fleet.set_limit(self._worker, self.capacity.heard(load, self._worker.in_flight))
                self._changed()
        return engines

    def _note_active(self, active: tuple[float, float] | None) -> None:
        """Keep the mean since the last look; an engine that ran nothing since has none."""
        if active is None:
            self._worker.active_experts = None
            return
        total, steps = active[0] - self._active[0], active[1] - self._active[1]
        self._active = active
        # A restarted engine counts from zero again.
        self._worker.active_experts = total / steps if steps > 0 and total >= 0 else None
