"""What other texts in a prompt do to its signature: instructions that many requests share, and earlier turns.

The experts are those that were recorded for the prompts alone. So this measures how well a model finds the request in a
longer text, not what the longer text would change in the experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from eldr.evaluate.bench import MAIN_BATCH, Bench, Experiment, Part, Row, run_cell
from eldr.evaluate.prompt_signatures import against_jsq, with_prompts
from eldr.prompt.words import Words, words_of_text
from eldr.replay.experiment import Cell, Laboratory, Settings
from eldr.replay.measurements import RunResult
from eldr.trace import Trace

GROUPS = 4
# Earlier turns of a conversation: prompts of other requests.
TURNS = 3
SHORT, LONG = 2000, 8000
# Text -> what its picture and table call it.
TEXTS_OF = {
    "plain": "the prompt alone",
    "same-2": "2 KB of instructions before it, the same for all",
    "same-8": "8 KB before it, the same for all",
    "groups-8": f"8 KB before it, one of {GROUPS} texts, drawn whatever the prompt",
    "behind-2": "2 KB of instructions behind it, the same for all",
    "turns-label": f"{TURNS} earlier turns of the same label",
    "turns-alike": f"{TURNS} earlier turns with the most similar words",
}
# Whether the calibration requests had such texts too.
FITTED, UNKNOWN = "fitted", "unknown"

SUBJECTS = (
    "the assistant", "every answer", "the first sentence", "a list", "a table", "the summary", "any code",
    "a quotation", "the customer", "our support team", "an order", "a refund", "the account", "a password",
    "the manual", "a date", "an amount of money", "the tool", "a search result", "the conversation", "the user",
    "an attachment", "a warning", "the tone", "a link", "personal data", "the knowledge base", "a function call",
    "the schema", "a paragraph",
)  # fmt: skip
VERBS = (
    "must state", "should never contain", "has to begin with", "may mention", "must not reveal", "should follow",
    "always needs", "refers to", "must be checked against", "should be shorter than", "has to name", "must come before",
    "may be followed by", "is valid only with", "must be kept apart from", "should explain", "is sorted by",
)  # fmt: skip
OBJECTS = (
    "the source of a fact", "three sentences", "the name of the product", "the date in ISO form", "internal notes",
    "the steps in their order", "a polite greeting", "numbers without a unit", "the language of the question",
    "the policy on returns", "the terms of the contract", "medical or legal advice", "the limits of the warranty",
    "a code block", "the price with tax", "the address of a person", "a clear recommendation", "an apology",
    "the next step for the customer", "unverified claims", "the opening hours", "the version of the software",
    "the ticket number", "the result of the last call", "the confirmation of the user", "a short example",
    "the reason for a refusal", "markdown headings", "the current time zone", "the contact for an escalation",
)  # fmt: skip


def instructions(size: int, seed: int) -> bytes:
    """A made-up system prompt of `size` bytes: numbered rules in plain English. Each seed makes others."""
    rng = np.random.default_rng([seed, 7])
    lines: list[str] = []
    while sum(map(len, lines)) < size:
        subject, verb, thing = (names[int(rng.integers(len(names)))] for names in (SUBJECTS, VERBS, OBJECTS))
        lines.append(f"{len(lines) + 1}. {subject.capitalize()} {verb} {thing}.\n")
    return "".join(lines).encode()[: size - 2] + b"\n\n"


def texts_of(
    trace: Trace, name: str, sides: Sequence[np.ndarray[tuple[int], np.dtype[np.int64]]], seed: int
) -> list[bytes]:
    """The texts of all requests in the way of TEXTS_OF. Earlier turns are prompts of the same side of the split."""
    own = [trace.prompt(request) for request in range(trace.requests)]
    rng = np.random.default_rng([seed, 11])
    if name == "plain":
        return own
    if name.startswith("same"):
        shared = instructions(SHORT if name == "same-2" else LONG, 0)
        return [shared + text for text in own]
    if name == "behind-2":
        shared = instructions(SHORT, 0)
        return [text + b"\n\n" + shared for text in own]
    if name == "groups-8":
        of_group = [instructions(LONG, 1 + group) for group in range(GROUPS)]
        return [
            of_group[int(group)] + text for group, text in zip(rng.integers(GROUPS, size=len(own)), own, strict=True)
        ]
    alike = _similarity([words_of_text(text) for text in own])
    for side in sides:
        for request in side.tolist():
            others = side[side != request]
            if name == "turns-label":
                same = others[trace.label[others] == trace.label[request]]
                chosen = rng.choice(same, min(TURNS, len(same)), replace=False)
            else:
                chosen = others[np.argsort(alike[request, others])[-TURNS:]]
            earlier = [trace.prompt(other) for other in chosen.tolist()]
            own[request] = b"\n\n".join([*earlier, trace.prompt(request)])
    return own


def _similarity(prompts: Sequence[Words]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """The cosine of the words of each two prompts, rare words first, float32 [N, N]."""
    rows = np.zeros((len(prompts), 65536), dtype=np.float32)
    for row, words in zip(rows, prompts, strict=True):
        row[words.buckets] = np.sqrt(words.counts)
    rows *= np.log((1 + len(prompts)) / (1 + (rows > 0).sum(axis=0)))
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    return np.asarray(rows @ rows.T)


def _parts(bench: Bench) -> list[Part]:
    cases = [(text, fit) for text in TEXTS_OF for fit in (FITTED, UNKNOWN) if text != "plain" or fit == FITTED]
    return [{"text": text, "fit": fit} for text, fit in cases]


def _run(bench: Bench, part: Part) -> list[Row]:
    """One row: expected-union by words, against jsq."""
    settings = _settings(bench)
    laboratory = with_prompts(bench).with_settings(settings)
    workers, seeds = max(2, bench.workers // 2), bench.fewer_seeds
    rate = laboratory.rate_for_batch(MAIN_BATCH, workers)
    jsq = run_cell(laboratory, "jsq", workers, rate, MAIN_BATCH, seeds)
    runs: list[RunResult] = []
    explained: list[float] = []
    for seed in range(seeds):
        split = laboratory.split(seed)
        texts = texts_of(bench.trace, part["text"], (split.calibrate, split.serve), seed)
        changed = Laboratory(_retold(bench.trace, texts), settings)
        fitted_on = changed if part["fit"] == FITTED else laboratory
        policy = fitted_on.policy("expected-union", workers, seed)
        runs.append(changed.run_policy(policy, workers, rate, MAIN_BATCH, seed))
        explained.append(_explained(fitted_on, changed, workers, seed))
    row: Row = {**part, "workers": workers, "batch_target": MAIN_BATCH, "rate": rate, "seeds": seeds}
    row |= {"explained": float(np.mean(explained))}
    return [row | against_jsq(Cell("expected-union", workers, rate, runs), jsq)]


def _settings(bench: Bench) -> Settings:
    settings = bench.laboratory.settings
    options = dataclasses.replace(settings.options, signature="prompt")
    return dataclasses.replace(settings, options=options, requests=max(1, bench.requests // 2))


def _retold(trace: Trace, texts: Sequence[bytes]) -> Trace:
    """The same trace with other prompts."""
    return dataclasses.replace(
        trace,
        prompt_text=np.frombuffer(b"".join(texts), dtype=np.uint8),
        prompt_text_offsets=np.cumsum([0, *map(len, texts)], dtype=np.int64),
    )


def _explained(fitted_on: Laboratory, served: Laboratory, workers: int, seed: int) -> float:
    """The squared correlation of predicted with true profiles of served requests, each less its mean.

    A part that all predictions have in common, and their scale, do not matter to it: nor do they to a choice.
    """
    calibration = fitted_on.calibration(workers, seed)
    chosen, prompts = served.split(seed).serve, served.packed.prompts
    if calibration is None or calibration.prompts is None or prompts is None:
        return 0.0
    true = served.trace.decode_profiles().reshape(served.packed.requests, -1)[chosen]
    found = np.stack([calibration.prompts.predict(prompts[request]) for request in chosen.tolist()])
    true, found = true - true.mean(axis=0), found - found.mean(axis=0)
    product = float((true * found).sum())
    return product**2 / max(float((true**2).sum()) * float((found**2).sum()), 1e-12)


TEXTS = Experiment("prompt-texts", _parts, _run)
