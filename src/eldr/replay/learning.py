"""Learning from finished requests in simulated time.

A trace has few requests, and a replay serves them again and again. A model that has been taught by a request knows its
words, and would predict it far better than any new request. So nobody is predicted by a model that it has taught: the
requests are divided into FOLDS parts, and each part has a learner of its own, which the requests of all other parts
teach. The policy sees one model all the same, made of those of all learners (`StackedModels`).

Each learner thus hears of (FOLDS - 1) / FOLDS of what a router would hear of. A request teaches only once, since it has
nothing new to say when it comes again: a trace runs out of lessons, and its curve becomes flat, where real traffic goes
on teaching.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eldr.counts import ExpertCounts
from eldr.learning.learner import Learner, LearnTask, Taught
from eldr.learning.lessons import CAPACITY
from eldr.policies.base import DecodeRequest, Policy
from eldr.policies.learned import Learned
from eldr.prompt.model import ProfileMap, PromptModel
from eldr.prompt.words import Words
from eldr.replay.packed import PackedTrace

# How long a fit to CAPACITY lessons takes in the router's second process, with a cross-validation and without, and what
# every fit takes. It grows with the square of the lessons at least.
CHOOSING_S, CHOSEN_S, LEAST_S = 6.5, 0.8, 0.1
FOLDS = 4


class SimulatedLearning:
    """Takes a share of the finished requests as lessons, and hands the policy each model when a router would have it.

    Requests with equal prompts are in the same fold.

    trace: a trace with prompts.
    share: of the finished requests, those that report their experts, drawn at random.

    folds: the fold of each request, int64 [N].
    learners: the learner that predicts each fold.
    """

    def __init__(self, policy: Policy, trace: PackedTrace, share: float, seed: int) -> None:
        assert trace.prompts is not None
        self._policy = policy
        self._trace = trace
        self._prompts = trace.prompts
        self._share = share
        self._rng = np.random.default_rng([seed, 3])
        self.folds = deal(trace.prompts, self._rng)
        self.learners = [Learner(policy.prompts, seed) for _ in range(FOLDS)]
        self._fitted: list[tuple[float, Taught] | None] = [None] * FOLDS
        self._has_taught: set[int] = set()
        self._models: StackedModels | None = None

    def finished(self, index: int) -> None:
        """A request of the trace has ended."""
        if self._rng.random() >= self._share or index in self._has_taught:
            return
        self._has_taught.add(index)
        decode = self.report(index)
        for fold, learner in enumerate(self.learners):
            if fold != self.folds[index]:
                learner.take(self._prompts[index], decode)

    def report(self, index: int) -> ExpertCounts:
        """What the worker of a finished request says of its decode rows."""
        return self._trace.decode_counts(index)

    def advance(self, now_s: float) -> None:
        """Call this before every choice. Between two choices a new model has no visible effect."""
        learned = [self._advance(fold, now_s) for fold in range(FOLDS)]
        if any(learned):
            self._models = StackedModels([learner.model for learner in self.learners])
            self._policy.learned(Learned(self._models.profiles, None))

    def _advance(self, fold: int, now_s: float) -> bool:
        """Let one learner fit what is due. Returns whether it has a new model."""
        learner, fitted = self.learners[fold], self._fitted[fold]
        learned = None
        if fitted is not None:
            if now_s < fitted[0]:
                return False
            learned = learner.taught(fitted[1])
            self._fitted[fold] = None
        task = learner.task()
        if task is not None:
            self._fitted[fold] = now_s + fit_s(task), task.run()
        return learned is not None

    def look_at(self, request: DecodeRequest, index: int) -> None:
        """Give a request the latent of its own fold's model in place of its words, once anything was learned."""
        if self._models is not None and request.words is not None:
            request.latent = self._models.latent(int(self.folds[index]), request.words)
            request.words = None


def fit_s(task: LearnTask) -> float:
    """How long a fit takes."""
    whole_s = CHOOSING_S if task.choice is None else CHOSEN_S
    return LEAST_S + whole_s * (len(task.words) / CAPACITY) ** 2


class StackedModels:
    """Several prompt models as one.

    A latent has a block for each model, and is zero outside one of them. The block ends with a one, by which the map
    adds the difference of that model's mean from the mean of all.

    profiles: the map of the whole.
    """

    def __init__(self, models: Sequence[PromptModel | None]) -> None:
        self._models = models
        known = [model.profiles for model in models if model is not None]
        mean = np.stack([profiles.mean for profiles in known]).mean(axis=0)
        rows = [part for profiles in known for part in (profiles.up, (profiles.mean - mean)[None])]
        self.profiles = ProfileMap(mean, np.concatenate(rows), known[0].layers, known[0].top_k)
        sizes = [0 if model is None else model.words.rank + 1 for model in models]
        self._ends = np.cumsum(sizes).tolist()

    def latent(self, number: int, words: Words) -> NDArray[np.float32] | None:
        """What one of the models makes of the words of a prompt. None if it knows none of them, or does not exist."""
        model = self._models[number]
        own = None if model is None else model.words.latent(words)
        if own is None:
            return None
        latent = np.zeros(self._ends[-1], dtype=np.float32)
        end = self._ends[number]
        latent[end - 1 - len(own) : end - 1] = own
        latent[end - 1] = 1
        return latent


def deal(prompts: Sequence[Words], rng: np.random.Generator) -> NDArray[np.int64]:
    """Divide prompts into FOLDS parts at random, int64 [N], such that equal ones are in the same part."""
    texts = [(prompt.buckets.tobytes(), prompt.counts.tobytes()) for prompt in prompts]
    number = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    fold = rng.permutation(len(number)) % FOLDS
    return np.array([fold[number[text]] for text in texts], dtype=np.int64)
