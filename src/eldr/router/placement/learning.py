"""Learns from the finished requests of one group, off the request path, and tells its policy.

A fit runs in a second process. If it fails, the policy goes on with what it has.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from eldr.counts import CountsError, ExpertCounts
from eldr.errors import EldrError
from eldr.learning.kept import Kept
from eldr.learning.learner import Learner
from eldr.learning.lessons import Asked, Lesson, share_codes
from eldr.policies.base import DecodeRequest, Policy
from eldr.router.observe.counters import Metrics
from eldr.router.observe.logs import Throttle
from eldr.router.placement.helper import Helper

log = logging.getLogger("eldr.router")

# How often it looks for enough new lessons.
LOOK_S = 1.0
# What placed requests asked is kept until their experts are reported: of so many requests, and so many words in all. A
# word takes 4 bytes.
MOST_EXPECTED = 8192
MOST_EXPECTED_WORDS = 4 * 2**20
# Of so many of them the counts are kept, 6 MiB for 48 x 128 experts. If more run, they are a sample of all.
MOST_EXPECTED_COUNTS = 1024


class Learning:
    """Learns the models of one group's policy.

    learner: what it has learned.
    file: where the models are kept. None for nowhere.
    tell: lets other replicas learn from the same. None if there are none.
    reports: whether finished requests' experts are reported.
    """

    def __init__(
        self,
        policy: Policy,
        learner: Learner,
        metrics: Metrics,
        file: Path | None,
        reports: bool = True,
        tell: Callable[[Lesson], None] | None = None,
    ) -> None:
        self.learner = learner
        self._tell = tell
        self._policy = policy
        self._metrics = metrics
        self._file = file
        self._takes_counts = reports and policy.corrects_counts
        self._helper = Helper()
        self._throttle = Throttle()
        self._asked: dict[str, Asked] = {}
        self._expected_words = self._expected_counts = 0
        self._reported = False

    def placed(self, request: DecodeRequest) -> None:
        """A request was sent to a worker. Until decode experts are reported, those of its prompt teach its words."""
        words, counts = request.words, request.counts
        if words is not None and not len(words):
            words = None
        if words is not None and counts is not None and not self._reported:
            self._take(Asked(words), counts)
        asked = Asked(words)
        if self._takes_counts and counts is not None and self._expected_counts < MOST_EXPECTED_COUNTS:
            asked.prompt_tokens, asked.frequencies = counts.prompt_tokens, share_codes(counts)
            self._expected_counts += 1
        elif words is None:
            return
        self._asked[request.request_id] = asked
        self._expected_words += 0 if words is None else len(words)
        while len(self._asked) > MOST_EXPECTED or self._expected_words > MOST_EXPECTED_WORDS:
            self._forget(next(iter(self._asked)))

    def expects(self, request_id: str) -> bool:
        """Whether something is known of what this request asked, and its experts are not."""
        return request_id in self._asked

    def report(self, request_id: str, decode: ExpertCounts) -> None:
        """The experts of an expected request became known.

        Raises CountsError if no rows can have them, or if they are of another model.
        """
        asked, lessons = self._forget(request_id), self.learner.lessons if self.learner.is_sure else None
        if asked is None:
            return
        decode.check()
        shape = decode.layers, decode.experts, decode.top_k
        if lessons is not None and shape != (lessons.layers, lessons.experts, lessons.top_k):
            if self._throttle.due("geometry"):
                kept = "" if self._file is None else f"; if the model has changed, remove {self._file} and start anew"
                log.error(
                    "a worker reports %s layers x %s experts, top-%s, which is not what was learned from before%s",
                    *shape,
                    kept,
                )
            raise CountsError("geometry", f"the report is of layers, experts and top-k {shape}: another model's")
        self._reported |= self._take(asked, decode)

    def _take(self, asked: Asked, decode: ExpertCounts) -> bool:
        """Learn from a request, and let others learn from it. Returns whether it says something."""
        lesson = self.learner.take(asked, decode)
        if lesson is not None and self._tell is not None:
            self._tell(lesson)
        return lesson is not None

    def _forget(self, request_id: str) -> Asked | None:
        asked = self._asked.pop(request_id, None)
        if asked is not None:
            self._expected_words -= 0 if asked.words is None else len(asked.words)
            self._expected_counts -= asked.frequencies is not None
        return asked

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
        activation = self.learner.activation
        metrics.learning_trust = None if activation is None else activation.trust
        if learned is not None and self._file is not None:
            await self._save(self._file)

    async def _save(self, file: Path) -> None:
        learner = self.learner
        try:
            await asyncio.to_thread(Kept(learner.prompts, learner.activation).save, file)
        except EldrError as error:
            if self._throttle.due("save"):
                log.error("what was learned is not kept: %s", error)
