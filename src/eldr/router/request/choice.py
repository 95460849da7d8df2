"""How the workers of a request are chosen, whoever sends its legs: the router itself, or a proxy that asks it."""

from __future__ import annotations

import random
import time
from collections.abc import Collection

from eldr.policies.base import DecodeRequest
from eldr.router.config.endpoint import LegName
from eldr.router.fleet.groups import Served
from eldr.router.fleet.workers import Worker
from eldr.router.placement.decode import Placement
from eldr.router.protocols.handoff import HandOff
from eldr.router.protocols.prompt_text import prompt_words
from eldr.router.request.intake import Job
from eldr.router.request.services import Services

# A request that runs whole has no lease. It waits at most this long for a decode worker with room.
WHOLE_WAIT_S = 60.0


def both(one: Collection[str] | None, other: Collection[str] | None) -> Collection[str] | None:
    """The workers that are in both. None stands for all."""
    if one is None or other is None:
        return other if one is None else one
    return {url for url in one if url in other}


def prefill_worker(
    services: Services, job: Job, served: Served, tried: Collection[str], only: Collection[str] | None = None
) -> Worker | None:
    """Choose a prefill worker by the start of the prompt. None if none is available.

    tried: workers that failed it; others are preferred. only: the workers to choose from. None for all.
    """
    start = job.prompt_start
    if served.adapter:
        start += served.name.encode()  # the same prompt has other KV blocks
    lane = services.lanes.of(served.group)
    chosen = None if lane is None else lane.ring.choose(start, tried, both(served.prefill, only))
    if chosen is None:
        return None
    worker, spilled = chosen
    services.metrics.prefill_spills += spilled
    return worker


async def place(
    services: Services,
    job: Job,
    served: Served,
    handoff: HandOff | None,
    tried: Collection[str],
    only: Collection[str] | None = None,
) -> Placement | None:
    """Wait for a worker that is eligible before the lease ends. None if there was none.

    tried: workers that failed it; others are preferred. only: the workers to choose from. None for all.
    Raises NoWorkerError.
    """
    admission = services.admission
    prefix = job.read_prefix(served) if handoff is None and served.group.aggregated else None
    request: DecodeRequest | None = None
    while True:
        lane = services.lanes.of(served.group)
        if lane is not None:
            if request is None:
                wanted = lane.placements.wants_words(handoff is not None and handoff.counts is not None)
                words = prompt_words(job.endpoint, job.body) if wanted else None
                request = job.decode_request(handoff, words, prefix)
            usable = both(admission.usable(served), only)
            placement = lane.placements.place(request, served, tried, usable, prefix)
            if placement is not None:
                return placement
        limit_s = WHOLE_WAIT_S if handoff is None else handoff.left_s(time.monotonic())
        if not await admission.until_changed(served, "decode", limit_s):
            return None


def by_load(
    services: Services,
    served: Served,
    engine: bool,
    tried: Collection[str],
    only: Collection[str] | None = None,
    leg: LegName = "decode",
) -> Worker | None:
    """A worker with the fewest requests in flight, any of several, and rather one that was not tried.

    engine: whether it is to run the model, and so needs room; prefill workers have no limit. only: the workers to
        choose from. None for all. leg: of those that run this leg.
    None if there is none that is available and has room.
    """
    workers = [worker for worker in served.workers(leg) if worker.available]
    if engine:
        usable = both(services.admission.usable(served), only)
        workers = [worker for worker in workers if worker.free > 0]
    else:
        usable = only
    if usable is not None:
        workers = [worker for worker in workers if worker.url in usable]
    return min(workers, key=lambda worker: (worker.url in tried, worker.busy, random.random()), default=None)
