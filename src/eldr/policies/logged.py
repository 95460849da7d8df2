"""Decision logs: everything a policy was told and chose, as JSON events, so that each choice can be repeated.

Policies read neither a clock nor a socket and draw from a seeded generator. A fresh policy with the same options that
is told the same events therefore makes the same choices (`eldr.replay.decisions`). A log starts with a header, and
every restart of the router writes another one.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import eldr
from eldr.activation import ActivationModel
from eldr.counts import COUNTS_KEYS, decode_counts, encode_counts
from eldr.kernels import COMPILED
from eldr.policies.base import Decision, DecodeRequest, ExpectedStep, Picture, Policy
from eldr.policies.learned import Learned, decode_floats, encode_floats
from eldr.policies.options import PolicyOptions
from eldr.policies.refit import Refit, RefitTask
from eldr.policies.shares import Share
from eldr.policies.worker_costs import LearnedCost
from eldr.prompt.model import PromptModel

LOG_VERSION = 2

Write = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class LogHeader:
    """The information that a fresh policy needs to repeat a log.

    policy: the policy's name.
    seed: the seed of its random choices.
    options: its options.
    calibration, calibration_sha256: the calibration file and its digest. None without one.
    made_by: the software versions that made the choices. The last bits of sums may differ between versions.
    model: the base model whose requests the policy places. Empty if it is unknown.
    """

    policy: str
    seed: int
    options: PolicyOptions
    calibration: str | None = None
    calibration_sha256: str | None = None
    made_by: Mapping[str, Any] = field(default_factory=lambda: software())
    model: str = ""

    def to_wire(self) -> dict[str, Any]:
        return {
            "event": "log",
            "v": LOG_VERSION,
            "policy": self.policy,
            "seed": self.seed,
            "options": self.options.to_wire(),
            "calibration": self.calibration,
            "calibration_sha256": self.calibration_sha256,
            "made_by": dict(self.made_by),
            "model": self.model,
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> LogHeader:
        """Build a header from its wire form. Raises KeyError, TypeError, ValueError or EldrError if it is not valid."""
        if wire["v"] != LOG_VERSION:
            raise ValueError(f"log version {wire['v']!r}; this eldr reads version {LOG_VERSION}")
        options = PolicyOptions.from_wire(wire["options"])
        found = {name: wire[name] for name in ("policy", "seed", "calibration", "calibration_sha256", "made_by")}
        return cls(**found, options=options, model=wire.get("model", ""))  # 0.1.0 wrote no model


def software() -> dict[str, Any]:
    """Return the versions of the software that runs here."""
    return {
        "eldr": eldr.__version__,
        "numpy": np.__version__,
        "compiled": COMPILED,
        "machine": platform.machine(),
    }


class LoggedPolicy(Policy):
    """Wraps another policy: forwards every call to it, and passes an event for each call to `write`.

    A request's counts are written once, with its choice. Later events refer to the request by id, which must be unique
    among running requests. A start has its own event only if the request did not start at once on the chosen worker. In
    a choice, workers are numbers in joining order, because in a large fleet URLs would fill most of the line.

    A request that another router started is logged with its share, which is all that is known of it here. Later events
    refer to it by a number.
    """

    def __init__(self, policy: Policy, write: Write) -> None:
        self._policy = policy
        self._write = write
        self._numbers: dict[str, int] = {}
        self._joined = 0
        self._shares: dict[Share, int] = {}  # those of requests that run elsewhere, with their numbers
        self._shared = 0
        # The last choice, kept until it is known whether the request starts there.
        self._chosen: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return self._policy.name

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        event: dict[str, Any] = {
            "event": "choose",
            "id": request.request_id,
            "prompt_tokens": request.prompt_tokens,
            "label": request.label,
            "max_tokens": request.max_tokens,
            "counts": _counts_wire(request),
            "latent": None,
            "eligible": [self._numbers[worker] for worker in in_flight],
            "load": list(in_flight.values()),
            "worker": None,
            "started": False,
        }
        if request.computes_prompt:
            event["cached_tokens"] = self._by_number(request.cached_tokens)
        self._write_chosen()
        self._chosen = event
        try:
            decision = self._policy.choose(request, in_flight)
        except Exception as error:
            event["error"] = type(error).__name__
            raise
        if request.latent is not None:
            event["latent"] = encode_floats(request.latent)
        event["worker"] = decision.worker
        event["reason"] = decision.reason
        return decision

    def _by_number(self, cached_tokens: Mapping[str, int] | None) -> list[tuple[int, int]] | None:
        """The (number, cached tokens) of each worker that still belongs to the fleet."""
        if cached_tokens is None:
            return None
        numbers = self._numbers
        return [(numbers[worker], tokens) for worker, tokens in cached_tokens.items() if worker in numbers]

    def _write_chosen(self) -> None:
        event, self._chosen = self._chosen, None
        if event is not None:
            self._write(event)

    def _write_event(self, event: dict[str, Any]) -> None:
        self._write_chosen()
        self._write(event)

    @property
    def signatures_seen(self) -> int:
        return self._policy.signatures_seen

    def refit_task(self, newest: int) -> RefitTask | None:
        return self._policy.refit_task(newest)

    def refitted(self, refit: Refit) -> None:
        self._policy.refitted(refit)
        self._write_event({"event": "refit", **refit.to_wire()})

    def wants_words(self, with_counts: bool) -> bool:
        return self._policy.wants_words(with_counts)

    @property
    def prompts(self) -> PromptModel | None:
        return self._policy.prompts

    @property
    def corrects_counts(self) -> bool:
        return self._policy.corrects_counts

    @property
    def predictor(self) -> ActivationModel | None:
        return self._policy.predictor

    def learned(self, learned: Learned) -> None:
        self._policy.learned(learned)
        self._write_event({"event": "learned", **learned.to_wire()})

    @property
    def prices_steps(self) -> bool:
        return self._policy.prices_steps

    def expected_step(self, worker: str) -> ExpectedStep | None:
        return self._policy.expected_step(worker)

    def cost_learned(self, worker: str, learned: LearnedCost) -> None:
        self._policy.cost_learned(worker, learned)
        self._write_event({"event": "cost_learned", "worker": worker, **learned.to_wire()})

    def started(self, request: DecodeRequest, worker: str) -> None:
        chosen = self._chosen
        if chosen is not None and chosen["worker"] == worker and chosen["id"] == request.request_id:
            chosen["started"] = True
            self._write_chosen()
        else:
            self._write_event({"event": "started", "id": request.request_id, "worker": worker})
        self._policy.started(request, worker)

    def prompt_computed(self, request: DecodeRequest, worker: str) -> None:
        self._write_event({"event": "prompt_computed", "id": request.request_id, "worker": worker})
        self._policy.prompt_computed(request, worker)

    def finished(self, request: DecodeRequest, worker: str) -> None:
        event: dict[str, Any] = {"event": "finished", "id": request.request_id, "worker": worker}
        if request.generated_tokens is not None:
            event["generated_tokens"] = request.generated_tokens
        self._write_event(event)
        self._policy.finished(request, worker)

    def joined(self, worker: str) -> None:
        self._numbers[worker] = self._joined
        self._joined += 1
        self._write_event({"event": "joined", "worker": worker})
        self._policy.joined(worker)

    def left(self, worker: str) -> None:
        self._numbers.pop(worker, None)
        self._write_event({"event": "left", "worker": worker})
        self._policy.left(worker)

    def share(self, request: DecodeRequest, worker: str) -> Share | None:
        return self._policy.share(request, worker)

    def elsewhere_started(self, worker: str, share: Share) -> None:
        if share in self._shares:
            return
        number = self._shares[share] = self._shared
        self._shared += 1
        self._write_event({"event": "elsewhere_started", "share": number, "worker": worker, **share.to_wire()})
        self._policy.elsewhere_started(worker, share)

    def elsewhere_prompt_computed(self, worker: str, share: Share) -> None:
        number = self._shares.get(share)
        if number is not None:
            self._write_event({"event": "elsewhere_prompt_computed", "share": number, "worker": worker})
            self._policy.elsewhere_prompt_computed(worker, share)

    def elsewhere_finished(self, worker: str, share: Share) -> None:
        number = self._shares.pop(share, None)
        if number is not None:
            self._write_event({"event": "elsewhere_finished", "share": number, "worker": worker})
            self._policy.elsewhere_finished(worker, share)

    def picture(self) -> Picture | None:
        return self._policy.picture()


def _counts_wire(request: DecodeRequest) -> Mapping[str, Any] | None:
    """Return the counts as received, without anything else that a worker may have sent along."""
    if request.counts is None:
        return None
    wire = request.counts_wire
    if wire is None:
        return encode_counts(request.counts)
    # They were decoded, so all keys are present.
    return wire if len(wire) == len(COUNTS_KEYS) else {key: wire[key] for key in COUNTS_KEYS}


def request_of(event: Mapping[str, Any], workers: Sequence[str]) -> DecodeRequest:
    """Build the request of a choose event.

    workers: every worker of the log so far, in joining order.
    Raises CountsError, IndexError, KeyError, TypeError or ValueError if the event is not valid.
    """
    counts, cached = event["counts"], event.get("cached_tokens")
    latent = event.get("latent")  # 0.1.0 knew no latents
    request = DecodeRequest(
        request_id=event["id"],
        prompt_tokens=event["prompt_tokens"],
        counts=None if counts is None else decode_counts(counts),
        label=event["label"],
        max_tokens=event["max_tokens"],
        computes_prompt="cached_tokens" in event,
        cached_tokens=None if cached is None else {workers[number]: tokens for number, tokens in cached},
    )
    request.latent = None if latent is None else decode_floats(latent)
    return request
