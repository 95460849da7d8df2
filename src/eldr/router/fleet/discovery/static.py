"""Static discovery: workers given by flags, which never change."""

from __future__ import annotations

from collections.abc import AsyncIterator

from eldr.router.config.endpoint import Endpoints
from eldr.router.fleet.discovery.base import Source


class StaticSource(Source):
    name = "static"

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints

    async def watch(self) -> AsyncIterator[Endpoints]:
        yield self._endpoints
