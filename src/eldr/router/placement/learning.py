"""Learns from the finished requests of one group, off the request path, and tells its policy.

A fit runs in a second process. If it fails, the policy goes on with what it has.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from eldr.counts import CountsError, ExpertCounts
from eldr.errors import EldrError
from eldr.learning.learner import Learner
from eldr.policies.base import DecodeRequest, Policy
from eldr.prompt.stored import save_model
from eldr.prompt.words import Words
from eldr.router.observe.counters import Metrics
from eldr.router.observe.logs import Throttle
from eldr.router.placement.helper import Helper

log = logging.getLogger("eldr.router")

# How often it looks for enough new lessons.
LOOK_S = 1.0
# The words of placed requests are kept until their experts are reported: of so many requests, and so many in all. A
# word takes 4 bytes.
MOST_EXPECTED = 8192
MOST_EXPECTED_WORDS = 4 * 2**20


class Learning:
    """Learns the prompt model of one group's policy.

    learner: what it has learned.
    file: where the model is kept. None for nowhere.
    """

    def __init__(self, policy: Policy, learner: Learner, metrics: Metrics, file: Path | None) -> None:
        self.learner = learner
        self._policy = policy
        self._metrics = metrics
        self._file = file
        self._helper = Helper()
        self._throttle = Throttle()
        self._words: dict[str, Words] = {}
        self._expected_words = 0
        self._reported = False

    def placed(self, request: DecodeRequest) -> None:
        """A request was sent to a worker. Until decode experts are reported, those of its prompt are learned from."""
        words = request.words
        if words is None or not len(words):
            return
        if request.counts is not None and not self._reported:
            self.learner.take(words, request.counts)
        self._words[request.request_id] = words
        self._expected_words += len(words)
        while len(self._words) > MOST_EXPECTED or self._expected_words > MOST_EXPECTED_WORDS:
            self._forget(next(iter(self._words)))

    def report(self, request_id: str, decode: ExpertCounts) -> None:
        """A finished request's experts became known (`eldr.router.experts.base.ExpertSink`).

        Raises CountsError if they cannot be used.
        """
        words = self._forget(request_id)
        if words is None:
            return  # it was placed without its words, or too many requests ago
        if not self.learner.take(words, decode):
            raise CountsError("geometry", "the experts are those of another model, or of too few tokens")
        self._reported = True

    def _forget(self, request_id: str) -> Words | None:
        words = self._words.pop(request_id, None)
        if words is not None:
            self._expected_words -= len(words)
        return words

    async def run(self) -> None:
        """Learn until cancelled."""
        try:
            while True:
                await asyncio.sleep(LOOK_S)
                await self._learn()
        finally:
            self._helper.end()

    async def _learn(self) -> None:
        task = self.learner.task()
        if task is None:
            return
        begun_s = time.monotonic()
        metrics = self._metrics
        try:
            learned = self.learner.taught(await self._helper.run(task.run))
            if learned is not None:
                self._policy.learned(learned)
        except Exception as error:
            metrics.learning["failed"] += 1
            if self._throttle.due("learning"):
                log.error("nothing was learned from finished requests: %s", error or type(error).__name__)
            return
        metrics.learning["adopted" if learned is not None else "kept"] += 1
        metrics.learning_duration_s = time.monotonic() - begun_s
        metrics.learning_r2 = self.learner.r2
        if learned is not None and self._file is not None:
            await self._save(self._file)

    async def _save(self, file: Path) -> None:
        model = self.learner.model
        if model is None:
            return
        try:
            await asyncio.to_thread(save_model, model, file)
        except EldrError as error:
            if self._throttle.due("save"):
                log.error("what was learned is not kept: %s", error)
