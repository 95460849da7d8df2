"""Keeps a collection of Kubernetes objects up to date: list them, watch from there on, and list again now and then."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import aiohttp

from eldr.router.fleet.discovery.kubernetes_api import (
    ApiError,
    DisconnectedError,
    KubernetesApi,
    from_json,
    shown,
)
from eldr.router.fleet.discovery.pods import member

log = logging.getLogger("eldr.router")

# Parsing a page takes some 5 ms, in which no stream advances.
PAGE_ITEMS = 100
# More pages than any cluster has pods for.
MOST_PAGES = 2000
UNAUTHORIZED, FORBIDDEN, NOT_FOUND, GONE, TOO_MANY = 401, 403, 404, 410, 429
# What follows a failure, doubled by each further one, and varied so that routers do not come back together.
LEAST_WAIT_S, MOST_WAIT_S = 0.25, 15.0
MOST_DOUBLINGS = 16
# The longest that a server may ask to be left alone.
MOST_RETRY_AFTER_S = 60.0
# A watch that lasted this long is none of a series of failures.
STEADY_S = 5.0
# How much later than agreed a server may end a watch.
LATE_S = 5.0
# Without jitter, routers that start together would list together.
JITTER = 0.2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of objects in a namespace. group: of the API, empty for the core. All are of version v1."""

    group: str
    name: str
    namespace: str

    @property
    def path(self) -> str:
        return f"/{f'apis/{self.group}' if self.group else 'api'}/v1/namespaces/{self.namespace}/{self.name}"

    def __str__(self) -> str:
        return f"{self.name} in namespace {self.namespace}"


