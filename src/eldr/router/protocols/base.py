"""What an engine expects of the two legs of a request: the interface, one file an engine's way beside it.

Bodies in and bodies out. A protocol opens no connection, chooses no worker and keeps no state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from eldr.router.fleet.workers import Worker
from eldr.router.protocols.handoff import HandOff


class LegProtocol(ABC):
    """How one kind of engine computes a prompt on one worker and continues on another.

    reserved: body fields that only the router may send.
    """

    reserved: ClassVar[tuple[str, ...]]

    @abstractmethod
    def why_whole(self, path: bytes, body: dict[str, Any]) -> str | None:
        """Why this request must run whole on one worker, as a metric label; None if its prefill can be handed off."""

    @abstractmethod
    def prefill_body(self, body: dict[str, Any], record: bool) -> bytes:
        """The request to a prefill worker: the same prompt, one token, no stream, and the promise to fetch the blocks.

        record: the experts of the prompt are wanted with the answer. Raises ApiError 400 for what cannot be written.
        """

    @abstractmethod
    def read_handoff(self, fields: object, source: Worker, sent_s: float) -> HandOff | None:
        """The hand-off in the answer of `source` to a prefill sent at `sent_s` (monotonic); None if there is none."""

    @abstractmethod
    def decode_body(self, body: dict[str, Any], handoff: HandOff | None, record: bool) -> bytes:
        """The client's request, with the hand-off if there is one, which is spent. Raises ApiError 400."""

    @abstractmethod
    def is_named_after(self, name: object, leg_name: str) -> bool:
        """Whether an answer's id says that it belongs to the leg with this X-Request-Id."""

    @abstractmethod
    def event_is_named_after(self, start: bytes, leg_name: str) -> bool:
        """The same of a stream's event, by its first bytes."""

    @abstractmethod
    def handoff_is_named_after(self, handoff: HandOff, leg_name: str) -> bool:
        """Whether a hand-off is of the prompt of this leg, and not of another one's."""

    @abstractmethod
    def for_client(self, answer: bytes) -> bytes:
        """A worker's JSON answer without what it says about transfers. Raises orjson.JSONDecodeError if it is none."""

    @abstractmethod
    def recorded(self, answer: bytes, handoff: HandOff | None) -> bytes:
        """The same with the experts that were recorded, as `eldr_record`. answer: a JSON object."""
