"""What servers of SGLang say of themselves: their role, the port where they hand out blocks, and their load.

Follows SGLang 0.5.23 (sglang/srt/entrypoints/http_server.py, observability/metrics_collector.py).
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, Final

from eldr.learning.step_counters import StepCounters
from eldr.router.config.endpoint import rank_of
from eldr.router.fleet.load_watch import EngineLoad, samples
from eldr.router.fleet.workers import Worker
from eldr.router.http.client import Answer, ExchangeError
from eldr.router.http.pool import WorkerPool

SERVER_INFO: Final = b"/server_info"
# What it was called before, and still is as well.
OLD_SERVER_INFO: Final = b"/get_server_info"
# The default of --disaggregation-bootstrap-port.
BOOTSTRAP_PORT: Final = 8998

# A decode worker has a queue for requests whose blocks have no room yet, before the one for those with room.
WAITING: Final = (b"sglang:num_queue_reqs", b"sglang:num_decode_prealloc_queue_reqs")
KV_USAGE: Final = b"sglang:token_usage"
# The gaps between two tokens of a request, and the requests put back. Steps are not counted.
GAPS_S: Final = b"sglang:inter_token_latency_seconds_sum"
GAPS: Final = b"sglang:inter_token_latency_seconds_count"
RETRACTIONS: Final = b"sglang:num_retracted_requests_total"
RANK: Final = re.compile(rb'dp_rank="([0-9]{1,9})"')
# The parts of a total, which is there as well.
OF_ONE_PRIORITY: Final = re.compile(rb'priority="[^"]')


def parse_load(text: bytes) -> dict[int, EngineLoad]:
    """Parse SGLang's Prometheus exposition into the load of the whole server, as engine 0. Empty if it has none.

    A server spreads requests over its data-parallel ranks itself, so they count as one.
    """
    text = b"\n" + text
    waiting: defaultdict[tuple[bytes, bytes], float] = defaultdict(float)
    for name in WAITING:
        for labels, value in samples(text, name):
            if not OF_ONE_PRIORITY.search(labels):
                rank = RANK.search(labels)
                key = name, rank[1] if rank else b""
                waiting[key] = max(waiting[key], value)  # the tensor-parallel ranks of one may all tell it
    if not waiting:
        return {}
    usage = max((value for _, value in samples(text, KV_USAGE)), default=0.0)
    return {0: EngineLoad(int(sum(waiting.values())), usage)}


def parse_steps(text: bytes, engine: int) -> StepCounters | None:
    """Return what the whole server counts of its steps. None if it counts no gaps. engine: always 0.

    A gap is divided by the tokens that it brought.
    """
    text = b"\n" + text
    found = {name: [value for _, value in samples(text, name)] for name in (GAPS_S, GAPS, RETRACTIONS)}
    if not found[GAPS_S] or not found[GAPS]:
        return None
    return StepCounters(gaps=sum(found[GAPS]), gaps_s=sum(found[GAPS_S]), preemptions=sum(found[RETRACTIONS]))


def name_adapters(cards: list[dict[str, Any]]) -> None:
    """Name the adapters of a list as requests must: BASE:ADAPTER. A request for their own name gets the base model."""
    for card in cards:
        base = card.get("parent")
        if isinstance(base, str) and base:
            card["id"] = f"{base}:{card['id']}"


def why_never(url: str) -> str:
    """Why the server at a URL can never be used. Empty if it can."""
    if rank_of(url) is None:
        return ""
    return "SGLang spreads requests over its data-parallel ranks itself; leave out what is behind the #"


async def meet(worker: Worker, pool: WorkerPool, timeout_s: float) -> None:
    """Ask a server for its role, which must be that of `worker`, and for its bootstrap port.

    A server that tells neither, because it is old or wants a key, is believed to have the usual port.
    Raises UpstreamError.
    """
    worker.bootstrap_port = BOOTSTRAP_PORT
    for path in (SERVER_INFO, OLD_SERVER_INFO):
        connection = await pool.connection()
        answer = Answer(ours=True)
        connection.start(answer, pool.request(b"GET", path), timeout_s)
        await connection.finish(answer)
        if answer.status != 404:
            break
    if answer.status != 200:
        return
    info = answer.json()
    if not isinstance(info, dict):
        raise ExchangeError(f"{path.decode()} is no object")
    mode, port = info.get("disaggregation_mode"), info.get("disaggregation_bootstrap_port")
    if isinstance(mode, str) and mode != worker.role:
        started = "without --disaggregation-mode" if mode == "null" else f"with --disaggregation-mode {mode}"
        raise ExchangeError(f"it was started {started}, and is given as a {worker.role} worker")
    if type(port) is int and 0 < port < 65536:
        worker.bootstrap_port = port
