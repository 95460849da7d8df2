"""The interface of a source of workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator

from eldr.router.config.endpoint import Endpoints


class Source(ABC):
    """Says which workers there are.

    Only differences between what it says count: a worker joins when it is named for the first time and drains when it
    is named no more. So a worker that was taken out by hand stays out until its source drops it and names it again.
    """

    name: str

    @abstractmethod
    def watch(self) -> AsyncIterator[Endpoints]:
        """All workers known, again after every change; the first set comes at once, or as soon as it can be had.

        A failure is logged and keeps the last set: it is never an empty one, and never ends the iteration.
        """
