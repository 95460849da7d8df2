"""Decides when models are learned anew, and whether the new ones are used.

Models are learned from the last lessons alone, so that old traffic gives way. A prompt model is used if it predicts
requests that it was not fitted to better than the fitted model does. An activation model corrects what the counts of a
prompt say by as much as such requests bear out. Reports that have nothing to do with the prompts thus change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from eldr.activation import ActivationModel
from eldr.counts import ExpertCounts
from eldr.learning.lessons import LEAST_ROWS, Asked, Lesson, Lessons, share_codes
from eldr.learning.of_counts import CountsChoice, CountsTask
from eldr.learning.of_words import WordsTask
from eldr.policies.learned import Learned
from eldr.prompt.fit import Choice
from eldr.prompt.model import PromptModel

# The first fit needs so many lessons. Then each needs so many new ones, or this share of those there are.
FIRST = 24
EVERY, EVERY_SHARE = 24, 0.1
# Cross-validation takes most of the time of a fit, and its choice hardly changes. It is made anew when there are so
# many times more lessons than at the last one, or as many new ones as are kept.
CHOOSE_AGAIN = 1.5


@dataclass(frozen=True, slots=True, eq=False)
class LearnTask:
    """The input of a fit of each model that there are lessons for. It can be sent to another process."""

    of_words: WordsTask | None
    of_counts: CountsTask | None

    def run(self) -> Taught:
        """Raises ActivationError if there are too few lessons."""
        return Taught(
            None if self.of_words is None else self.of_words.run(),
            None if self.of_counts is None else self.of_counts.run(),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Taught:
    """The results of a fit: for each model the choice of its cross-validation, and the model if it is to be used."""

    of_words: tuple[Choice, PromptModel | None] | None
    of_counts: tuple[CountsChoice | None, ActivationModel | None] | None


class Learner:
    """Learns the models of one model's fleet.

    fitted: the prompt model that there is at first. None for none.
    predictor: the activation model that there is at first. None for none.
    words, counts: whether to learn from the words of prompts, and from their counts.
    seed: the seed of the folds.
    lessons: what it learns from. None before the first.
    is_sure: whether their geometry is that of a model it had at first, or of a request of its own router. Before that,
        lessons of other routers are kept, but nothing is fitted to them.
    prompts: the best prompt model so far.
    activation: the activation model that it has learned. None before the first, and if reports are not believed.
    r2: the share of the variance of profiles that the last prompt model explained, cross-validated.
    """

    def __init__(
        self,
        fitted: PromptModel | None = None,
        predictor: ActivationModel | None = None,
        *,
        words: bool = True,
        counts: bool = True,
        seed: int = 0,
    ) -> None:
        self._fitted = fitted
        self._predictor = predictor
        self._words = words
        self._counts = counts
        self._seed = seed
        self._choice: Choice | None = None
        self._counts_choice: CountsChoice | None = None
        self._chosen_at = self._fitted_at = 0
        self.lessons: Lessons | None = None
        self.is_sure = fitted is not None or predictor is not None
        self.prompts = fitted
        self.activation: ActivationModel | None = None
        self.r2 = 0.0
        if fitted is not None:
            profiles = fitted.profiles
            self.lessons = Lessons(profiles.layers, profiles.experts, profiles.top_k)
        elif predictor is not None:
            experts = len(predictor.mean_profile) // predictor.layers
            self.lessons = Lessons(predictor.layers, experts, predictor.top_k)

    def take(self, asked: Asked, decode: ExpertCounts) -> Lesson | None:
        """Learn from a finished request of this router. Returns what was learned from. None if it says nothing.

        decode: the counts of its decode rows.
        """
        if decode.prompt_tokens < LEAST_ROWS or not self._can_use(asked):
            return None
        if not self.is_sure:
            self.is_sure = True
            lessons, shape = self.lessons, (decode.layers, decode.experts, decode.top_k)
            if lessons is not None and (lessons.layers, lessons.experts, lessons.top_k) != shape:
                self.lessons = None  # other routers spoke of another model
        lesson = Lesson(decode.layers, decode.experts, decode.top_k, asked, share_codes(decode))
        return lesson if self.add(lesson) else None

    def add(self, lesson: Lesson) -> bool:
        """Learn from a finished request, of this router or another. Returns whether it says something."""
        if not self._can_use(lesson.asked):
            return False
        lessons = self.lessons
        if lessons is None:
            lessons = self.lessons = Lessons(lesson.layers, lesson.experts, lesson.top_k)
        if (lesson.layers, lesson.experts, lesson.top_k) != (lessons.layers, lessons.experts, lessons.top_k):
            return False
        lessons.add(lesson.asked, lesson.profile)
        return True

    def _can_use(self, asked: Asked) -> bool:
        has_words = self._words and asked.words is not None and len(asked.words) > 0
        return has_words or (self._counts and asked.frequencies is not None)

    def task(self) -> LearnTask | None:
        """What is to be fitted now. None if there are too few new lessons."""
        lessons = self.lessons
        if lessons is None or lessons.taken < FIRST or not self.is_sure:
            return None
        if self._fitted_at and lessons.taken < self._fitted_at + max(EVERY, EVERY_SHARE * len(lessons)):
            return None
        stale = lessons.taken >= min(CHOOSE_AGAIN * self._chosen_at, self._chosen_at + len(lessons))
        self._fitted_at = lessons.taken
        if stale:
            self._chosen_at = lessons.taken
            self._choice = self._counts_choice = None
        return LearnTask(self._words_task(lessons), self._counts_task(lessons))

    def _words_task(self, lessons: Lessons) -> WordsTask | None:
        words, profiles = lessons.with_words()
        if not self._words or len(words) < FIRST:
            return None
        return WordsTask(words, profiles, lessons.layers, lessons.top_k, self._choice, self._fitted, self._seed)

    def _counts_task(self, lessons: Lessons) -> CountsTask | None:
        tokens, frequencies, profiles = lessons.with_frequencies()
        if not self._counts or len(tokens) < FIRST:
            return None
        shape = lessons.layers, lessons.top_k
        return CountsTask(tokens, frequencies, profiles, *shape, self._counts_choice, self._predictor, self._seed)

    def taught(self, taught: Taught) -> Learned | None:
        """Take the result of a task. Returns what a policy is to use from now on. None if nothing changes."""
        changed = False
        if taught.of_words is not None:
            self._choice, model = taught.of_words
            self.r2 = self._choice.r2
            model = model or self._fitted or self.prompts
            changed = model is not self.prompts
            self.prompts = model
        if taught.of_counts is not None:
            self._counts_choice, activation = taught.of_counts
            changed |= activation is not self.activation
            self.activation = activation
        return self.learned() if changed else None

    def learned(self) -> Learned:
        """What a policy is to use from now on."""
        return Learned.of(self.prompts, self.activation)
