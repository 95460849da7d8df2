"""Which workers serve which model: groups of workers with a base model in common, and the names that they serve.

A worker of vLLM serves a base model under one or several names, and LoRA adapters of it. Workers that share the name of
a base model form a group. Nothing is shared between groups: a hand-off, a prefix or a policy's state of one model means
nothing to another. Within a group, adapters may be loaded on some workers only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from eldr.router.config.endpoint import LEGS, LegName, Role
from eldr.router.http.errors import ApiError

if TYPE_CHECKING:
    from eldr.router.fleet.workers import Worker

Urls = frozenset[str]


# So many models are named to a client that asks for another.
MOST_NAMED = 20


def model_not_found(model: str, bases: Iterable[str] = ()) -> ApiError:
    """The error for a model that no worker serves, in vLLM's words. bases: the names of base models that exist."""
    named = ", ".join(islice(bases, MOST_NAMED))
    aliases = f" Valid aliases: {named}." if named else ""
    return ApiError(404, f"The model `{model}` does not exist.{aliases}", param="model")


class Served:
    """A name that requests ask for, and the workers of its group that serve it. The fleet keeps it up to date.

    name: empty for requests that name no model, or one that no worker lists.
    adapter: whether it is a LoRA adapter, so that its KV blocks differ from those of its base model.
    card: the model's entry in /v1/models. None if no worker lists it.
    max_model_len: how many tokens a prompt and its answer may have together on the decode worker that takes most. None
        while that is unknown for any.
    prefill, decode: the URLs of the workers for these legs that serve it. None if all of the group do.
    requests: its requests that wait or run.
    promised: its admitted requests that run on no decode worker yet. A slot is kept free for each.
    """

    def __init__(self, group: ModelGroup, name: str = "") -> None:
        self.group = group
        self.name = name
        self.adapter = False
        self.card: dict[str, Any] | None = None
        self.max_model_len: int | None = None
        self.prefill: Urls | None = None
        self.decode: Urls | None = None
        self.requests = 0
        self.promised = 0

    def set_card(self, card: dict[str, Any]) -> None:
        self.card = card
        self.adapter = bool(card.get("parent"))

    def promise(self) -> None:
        """One more request needs a decode worker."""
        self.promised += 1
        self.group.promised += 1
        self.group.note_room()
        if self.decode is not None:
            self.group.narrow[self] = None

    def release(self) -> None:
        """One of these requests runs now, or has ended."""
        self.promised -= 1
        self.group.promised -= 1
        if self.decode is not None and not self.promised:
            self.group.narrow.pop(self, None)

    def role(self, leg: LegName) -> Role:
        """The role of the workers that run this leg of its requests."""
        return "aggregated" if leg == "decode" and self.group.aggregated else leg

    def urls(self, leg: LegName) -> Urls | None:
        return self.prefill if leg == "prefill" else self.decode

    def workers(self, leg: LegName) -> Iterator[Worker]:
        """The workers for `leg` that serve it, available or not."""
        urls = self.urls(leg)
        return (worker for url, worker in self.group.workers[leg].items() if urls is None or url in urls)

    def any_available(self, leg: LegName) -> bool:
        return any(worker.available for worker in self.workers(leg))

    def gone_for_s(self, leg: LegName) -> float | None:
        """How long no worker for `leg` that serves it has been available. None if one is, infinite if none ever was."""
        since_s = self.group.left_s[leg]
        for worker in self.workers(leg):
            if worker.gone_since_s is None:
                return None
            since_s = max(since_s, worker.gone_since_s)
        return time.monotonic() - since_s


