"""What carries frames between replicas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

# What hears the frames of others, each whole, from the event loop.
Hear = Callable[[bytes], None]


class Bus(ABC):
    """Carries frames from each replica of a fleet to all others.

    Frames may be lost, and arrive twice or late. Those of one origin mostly arrive in the order in which they were
    sent, which makes the difference between a cheap exchange and snapshots all the time.

    up: whether it is believed to carry frames.
    """

    up: bool

    @property
    @abstractmethod
    def backlog_bytes(self) -> int:
        """How much waits to be sent. Who sends much at once sends the next part when this is little."""

    @abstractmethod
    async def start(self, origin: int, hear: Hear, connected: Callable[[], None]) -> None:
        """Begin to connect, and connect again and again. Return at once, whether or not there is anybody to connect to.

        origin: of this replica. It gets the frames for all, and those for it.
        connected: called whenever `up` becomes true. What was sent before may be lost.

        Raises EldrError if the settings are wrong.
        """

    @abstractmethod
    def publish(self, frame: bytes, to: int | None = None) -> bool:
        """Send a frame to the replica `to`, or to all. Never wait. Returns False if it is lost."""

    @abstractmethod
    async def close(self) -> None:
        """Send what is under way, within a moment, and end."""
