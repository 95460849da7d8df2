"""The oracle policy of the paper's comparison: every request carries a label, and every label has its own workers."""

from __future__ import annotations

import random
from collections.abc import Mapping

from eldr.policies.base import Decision, DecodeRequest, Policy
from eldr.policies.load import least_loaded

# Any client may send the label header. Beyond this many labels, new ones are treated as no label.
MAX_LABELS = 1024


class Domain(Policy):
    """Splits the fleet among the labels seen so far, and sends each request to the least loaded worker of its label.

    Labels are numbered in order of appearance, workers in order of joining. With D labels and W workers, label d has
    the workers d, d + D, d + 2D, ... if D < W, and otherwise the single worker d % W. A request without a label, or
    whose workers are all full, goes to the least loaded worker.
    """

    name = "domain"

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._workers: list[str] = []
        self._numbers: dict[str, int] = {}

    @property
    def known_labels(self) -> int:
        return len(self._numbers)

    def choose(self, request: DecodeRequest, in_flight: Mapping[str, int]) -> Decision:
        if request.label is None:
            return Decision(least_loaded(in_flight, self._rng), "no_label")
        if request.label not in self._numbers and self.known_labels == MAX_LABELS:
            return Decision(least_loaded(in_flight, self._rng), "too_many_labels")
        number = self._numbers.setdefault(request.label, self.known_labels)
        own = {worker: in_flight[worker] for worker in self._workers_of(number) if worker in in_flight}
        if not own:
            return Decision(least_loaded(in_flight, self._rng), "label_full")
        return Decision(least_loaded(own, self._rng), "label")

    def _workers_of(self, number: int) -> list[str]:
        if not self._workers:
            return []
        if self.known_labels < len(self._workers):
            return self._workers[number :: self.known_labels]
        return [self._workers[number % len(self._workers)]]

    def joined(self, worker: str) -> None:
        self._workers.append(worker)

    def left(self, worker: str) -> None:
        self._workers.remove(worker)
