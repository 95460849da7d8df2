"""Outcomes of the legs at each worker: counted, judged (ejection.py), and reported to the fleet."""

from __future__ import annotations

import logging
import random
import time

from eldr.router.config.endpoint import LEGS, LegName
from eldr.router.config.groups import EjectionSettings
from eldr.router.fleet.ejection import EjectionRules, Ejections, Standing
from eldr.router.fleet.groups import ModelGroup
from eldr.router.fleet.workers import Fleet, Worker
from eldr.router.observe.counters import Metrics

log = logging.getLogger("eldr.router")


class Outcomes:
    """Records how legs end, and keeps the workers' ejections in the fleet up to date."""

    def __init__(self, fleet: Fleet, metrics: Metrics, config: EjectionSettings) -> None:
        self._fleet = fleet
        self._metrics = metrics
        rules = EjectionRules(
            consecutive=config.eject_failures,
            rate=config.eject_rate,
            base_s=config.eject_base_s,
            max_s=config.eject_max_s,
            share=config.eject_share,
        )
        # Do not use the configured seed, or routers with the same configuration would send their trials together.
        self._ejections: dict[LegName, Ejections] = {leg: Ejections(rules, random.getrandbits(64)) for leg in LEGS}

    def began(self, worker: Worker) -> None:
        """A leg starts at `worker`. If the worker is on trial, this is the trial."""
        if worker.on_trial and self._ejections[worker.leg].began(worker.url):
            self._apply(worker)

    def ended(self, worker: Worker) -> None:
        """A leg is over. If a trial ended without a verdict (its client left), the next leg becomes the trial."""
        if worker.ejected and self._fleet.has(worker) and self._ejections[worker.leg].ended(worker.url):
            self._apply(worker)

    def succeeded(self, worker: Worker) -> None:
        if self._fleet.has(worker) and self._ejections[worker.leg].succeeded(worker.url, time.monotonic()):
            self._apply(worker)
            _report(logging.INFO, "back in service: its trial succeeded", worker)

    def failed(self, worker: Worker, reason: str) -> None:
        """A leg failed through the worker's fault. `reason` is a metric label."""
        if not self._fleet.has(worker):
            return
        self._metrics.failures[worker.role, worker.url, reason] += 1
        if worker.draining:
            return  # it was cut off, or will leave anyway
        why = self._ejections[worker.leg].failed(worker.url, time.monotonic(), self._up_beside(worker))
        if why is not None:
            self._metrics.ejections[worker.role, worker.url, why] += 1
            self._apply(worker)
            _report(logging.WARNING, "ejected", worker, why=why, last_failure=reason)

    def refused(self, worker: Worker, reason: str) -> None:
        """The worker refuses connections. It gets no more requests until a probe succeeds."""
        if worker.healthy:
            _report(logging.WARNING, "refuses connections", worker)
        self._fleet.set_healthy(worker, False)
        self.failed(worker, reason)

    def sweep(self, now_s: float) -> None:
        """Start the trials that are due."""
        for leg, ejections in self._ejections.items():
            if ejections.not_in:
                workers = self._fleet.workers(leg)
                for url in ejections.due(now_s):
                    self._apply(workers[url])
                    _report(logging.INFO, "on trial", workers[url])
        self._relieve(now_s)

    def fleet_changed(self, worker: Worker) -> None:
        """A listener of the fleet. Forgets workers that have left.

        Where addresses come and go all the time, as in a cluster of containers, the records would otherwise grow
        forever.
        """
        if not self._fleet.has(worker):
            self._ejections[worker.leg].forget(worker.url)
            self._metrics.forget(worker.role, worker.url)
        self._relieve(time.monotonic())

    def _relieve(self, now_s: float) -> None:
        """End ejections that the other workers of the same model cannot make up for."""
        for leg, ejections in self._ejections.items():
            if ejections.not_in:
                workers = self._fleet.workers(leg)
                for group in self._fleet.groups:
                    for url in ejections.relieve(now_s, _up(group, leg)):
                        self._apply(workers[url])
                        _report(logging.WARNING, "back in service: too few others are left", workers[url])

    def _up_beside(self, worker: Worker) -> set[str]:
        """The workers that answer their probes and share the load of `worker`: those of its group."""
        group = self._fleet.group(worker)
        return set() if group is None else _up(group, worker.leg)

    def _apply(self, worker: Worker) -> None:
        standing = self._ejections[worker.leg].standing(worker.url)
        self._fleet.set_ejected(worker, standing in (Standing.OUT, Standing.TRYING), standing is Standing.TRIAL)


def _up(group: ModelGroup, leg: LegName) -> set[str]:
    return {worker.url for worker in group.workers[leg].values() if worker.up}


def _report(level: int, what: str, worker: Worker, **fields: object) -> None:
    log.log(level, "worker %s", what, extra={"fields": {"role": worker.role, "worker": worker.url, **fields}})