class Collection(Generic[T]):
    """Follows the objects that a query selects, for ever. What was last known stays while that fails.

    query: selects among the objects: labelSelector, fieldSelector.
    read: reduces an object to what is kept of it. None leaves the object out.
    changed: called with what is known, by name, after the first list and after every change. It must not keep it.
    failed: called after each failure.
    relist_s: time between two full lists, varied by a fifth. They find what a watch may have missed.
    """

    def __init__(
        self,
        api: KubernetesApi,
        resource: Resource,
        query: dict[str, str],
        read: Callable[[Any], T | None],
        changed: Callable[[dict[str, T]], None],
        failed: Callable[[], None],
        relist_s: float,
    ) -> None:
        self._api = api
        self._resource = resource
        self._query = query
        self._read = read
        self._changed = changed
        self._failed = failed
        self._relist_s = relist_s
        self._known: dict[str, T] | None = None
        # Where to watch from. Empty: list first.
        self._version = ""
        self._relist_at_s = 0.0
        self._failures = 0
        self._problem = ""

    async def follow(self, session: aiohttp.ClientSession) -> NoReturn:
        while True:
            began_s, wait_s = math.inf, 0.0
            try:
                if not self._version or time.monotonic() >= self._relist_at_s:
                    await self._list(session)
                began_s = time.monotonic()
                await self._watch(session)
                if time.monotonic() >= self._relist_at_s:  # it lasted as long as it was to last
                    self._failures = 0
                    continue
            except ApiError as error:
                wait_s = self._failed_by(error)
            except Exception:  # a defect here must not freeze the list for ever
                log.exception("%s: following them failed", self._resource)
                self._version = ""
            if time.monotonic() - began_s >= STEADY_S:
                self._failures = 0
            # A watch that ends early without a reason may do so again, so it waits like a failure.
            longest_s = min(LEAST_WAIT_S * 2**self._failures, MOST_WAIT_S)
            self._failures = min(self._failures + 1, MOST_DOUBLINGS)
            await asyncio.sleep(max(random.uniform(longest_s / 2, longest_s), wait_s))

    async def _list(self, session: aiohttp.ClientSession) -> None:
        """Read all objects, in pages. Raises ApiError."""
        found: dict[str, T] = {}
        query = {**self._query, "limit": str(PAGE_ITEMS)}
        for _ in range(MOST_PAGES):
            page = await self._api.get(session, self._resource.path, query)
            items, version = member(page, "items"), member(page, "metadata", "resourceVersion")
            if not isinstance(items, list | None) or not isinstance(version, str) or not version:
                raise ApiError("what it sends is no list")
            for item in items or ():
                name, kept = member(item, "metadata", "name"), self._read(item)
                if isinstance(name, str) and kept is not None:
                    found[name] = kept
            more = member(page, "metadata", "continue")
            if not isinstance(more, str) or not more:
                break
            query["continue"] = more
        else:
            raise ApiError(f"its list has no end after {MOST_PAGES} pages")
        self._version = version
        self._relist_at_s = time.monotonic() + self._relist_s * random.uniform(1 - JITTER, 1 + JITTER)
        if found != self._known:
            self._known = found
            self._changed(found)

    async def _watch(self, session: aiohttp.ClientSession) -> None:
        """Hear of changes until the next list is due or the connection breaks. Raises ApiError."""
        left_s = max(math.ceil(self._relist_at_s - time.monotonic()), 1)
        query = {
            **self._query,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(left_s),
        }
        begun = False

        def hear(lines: list[bytes]) -> None:
            nonlocal begun
            if not begun:
                begun = True
                self._works()
            self._take_all(lines)

        try:
            async with asyncio.timeout(left_s + LATE_S):
                await self._api.stream(session, self._resource.path, query, hear)
        except TimeoutError:
            raise DisconnectedError("a watch does not end when it should") from None
        except DisconnectedError:
            if not begun:
                raise
            # Connections break. If it is more than that, the next one shows it.

    def _take_all(self, events: list[bytes]) -> None:
        """Apply events of a watch, and tell of those before one that cannot be applied. Raises ApiError."""
        assert self._known is not None
        different = False
        try:
            for event in events:
                different |= self._take(from_json(event), self._known)
        finally:
            if different:
                self._changed(self._known)

    def _take(self, event: Any, known: dict[str, T]) -> bool:
        """Apply one event. Returns whether it made a difference."""
        kind, found = member(event, "type"), member(event, "object")
        name, version = member(found, "metadata", "name"), member(found, "metadata", "resourceVersion")
        if kind == "ERROR":
            self._version = ""
            code = member(found, "code")
            raise ApiError(shown(f"{code} {member(found, 'message')}"), code if isinstance(code, int) else 0)
        if kind not in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK") or not isinstance(version, str) or not version:
            raise ApiError("what it sends is no event of a watch")
        self._version = version
        if kind == "BOOKMARK" or not isinstance(name, str):
            return False
        before = known.pop(name, None)
        kept = None if kind == "DELETED" else self._read(found)
        if kept is not None:
            known[name] = kept
        return kept != before

    def _works(self) -> None:
        if self._problem:
            log.info("%s are followed again", self._resource)
        self._problem = ""

    def _failed_by(self, error: ApiError) -> float:
        """Note and log a failure. Returns how many seconds the server wants to be left alone."""
        overloaded = error.status == TOO_MANY or error.status >= 500
        if not overloaded and not isinstance(error, DisconnectedError):
            self._version = ""  # whatever it was, a list is a sound beginning
        if error.status != GONE:  # which is usual: the server remembers some minutes only
            problem = f"{error}{self._what_to_do(error.status)}"
            if problem != self._problem:
                log.warning("%s cannot be followed, the workers stay as they are: %s", self._resource, problem)
            self._problem = problem
            self._failed()
        return min(error.retry_after_s, MOST_RETRY_AFTER_S)

    def _what_to_do(self, status: int) -> str:
        group, name, namespace = self._resource.group, self._resource.name, self._resource.namespace
        if status == FORBIDDEN:
            return (
                f"; give the router's service account a Role in namespace {namespace} with the rule apiGroups: "
                f'["{group}"], resources: ["{name}"], verbs: ["list", "watch"]'
            )
        if status == UNAUTHORIZED:
            return f"; the API does not accept the token in {self._api.account}"
        if status == NOT_FOUND and group:
            return f"; the cluster does not know {name}.{group}/v1"
        return ""
