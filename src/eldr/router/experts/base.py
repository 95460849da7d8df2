"""The interfaces between the sources of finished requests' experts, the router that asks them, and who learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from eldr.counts import CountsError, ExpertCounts
from eldr.routed_experts import count_rows, split_rows


class MoeGeometry(NamedTuple):
    """The MoE layers of a model."""

    layers: int
    experts: int
    top_k: int


class ExpertSink(Protocol):
    """Learns from finished requests."""

    def report(self, request_id: str, decode: ExpertCounts) -> None:
        """A finished request's experts became known.

        request_id: as in the `DecodeRequest` of the attempt. At most one report comes for each.
        decode: counts of the decode rows. `prompt_tokens` is the number of rows, and each layer sums to rows x top_k.
        Raises CountsError if it cannot be used, for instance for another geometry than the model's.
        """


class AnswerExperts(ABC):
    """How an engine states the experts of a request in its answer. It holds no state.

    source: a metric label.
    asks: the member of a body with which a client asks for them itself. Its answer is then left as it is.
    unasked: whether workers state them in every answer, so that they must be taken out of every answer.
    """

    source: ClassVar[str]
    asks: ClassVar[str]
    unasked: ClassVar[bool]

    @abstractmethod
    def asking(self, body: bytes) -> bytes:
        """Return the JSON object `body` with what makes the worker state the experts."""

    @abstractmethod
    def take(self, answer: bytes, choices: tuple[int, int] | None) -> tuple[bytes, list[bytes]]:
        """Return the answer as if nothing had been asked, and the experts of its choices as base64 text.

        choices: where in `answer` the value of the member `choices` stands. None if it has none.
        """

    @abstractmethod
    def decode(self, text: bytes, prompt_tokens: int, generated_tokens: int, geometry: MoeGeometry) -> ExpertCounts:
        """Count the experts of the decode rows in `text`. It may be megabytes. Raises CountsError."""


def count_decode_rows(
    rows: NDArray[np.int32], prompt_tokens: int, generated_tokens: int, geometry: MoeGeometry
) -> ExpertCounts:
    """Count the decode rows among the rows of all tokens but the last, [T, layers, k]. Raises CountsError."""
    _, decode = split_rows(rows, prompt_tokens, generated_tokens, geometry)
    if not len(decode):
        raise CountsError("no_rows", "an answer of one token has no decode rows")
    return count_rows(decode, geometry.experts)
