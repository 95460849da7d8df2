"""The interface of a leg protocol: what an engine expects of the two legs of a request. Each protocol has its own file.

A protocol turns bodies into bodies. It opens no connection, chooses no worker and keeps no state. Its legs run one
after the other, with a hand-off between them, or both at once, and then the workers find each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from eldr.kernels import JsonNames, JsonObject
from eldr.router.config.endpoint import Role
from eldr.router.fleet.workers import Worker
from eldr.router.protocols.handoff import HandOff
from eldr.router.protocols.openai import Endpoint


class LegProtocol(ABC):
    """How one kind of engine computes a prompt on one worker and continues on another.

    A protocol is one of `SequentialLegs` and `ConcurrentLegs`.

    reserved: body fields that only the router may send.
    members: the members of a body that the protocol looks at or replaces, besides those of the endpoint.
    answer_names: the members of a worker's answer that matter, with those that every completion has.
    records: whether the experts of a request can be recorded.
    """

    reserved: ClassVar[frozenset[str]]
    members: ClassVar[frozenset[str]]
    answer_names: ClassVar[JsonNames]
    records: ClassVar[bool] = False

    @abstractmethod
    def why_whole(self, endpoint: Endpoint, body: JsonObject) -> str | None:
        """Why this request must run whole on one worker, as a metric label. None if its prefill can be handed off.

        Raises ApiError 400 for a body that cannot be judged.
        """

    @abstractmethod
    def refuse_early(self, endpoint: Endpoint, body: JsonObject, max_model_len: int | None) -> None:
        """Raise ApiError for a request for two legs that would fail late: after its prefill, or never.

        max_model_len: the most tokens that prompt and answer may have. None if it is unknown.
        """

    @abstractmethod
    def whole_body(self, endpoint: Endpoint, body: JsonObject, record: bool, leg_name: str) -> bytes:
        """Return the client's request for a worker that runs it whole.

        record: whether the answer should include the experts. leg_name: the X-Request-Id.
        """

    def handoff_in(self, body: JsonObject) -> HandOff | None:
        """Return the hand-off in a decode leg's body that somebody else has put together. None if it has none."""
        return None

    def passed_on(self, body: JsonObject, handoff: HandOff) -> bytes:
        """Return the same body as the decode worker should get it. The hand-off, which was in it, is then spent."""
        return body.text

    @abstractmethod
    def is_named_after(self, name: object, leg_name: str) -> bool:
        """Whether an answer's id shows that it belongs to the leg with this X-Request-Id."""

    @abstractmethod
    def event_is_named_after(self, start: bytes, leg_name: str) -> bool:
        """The same for an event of a stream, given its data, or as much of it as was kept."""

    @abstractmethod
    def for_client(self, answer: bytes, members: JsonObject | None) -> bytes:
        """Remove what a worker's JSON answer says about transfers.

        members: what `answer_names` found in it. None if it was not looked at, as an error is not.
        Raises JsonTextError if it says something about them and is not JSON.
        """


class SequentialLegs(LegProtocol):
    """First the prefill. Its answer has the hand-off for the decode leg, whose worker is chosen last."""

    @abstractmethod
    def prefill_body(self, endpoint: Endpoint, body: JsonObject, record: bool, leg_name: str) -> bytes:
        """Return the request for a prefill worker: the prompt, one token, no stream, and a promise to fetch the KV.

        leg_name: the X-Request-Id, which some endpoints read from the body.
        record: whether the answer should include the experts of the prompt.
        """

    @abstractmethod
    def read_handoff(self, answer: JsonObject, source: Worker, sent_s: float) -> HandOff | None:
        """Read the hand-off from the answer of `source` to a prefill sent at `sent_s` (monotonic).

        None if it has none.
        """

    @abstractmethod
    def decode_body(self, endpoint: Endpoint, body: JsonObject, handoff: HandOff, record: bool, leg_name: str) -> bytes:
        """Return the client's request with the hand-off, which is then spent."""

    @abstractmethod
    def handoff_is_named_after(self, handoff: HandOff, leg_name: str) -> bool:
        """Whether a hand-off is for the prompt of this leg and not of another one."""

    @abstractmethod
    def recorded(self, answer: JsonObject, handoff: HandOff | None) -> bytes:
        """The same of a completion, with the recorded experts added as `eldr_record`."""


class ConcurrentLegs(LegProtocol):
    """Both legs at once. The workers wait for each other, so both are chosen before anything is computed.

    Neither answers alone. If one fails, the other has to be given up.
    """

    def why_whole(self, endpoint: Endpoint, body: JsonObject) -> str | None:
        return None

    @abstractmethod
    def rendezvous(self, prefill: Worker) -> bytes:
        """Return the members of both bodies by which the workers of one attempt find each other, never the same twice.

        prefill: the worker whose blocks the decode worker fetches.
        """

    @abstractmethod
    def leg_body(self, endpoint: Endpoint, body: JsonObject, role: Role, rendezvous: bytes, leg_name: str) -> bytes:
        """Return the client's request for the worker of one role. leg_name: its X-Request-Id."""

    @abstractmethod
    def is_transfers(self, report: bytes) -> bool:
        """Whether a worker's report of an error, as it sent it, says that the transfer between the two failed."""
