"""What the replicas of a router tell each other of their requests: the interface to `eldr.router.peers`."""

from __future__ import annotations

from abc import ABC, abstractmethod

from eldr.learning.lessons import Lesson
from eldr.policies.shares import Share


class Sharing(ABC):
    """Hears of every request that runs on a worker that decodes, and tells the other replicas.

    None of its methods waits or raises.
    """

    @abstractmethod
    def started(self, url: str, share: Share | None) -> int:
        """A request runs at the worker `url`. share: what a policy must know of it. Returns a number for `ended`."""

    @abstractmethod
    def prompt_computed(self, number: int) -> None:
        """Its worker, which computes prompts, has computed the prompt."""

    @abstractmethod
    def ended(self, number: int) -> None:
        """The request with this number no longer runs there."""

    @abstractmethod
    def learned(self, model: str, lesson: Lesson) -> None:
        """The experts of a finished request became known. model: the name of its base model."""

    @abstractmethod
    def admission_changed(self) -> None:
        """Requests were admitted, wait, or have left: other slots are promised, or needed."""
