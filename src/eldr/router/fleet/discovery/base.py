"""The interface of a source of workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable

from eldr.router.config.endpoint import Endpoints

# Called with the name of a source each time it cannot find out which workers there are.
Failed = Callable[[str], None]


class Source(ABC):
    """Names the workers that exist.

    Only changes in its list matter. A worker joins when the source first names it, and drains when the source stops
    naming it. A worker that was removed by hand stays out until its source drops it and names it again.
    """

    name: str

    @abstractmethod
    def watch(self) -> AsyncIterator[Endpoints]:
        """Yield all known workers, and again after every change.

        The first list comes at once, or as soon as it is available.

        A failure is logged and keeps the last list. It never yields an empty list and never ends the iteration.
        """
