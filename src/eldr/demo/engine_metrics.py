"""Reads from the decode workers' `/metrics` how many experts their steps activate."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from eldr.demo.measure import ActiveExperts
from eldr.errors import EldrError

ACTIVE_EXPERTS = "vllm:eldr_active_experts"
TIMEOUT_S = 30.0


class EngineMetricsError(EldrError):
    """A worker that does not answer, or that lacks the metric because it does not run the eldr connector."""


def parse_active_experts(text: str) -> ActiveExperts | None:
    """Sum and count of the metric in a Prometheus exposition, over all label sets. None if it is absent."""
    found = {"_sum": 0.0, "_count": 0.0}
    seen = False
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            suffix = sample.name.removeprefix(ACTIVE_EXPERTS)
            if sample.name.startswith(ACTIVE_EXPERTS) and suffix in found:
                found[suffix] += sample.value
                seen = True
    return ActiveExperts(found["_sum"], found["_count"]) if seen else None


async def read_active_experts(urls: Sequence[str]) -> dict[str, ActiveExperts]:
    """The counters of each worker since it started, by URL. Raises EngineMetricsError."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
        return dict(zip(urls, await asyncio.gather(*(_read(session, url) for url in urls)), strict=True))


async def _read(session: aiohttp.ClientSession, url: str) -> ActiveExperts:
    try:
        async with session.get(f"{url}/metrics") as response:
            text = await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise EngineMetricsError(f"cannot read the metrics of decode worker {url}: {error!r}") from None
    active = parse_active_experts(text)
    if active is None:
        raise EngineMetricsError(f"decode worker {url} has no metric {ACTIVE_EXPERTS}: is the eldr connector loaded?")
    return active
