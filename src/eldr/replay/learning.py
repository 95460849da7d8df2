"""Learning from finished requests in simulated time.

A trace has few requests, and a replay serves them again and again. A model that has been taught by a request knows its
words and its counts, and would predict it far better than any new request. So nobody is predicted by a model that it
has taught: the requests are divided into FOLDS parts, and each part has a learner of its own, which the requests of all
other parts teach. Before each choice the policy gets the models of that request's part.

Each learner thus hears of (FOLDS - 1) / FOLDS of what a router would hear of. A request teaches only once, since it has
nothing new to say when it comes again: a trace runs out of lessons, and its curve becomes flat, where real traffic goes
on teaching.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eldr.counts import ExpertCounts
from eldr.learning.learner import Learner, LearnTask, Taught
from eldr.learning.lessons import CAPACITY, Asked, share_codes
from eldr.policies.base import DecodeRequest, Policy
from eldr.policies.learned import Learned
from eldr.replay.packed import PackedTrace

# How long a fit to the words of CAPACITY lessons takes in the router's second process, with a cross-validation and
# without, and what every fit takes; and a fit to their counts. It grows with the square of the lessons at least.
CHOOSING_S, CHOSEN_S, LEAST_S = 6.5, 0.8, 0.1
CHOOSING_COUNTS_S, CHOSEN_COUNTS_S = 5.4, 3.4
FOLDS = 4
NOTHING = Learned(None, None)


class SimulatedLearning:
    """Takes a share of the finished requests as lessons, and hands the policy each model when a router would have it.

    Requests with equal prompts are in the same fold.

    trace: a trace, with prompts if the policy looks at words.
    share: of the finished requests, those that report their experts, drawn at random.

    folds: the fold of each request, int64 [N].
    learners: the learner that predicts each fold.
    """

    def __init__(self, policy: Policy, trace: PackedTrace, share: float, seed: int) -> None:
        self._policy = policy
        self._trace = trace
        self._share = share
        self._rng = np.random.default_rng([seed, 3])
        self.folds = deal(trace, self._rng)
        words, counts = policy.wants_words(with_counts=True), policy.corrects_counts
        self.learners = [
            Learner(policy.prompts, policy.predictor, words=words, counts=counts, seed=seed) for _ in range(FOLDS)
        ]
        self._words, self._counts = words, counts
        self._fitted: list[tuple[float, Taught] | None] = [None] * FOLDS
        self._learned: list[Learned | None] = [None] * FOLDS
        self._told: Learned | None = None
        self._has_taught: set[int] = set()

    def finished(self, index: int) -> None:
        """A request of the trace has ended."""
        if self._rng.random() >= self._share or index in self._has_taught:
            return
        self._has_taught.add(index)
        asked, decode = self._asked(index), self.report(index)
        for fold, learner in enumerate(self.learners):
            if fold != self.folds[index]:
                learner.take(asked, decode)

    def _asked(self, index: int) -> Asked:
        trace = self._trace
        words = trace.prompts[index] if self._words and trace.prompts is not None else None
        if not self._counts:
            return Asked(words)
        counts = trace.counts[index]
        return Asked(words, counts.prompt_tokens, share_codes(counts))

    def report(self, index: int) -> ExpertCounts:
        """What the worker of a finished request says of its decode rows."""
        return self._trace.decode_counts(index)

    def advance(self, now_s: float) -> None:
        """Call this before every choice. Between two choices a new model has no visible effect."""
        for fold in range(FOLDS):
            self._advance(fold, now_s)

    def _advance(self, fold: int, now_s: float) -> None:
        """Let one learner fit what is due."""
        learner, fitted = self.learners[fold], self._fitted[fold]
        if fitted is not None:
            if now_s < fitted[0]:
                return
            self._learned[fold] = learner.taught(fitted[1]) or self._learned[fold]
            self._fitted[fold] = None
        task = learner.task()
        if task is not None:
            self._fitted[fold] = now_s + fit_s(task), task.run()

    def look_at(self, request: DecodeRequest, index: int) -> None:
        """Tell the policy the models of this request's fold."""
        learned = self._learned[self.folds[index]]
        if learned is not self._told:
            self._told = learned
            self._policy.learned(learned or NOTHING)


def fit_s(task: LearnTask) -> float:
    """How long a fit takes."""
    found_s = LEAST_S
    if task.of_words is not None:
        chosen_s = CHOOSING_S if task.of_words.choice is None else CHOSEN_S
        found_s += chosen_s * (len(task.of_words.words) / CAPACITY) ** 2
    if task.of_counts is not None:
        chosen_s = CHOOSING_COUNTS_S if task.of_counts.choice is None else CHOSEN_COUNTS_S
        found_s += chosen_s * (len(task.of_counts.profiles) / CAPACITY) ** 2
    return found_s


def deal(trace: PackedTrace, rng: np.random.Generator) -> NDArray[np.int64]:
    """Divide requests into FOLDS parts at random, int64 [N], such that equal prompts are in the same part."""
    if trace.prompts is None:
        texts = [counts.counts.tobytes() for counts in trace.counts]
    else:
        texts = [prompt.buckets.tobytes() + prompt.counts.tobytes() for prompt in trace.prompts]
    number = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    fold = rng.permutation(len(number)) % FOLDS
    return np.array([fold[number[text]] for text in texts], dtype=np.int64)