class ModelGroup:
    """Workers with a base model in common.

    bases: the names of that base model.
    aggregated: whether requests run whole, each on one of the workers for decode legs: there is an aggregated worker.
    workers: leg -> URL -> worker, in the order in which they came.
    eligible: workers for decode legs that may take a request now: URL -> requests in flight, those of other replicas
        included. It is updated with every change and never rebuilt.
    free: how many more requests these workers may run.
    promised: admitted requests that run on none of them yet.
    promised_elsewhere: the same of other replicas.
    waiting_elsewhere: how many other replicas have requests that wait for a slot.
    least_room: the least that `room` has been since somebody began to watch it. None while nobody does.
    narrow: those names with promised requests that only some of them serve.
    left_s: by leg, the monotonic time at which an available worker last left. -inf before the first.
    whole: for requests that name no model.
    unlisted: for requests for names that no worker lists, which workers that list nothing may serve.
    """

    def __init__(self) -> None:
        self.bases: frozenset[str] = frozenset()
        self.aggregated = False
        self.workers: dict[LegName, dict[str, Worker]] = {"prefill": {}, "decode": {}}
        self.eligible: dict[str, int] = {}
        self.free = 0
        self.promised = 0
        self.promised_elsewhere = 0
        self.waiting_elsewhere = 0
        self.least_room: int | None = None
        self.narrow: dict[Served, None] = {}
        self.left_s: dict[LegName, float] = {"prefill": -math.inf, "decode": -math.inf}
        self.whole = Served(self)
        self.unlisted = Served(self)
        self.name_members()

    @property
    def room(self) -> int:
        """How many free slots are promised to nobody. Less than 0 after limits have dropped."""
        return self.free - self.promised - self.promised_elsewhere

    def note_room(self) -> None:
        """Room may have become less."""
        if self.least_room is not None and self.room < self.least_room:
            self.least_room = self.room

    @property
    def name(self) -> str:
        """The name of its base model, the first of several. Empty while unknown."""
        return min(self.bases, default="")

    @property
    def legs(self) -> tuple[LegName, ...]:
        """The legs that its requests have."""
        return ("decode",) if self.aggregated else LEGS

    @property
    def ready(self) -> bool:
        """Whether a worker is available for each leg that its requests have."""
        return all(self.whole.any_available(leg) for leg in self.legs)

    def members(self) -> Iterator[Worker]:
        for workers in self.workers.values():
            yield from workers.values()

    def has(self, worker: Worker) -> bool:
        return self.workers[worker.leg].get(worker.url) is worker

    def shares_base(self, worker: Worker) -> bool:
        """Whether `worker` serves the base model of this group's other workers."""
        others = [other for other in self.members() if other is not worker]
        if not others:
            return not worker.bases.isdisjoint(self.bases)
        return any(not worker.bases.isdisjoint(other.bases) for other in others)

    def parts(self) -> list[list[Worker]]:
        """Its workers, apart if no name of a base model connects them any more. The largest part comes first.

        Workers that list nothing belong to the first.
        """
        parts: list[tuple[frozenset[str], list[Worker]]] = []
        silent: list[Worker] = []
        for worker in self.members():
            if worker.models is None:
                silent.append(worker)
                continue
            names, workers = worker.bases, [worker]
            for part in [part for part in parts if not part[0].isdisjoint(worker.bases)]:
                names, workers = names | part[0], part[1] + workers
                parts.remove(part)
            parts.append((names, workers))
        found = sorted((workers for _, workers in parts), key=len, reverse=True) or [[]]
        found[0] += silent
        return found

    def add(self, worker: Worker) -> None:
        self.workers[worker.leg][worker.url] = worker
        self.refresh(worker)

    def remove(self, worker: Worker) -> None:
        del self.workers[worker.leg][worker.url]
        if worker.available:
            self.left_s[worker.leg] = time.monotonic()
        elif worker.gone_since_s is not None:
            self.left_s[worker.leg] = max(self.left_s[worker.leg], worker.gone_since_s)
        self.eligible.pop(worker.url, None)
        self.free -= worker.free
        worker.free = 0

    def refresh(self, worker: Worker) -> None:
        """Note how many more requests one of its workers may take."""
        if worker.leg != "decode":
            return
        busy = worker.in_flight + worker.elsewhere
        free = worker.max_inflight - busy
        if free > 0 and worker.available:
            self.eligible[worker.url] = busy
            if worker.on_trial:  # one request, no matter what it still runs from before
                free = 1
        else:
            self.eligible.pop(worker.url, None)
            free = 0
        self.free += free - worker.free
        worker.free = free
        self.note_room()

    def name_members(self) -> None:
        """Bring `bases`, `aggregated` and `unlisted` up to date.

        A group that has lost its last worker stays what it was.
        """
        bases: set[str] = set()
        roles: set[Role] = set()
        for worker in self.members():
            bases |= worker.bases
            roles.add(worker.role)
        if bases:
            self.bases = frozenset(bases)
        if roles:
            self.aggregated = "aggregated" in roles
        self.unlisted.prefill = self._unlisted("prefill")
        self.unlisted.decode = self._unlisted("decode")

    def _unlisted(self, leg: LegName) -> Urls | None:
        workers = self.workers[leg]
        urls = frozenset(url for url, worker in workers.items() if worker.models is None)
        return None if urls and len(urls) == len(workers) else urls

    def serving(self, leg: LegName, name: str) -> Urls | None:
        """The URLs of the workers for `leg` that serve `name`, or may serve it. None if all do."""
        workers = self.workers[leg]
        urls = frozenset(url for url, worker in workers.items() if worker.models is None or name in worker.models)
        return None if len(urls) == len(workers) else urls


