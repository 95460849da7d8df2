"""The interface of a decode policy: which decode worker gets a request whose prefill has ended.

The router and the replay run the same policy objects. A policy reads neither clock nor socket: load and time are
arguments, randomness comes from a seeded generator, so that every decision can be repeated from a log.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eldr.counts import ExpertCounts
from eldr.marks import mypyc_attr

if TYPE_CHECKING:
    from eldr.policies.refit import Refit, RefitTask


# Of the classes that every request makes objects of, __init__ is written out: one that dataclass makes is not compiled.
@dataclass(slots=True, init=False)
class DecodeRequest:
    """What a policy may know of a request, and does not change.

    request_id: unique among the requests that run.
    counts: expert counts of the prompt, None where the worker had none.
    label: the client's own label of the request's kind (header X-Eldr-Label), None if not given.
    max_tokens: the client's limit on generated tokens, None if not given.
    counts_wire: the wire form that counts were read from, None where they were not: a log need not encode them again.
    """

    request_id: str
    prompt_tokens: int
    counts: ExpertCounts | None
    label: str | None
    max_tokens: int | None
    counts_wire: Mapping[str, Any] | None

    def __init__(
        self,
        request_id: str,
        prompt_tokens: int,
        counts: ExpertCounts | None = None,
        label: str | None = None,
        max_tokens: int | None = None,
        counts_wire: Mapping[str, Any] | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.counts = counts
        self.label = label
        self.max_tokens = max_tokens
        self.counts_wire = counts_wire

    def forget_counts(self) -> None:
        """Let go of the counts: they take more memory than all the rest of a running stream."""
        self.counts = self.counts_wire = None


@dataclass(slots=True, init=False)
class Decision:
    """The worker chosen and a short snake_case reason, fit for a metric label."""

    worker: str
    reason: str

    def __init__(self, worker: str, reason: str) -> None:
        self.worker = worker
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Picture:
    """What a policy knows of its workers, one row a worker, for people to look at.

    kind: "expected_union", the expected distinct experts of a decode step, a column a layer; or "zones", the cosine of
    the worker's zone and each worker's, in the same order. most: the largest value that a cell can have.
    """

    kind: str
    rows: Mapping[str, list[float]]
    most: float


# Policies that are not compiled go with a router that is.
@mypyc_attr(allow_interpreted_subclasses=True)
class Policy(ABC):
    """Chooses a decode worker for each request and hears what happens in the fleet.

    Workers are named by their id (the router uses the URL). `joined` is heard once for each worker before any
    request can go to it, `left` once when it goes for good. Between `started` and `finished` a request runs on its
    worker; both are heard exactly once for each request that was sent to a worker.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """As in `--policy` and on metrics; a class attribute will do."""

    @abstractmethod
    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        """The worker for `request`.

        in_flight: eligible worker -> its decode requests in flight; never empty. Workers at capacity, unhealthy or
        draining are not in it, so a policy can never choose them.
        """

    # Background refitting (`eldr.policies.refit`); a policy that fits nothing needs none of these.
    @property
    def signatures_seen(self) -> int:
        """Signatures of requests seen so far."""
        return 0

    def refit_task(self, newest: int) -> RefitTask | None:
        """A fit to the `newest` signatures seen, to be run anywhere; None where nothing can be fitted."""
        return None

    def refitted(self, refit: Refit) -> None:  # noqa: B027
        """Take the outcome of a fit over, at once and whole. The fleet may have changed since its task was made."""

    # Hooks of policies that keep state; a policy that only looks at the load needs none of them.
    def started(self, request: DecodeRequest, worker: str) -> None:  # noqa: B027
        """`request` was sent to `worker`. Afterwards it may lose its counts."""

    def finished(self, request: DecodeRequest, worker: str) -> None:  # noqa: B027
        """`request`, whose counts may be gone by now, no longer runs on `worker`: completed, failed or cancelled."""

    def joined(self, worker: str) -> None:  # noqa: B027
        """`worker` is now part of the fleet."""

    def left(self, worker: str) -> None:  # noqa: B027
        """`worker` is no longer part of the fleet."""

    def picture(self) -> Picture | None:
        """What is to be seen of its state; None if there is nothing. Not asked while a request waits for it."""
        return None
