"""File discovery: watches the configuration file. Workers join and drain as its lists change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from eldr.router.config.endpoint import Endpoints
from eldr.router.config.settings import ConfigError, RouterConfig
from eldr.router.fleet.discovery.base import Source

log = logging.getLogger("eldr.router")

POLL_S = 1.0


class FileSource(Source):
    """Checks once per second whether the file has changed, and at once when `look` is called.

    load: reads the file, with the command-line flags applied. Raises ConfigError, which keeps the workers as they are.
    loaded: called with every new configuration, for other settings that can change while the router runs.
    """

    name = "file"

    def __init__(
        self, path: Path, first: RouterConfig, load: Callable[[], RouterConfig], loaded: Callable[[RouterConfig], None]
    ) -> None:
        self._path = path
        self._first = first
        self._load = load
        self._loaded = loaded
        self._seen = self._identity()
        self._wanted = asyncio.Event()

    def look(self) -> None:
        """Read the file now, changed or not."""
        self._wanted.set()

    async def watch(self) -> AsyncIterator[Endpoints]:
        yield self._first.workers.endpoints
        while True:
            try:
                async with asyncio.timeout(POLL_S):
                    await self._wanted.wait()
            except TimeoutError:
                if self._identity() == self._seen:
                    continue
            self._wanted.clear()
            self._seen = self._identity()
            try:
                config = self._load()
            except ConfigError as error:
                log.error("the configuration is unchanged: %s", error)
                continue
            self._loaded(config)
            log.info("the configuration was reloaded")
            yield config.workers.endpoints

    def _identity(self) -> tuple[int, int, int] | None:
        """Return values that change when the file is written or replaced. None while it does not exist."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
