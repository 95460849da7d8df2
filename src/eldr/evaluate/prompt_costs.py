"""What signatures from prompts cost: time of a request's words, latent and profile, memory of a model, CPU of a fit."""

from __future__ import annotations

import functools
import json
import time

import numpy as np

from eldr.counts import ExpertCounts
from eldr.evaluate.bench import Bench, Experiment, Part, Row
from eldr.evaluate.overhead import time_s
from eldr.kernels import COMPILED
from eldr.learning.learner import EVERY, Learner
from eldr.learning.lessons import CAPACITY, Asked
from eldr.policies.learned import Learned
from eldr.prompt.words import words_of_text

LAYERS, EXPERTS, TOP_K = 48, 128, 8
PROMPT_BYTES = 4096
# Kinds of requests that the made-up lessons have, words of each kind, and words that all kinds share.
KINDS, OWN_WORDS, SHARED_WORDS = 12, 400, 4000
ROWS = 200
CALLS = 200


def _run(bench: Bench, part: Part) -> list[Row]:
    """Rows of sort "time" (microseconds of CPU), "memory" (bytes) and "fit" (seconds of CPU)."""
    rng = np.random.default_rng(0)
    preferred = rng.normal(0, 2, (KINDS, LAYERS, EXPERTS))
    learner = Learner(counts=False)
    lessons = min(CAPACITY, bench.requests)
    texts = [make_text(number % KINDS, rng) for number in range(lessons)]
    words = [words_of_text(text) for text in texts]
    seconds: list[float] = []
    for taken in (lessons, max(lessons // 4, EVERY)):  # the first fit cross-validates, the second keeps its choice
        for number in range(taken):
            learner.take(Asked(words[number]), _decode(preferred[number % KINDS], rng))
        task = learner.task()
        assert task is not None
        begin = time.process_time()
        taught = task.run()
        seconds.append(time.process_time() - begin)
        learner.taught(taught)
    model = learner.prompts
    assert model is not None
    latents = [latent for prompt in words[:CALLS] if (latent := model.words.latent(prompt)) is not None]
    times = {
        "words of the prompt": [time_s(words_of_text, text) for text in texts[:CALLS]],
        "latent": [time_s(model.words.latent, prompt) for prompt in words[:CALLS]],
        "profile": [time_s(model.profiles.profile, latent) for latent in latents],
    }
    shared: Row = {"loops": "C" if COMPILED else "numpy", "rank": model.words.rank}
    rows: list[Row] = []
    for what, of_calls in times.items():
        p50, p99 = (1e6 * np.percentile(of_calls, (50, 99))).tolist()
        rows.append({"sort": "time", "what": what, "p50_us": p50, "p99_us": p99, "calls": len(of_calls), **shared})
    assert learner.lessons is not None
    kept, profiles = learner.lessons.with_words()
    sizes = {
        "table of words": model.words.table.nbytes + model.words.weight.nbytes,
        "map to profiles": model.profiles.up.nbytes + model.profiles.mean.nbytes,
        "profiles of the lessons": profiles.nbytes,
        "words of the lessons": sum(prompt.buckets.nbytes + prompt.counts.nbytes for prompt in kept),
        "event of a decision log when a model is learned": len(json.dumps(Learned(model.profiles, None).to_wire())),
    }
    rows += [{"sort": "memory", "what": what, "bytes": size, **shared} for what, size in sizes.items()]
    for what, cpu_s in zip(("fit, with cross-validation", "fit, as chosen before"), seconds, strict=True):
        rows.append({"sort": "fit", "what": what, "lessons": lessons, "cpu_s": cpu_s, **shared})
    return rows


def make_text(kind: int, rng: np.random.Generator) -> bytes:
    """A made-up text of PROMPT_BYTES bytes. A third of its words are those of its kind."""
    words = PROMPT_BYTES // 4
    own = SHARED_WORDS + kind * OWN_WORDS + rng.integers(OWN_WORDS, size=words)
    shared = (SHARED_WORDS * rng.random(words) ** 3).astype(int)  # few words are common, most are rare
    numbers = np.where(rng.random(words) < 1 / 3, own, shared)
    return " ".join(_spelt(number) for number in numbers.tolist()).encode()[:PROMPT_BYTES]


@functools.cache
def _spelt(number: int) -> str:
    """A word of its own for each number below 26^3, of three to seven letters."""
    letters = [number // 26**power % 26 for power in range(3)]
    return "".join(chr(97 + letter) for letter in letters) + "abcd"[: number % 5]


def _decode(preferred: np.ndarray[tuple[int, int], np.dtype[np.float64]], rng: np.random.Generator) -> ExpertCounts:
    """What a worker reports of a request of this kind, drawn at random: every layer sums to ROWS x TOP_K."""
    weights = preferred + rng.normal(0, 1, preferred.shape)
    chosen = np.argsort(-weights, axis=1)
    counts = np.zeros((LAYERS, EXPERTS), dtype=np.uint32)
    # The first TOP_K experts take two thirds of the rows, the next TOP_K the rest.
    np.put_along_axis(counts, chosen[:, :TOP_K], ROWS * 2 // 3, axis=1)
    np.put_along_axis(counts, chosen[:, TOP_K : 2 * TOP_K], ROWS - ROWS * 2 // 3, axis=1)
    return ExpertCounts(counts, ROWS, TOP_K)


PROMPT_COSTS = Experiment("prompt-costs", lambda bench: [{}], _run, once=True)