class Names:
    """Every name that a worker lists, with the workers that serve it."""

    def __init__(self) -> None:
        self._named: dict[str, Served] = {}
        # The last entry in /v1/models for each name that some worker lists, in a group or not.
        self._cards: dict[str, dict[str, Any]] = {}

    def get(self, name: str) -> Served | None:
        return self._named.get(name)

    def listed(self) -> Iterator[Served]:
        return iter(self._named.values())

    def note_cards(self, cards: list[dict[str, Any]]) -> None:
        """Keep the entries of one worker's list."""
        for card in cards:
            name = card["id"]
            self._cards[name] = card
            served = self._named.get(name)
            if served is not None:
                served.set_card(card)

    def refresh(self, groups: list[ModelGroup], workers: Iterable[Worker]) -> None:
        """Find out again who serves what, after workers came or went or changed what they list.

        workers: all workers, also those that are in no group yet.
        """
        group_of: dict[str, ModelGroup] = {}
        for leg in reversed(LEGS):  # an adapter of two base models belongs to one of which decode workers have it
            for group in groups:
                for worker in group.workers[leg].values():
                    for name in worker.models or ():
                        group_of.setdefault(name, group)
        named = self._named
        for name, group in group_of.items():
            served = named.get(name)
            if served is None:
                served = named[name] = Served(group, name)
            served.group = group
            served.set_card(self._cards[name])
        for name in [name for name, served in named.items() if name not in group_of and not served.requests]:
            del named[name]
        for name, served in named.items():
            group = served.group
            if name in group_of:
                served.prefill, served.decode = group.serving("prefill", name), group.serving("decode", name)
                served.max_model_len = _most_tokens(served)
            else:  # no longer listed, but requests that asked for it still run
                served.prefill, served.decode = group.unlisted.prefill, group.unlisted.decode
        for group in groups:
            group.promised = group.whole.promised + group.unlisted.promised
            group.narrow = {group.unlisted: None} if _is_narrow(group.unlisted) else {}
        for served in named.values():
            served.group.promised += served.promised
            if _is_narrow(served):
                served.group.narrow[served] = None
        listed = {name for worker in workers for name in worker.models or ()}
        self._cards = {name: card for name, card in self._cards.items() if name in listed}


def _most_tokens(served: Served) -> int | None:
    lengths = [worker.max_model_len.get(served.name) for worker in served.workers("decode")]
    known = [length for length in lengths if length is not None]
    return max(known) if known and len(known) == len(lengths) else None


def _is_narrow(served: Served) -> bool:
    return served.decode is not None and served.promised > 0
