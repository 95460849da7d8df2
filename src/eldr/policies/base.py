"""The interface of a decode policy, which chooses the decode worker for a request once its prefill has ended.

With aggregated workers there is no prefill before: the policy then chooses the worker that also computes the prompt.

The router and the replay run the same policy objects. A policy reads neither a clock nor a socket. Load and time are
passed in, and random choices come from a seeded generator, so every decision can be repeated from a log.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eldr.counts import ExpertCounts
from eldr.marks import mypyc_attr
from eldr.policies.shares import Share
from eldr.prompt.words import Words

if TYPE_CHECKING:
    from eldr.activation import ActivationModel
    from eldr.policies.learned import Learned
    from eldr.policies.refit import Refit, RefitTask
    from eldr.policies.worker_costs import LearnedCost
    from eldr.prompt.model import PromptModel


# Classes instantiated for every request spell out __init__: mypyc does not compile the one that dataclass makes.
@dataclass(slots=True, init=False)
class DecodeRequest:
    """What a policy may know about a request. Policies must not modify it.

    request_id: unique among running requests.
    prompt_tokens: the length of the prompt.
    counts: the expert counts of the prompt. None if the worker had none.
    label: the kind of the request, as given by the client in the header X-Eldr-Label. None if not given.
    max_tokens: the client's limit on generated tokens. None if not given.
    counts_wire: the wire form that counts were decoded from, so that a log need not encode them again. None if they
        were not decoded.
    words: the words of the prompt. None if it was not looked at.
    latent: float32 [R], what the prompt model in use makes of the words. The policy sets it; a log repeats it.
    computes_prompt: whether the chosen worker also computes the prompt, as an aggregated worker does. Then
        `prompt_tokens` is an estimate.
    cached_tokens: worker -> tokens of the prompt that are probably in its prefix cache. A worker that is not there has
        none. None if nothing is known.
    generated_tokens: how many tokens it generated, set before `finished`. None if nobody knows.
    """

    request_id: str
    prompt_tokens: int
    counts: ExpertCounts | None
    label: str | None
    max_tokens: int | None
    counts_wire: Mapping[str, Any] | None
    words: Words | None
    latent: NDArray[np.float32] | None
    computes_prompt: bool
    cached_tokens: Mapping[str, int] | None
    generated_tokens: int | None

    def __init__(
        self,
        request_id: str,
        prompt_tokens: int,
        counts: ExpertCounts | None = None,
        label: str | None = None,
        max_tokens: int | None = None,
        counts_wire: Mapping[str, Any] | None = None,
        words: Words | None = None,
        computes_prompt: bool = False,
        cached_tokens: Mapping[str, int] | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.counts = counts
        self.label = label
        self.max_tokens = max_tokens
        self.counts_wire = counts_wire
        self.words = words
        self.latent = None
        self.computes_prompt = computes_prompt
        self.cached_tokens = cached_tokens
        self.generated_tokens = None

    def uncached_tokens(self, worker: str) -> int:
        """The tokens of the prompt that `worker` would have to compute. At least the last one is always computed."""
        cached = 0 if self.cached_tokens is None else self.cached_tokens.get(worker, 0)
        return max(self.prompt_tokens - cached, 1)

    def forget_counts(self) -> None:
        """Drop the counts and the words. They take more memory than everything else about a running stream."""
        self.counts = self.counts_wire = self.words = self.latent = None


@dataclass(slots=True, init=False)
class Decision:
    """A policy's choice.

    worker: the chosen worker.
    reason: a short snake_case word, suitable as a metric label.
    """

    worker: str
    reason: str

    def __init__(self, worker: str, reason: str) -> None:
        self.worker = worker
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Picture:
    """A view of what a policy knows about its workers, for display. It has one row per worker.

    kind: "expected_union" for the expected distinct experts of a decode step, one column per layer; or "zones" for the
        cosine of the worker's zone with every worker's zone, in the same order.
    rows: worker -> values.
    most: the largest value that a cell can have.
    """

    kind: str
    rows: Mapping[str, list[float]]
    most: float


@dataclass(frozen=True, slots=True)
class ExpectedStep:
    """What a policy expects of the next decode step of a worker.

    experts: the distinct experts, summed over the MoE layers.
    layers, experts_per_layer: the shape of the model.
    context_tokens: the tokens of the prompts of the requests there.
    reads_per_expert: what its step time counts for each of these experts: more than 1 if some have to be fetched.
    """

    experts: float
    layers: int
    experts_per_layer: int
    context_tokens: int
    reads_per_expert: float = 1.0


# A compiled router accepts policies that are not compiled.
@mypyc_attr(allow_interpreted_subclasses=True)
class Policy(ABC):
    """Chooses a decode worker for each request, and is notified of what happens in the fleet.

    Workers are identified by a string (the router uses the URL). `joined` is called once per worker, before any request
    can go to it; `left` is called once, when it goes for good. A request runs on its worker between `started` and
    `finished`. Both are called exactly once for every request sent to a worker.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name used in `--policy` and in metrics. A class attribute is enough."""

    @abstractmethod
    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        """Choose the worker for `request`.

        in_flight: eligible worker -> its decode requests in flight. Never empty. It leaves out workers that are at
            capacity, unhealthy or draining, so a policy can never choose them.
        """

    # Background refitting (`eldr.policies.refit`). A policy that fits nothing needs none of these.
    @property
    def signatures_seen(self) -> int:
        """Number of request signatures seen so far."""
        return 0

    def refit_task(self, newest: int) -> RefitTask | None:
        """Return a task that fits zones to the `newest` signatures, and that any process can run.

        None if there is nothing to fit.
        """
        return None

    def refitted(self, refit: Refit) -> None:  # noqa: B027
        """Adopt the result of a fit, all at once. The fleet may have changed since its task was made."""

    # Signatures from the words of prompts. A policy without signatures needs none of these.
    def wants_words(self, with_counts: bool) -> bool:
        """Whether it looks at the words of a request that comes with the counts of its prompt, or without."""
        return False

    @property
    def prompts(self) -> PromptModel | None:
        """The prompt model that it was made with. None for none."""
        return None

    # Corrections of what the counts of prompts say. A policy that uses counts as they are needs none of these.
    @property
    def corrects_counts(self) -> bool:
        """Whether it predicts decodes by the counts of prompts, and so can use an activation model."""
        return False

    @property
    def predictor(self) -> ActivationModel | None:
        """The activation model that it was made with. None for none."""
        return None

    def learned(self, learned: Learned) -> None:  # noqa: B027
        """Predict by what was learned from finished requests from now on. A policy that predicts nothing ignores it."""

    # Step times learned from the workers' own reports. A policy without step times needs none of these.
    @property
    def prices_steps(self) -> bool:
        """Whether it makes anything of a learned step time."""
        return False

    def expected_step(self, worker: str) -> ExpectedStep | None:
        """What it expects of the next step of a worker that has joined. None if it expects nothing."""
        return None

    def cost_learned(self, worker: str, learned: LearnedCost) -> None:  # noqa: B027
        """Believe this step time of a worker that has joined, until the next one or until it has left.

        A policy without step times ignores it.
        """

    # Hooks for policies that keep state. A policy that only looks at the load needs none of them.
    def started(self, request: DecodeRequest, worker: str) -> None:  # noqa: B027
        """`request` was sent to `worker`. Its counts may be dropped afterwards."""

    def prompt_computed(self, request: DecodeRequest, worker: str) -> None:  # noqa: B027
        """`worker` has computed the prompt of `request`, which has `computes_prompt`. Its first token is there.

        Called at most once, between `started` and `finished`. A driver that cannot see a request's first token calls it
        right after `started`: such a prompt then never counts as waiting.
        """

    def finished(self, request: DecodeRequest, worker: str) -> None:  # noqa: B027
        """`request` has stopped running on `worker`: it completed, failed or was cancelled.

        Its counts may be gone by now.
        """

    def joined(self, worker: str) -> None:  # noqa: B027
        """`worker` is now part of the fleet."""

    def left(self, worker: str) -> None:  # noqa: B027
        """`worker` is no longer part of the fleet."""

    # Hooks for several routers in front of the same workers (`eldr.policies.shares`). The load that they hand to
    # `choose` counts the requests of all of them, so a policy that only looks at the load needs none of these.
    def share(self, request: DecodeRequest, worker: str) -> Share | None:
        """What the policies of other routers must know of `request`. Asked right after `started`.

        None if they need not even know that it runs.
        """
        return Share(None, request.prompt_tokens)

    def elsewhere_started(self, worker: str, share: Share) -> None:  # noqa: B027
        """Another router has sent a request to `worker`.

        `worker` may be unknown here, or known no longer: the request counts whenever `worker` is part of the fleet. A
        share of another model, or one that says nothing to this policy, is ignored.
        """

    def elsewhere_prompt_computed(self, worker: str, share: Share) -> None:  # noqa: B027
        """`worker` has computed the prompt of that request, whose share has `computes_prompt`.

        Called at most once. A driver that is not told of this calls it right after `elsewhere_started`.
        """

    def elsewhere_finished(self, worker: str, share: Share) -> None:  # noqa: B027
        """That request has ended, or its router is gone.

        Called once for every `elsewhere_started`, also if `worker` has left since, with the same worker and the very
        same object. A request that is not known to run, or no longer, is ignored.
        """

    def picture(self) -> Picture | None:
        """Return a view of the policy's state, or None if there is nothing to show.

        Never called while a request waits for it.
        """
        return None
