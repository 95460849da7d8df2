"""The workload presets: the kinds of requests, their shares, and the lengths of prompts and outputs.

From the paper come the kinds of Task (code, mathematics, medicine, law), English and Chinese as three quarters of
Language, 512 generated tokens, and 20 to 100 requests a second on 16 decode workers. The paper's prompts are public
questions and WildChat conversations. We model their lengths as log-normal. Medians and spreads are our estimate for
such questions. The equal shares in Task and the shares of the smaller languages are also ours. Arrivals are a Poisson
process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from eldr.errors import EldrError

MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 16, 4096


class WorkloadError(EldrError):
    """Raised when a workload does not exist, or when a trace or a prompt file cannot serve it."""


@dataclass(frozen=True, slots=True)
class WorkloadKind:
    """One kind of request.

    name: its name.
    share: its share of the arrivals. The shares of a workload sum to 1.
    median_prompt_tokens, prompt_sigma: the log-normal length of prompts. Sigma is that of the natural logarithm.
    labels: what traces and prompt files call this kind, besides its name. Case does not matter.
    """

    name: str
    share: float
    median_prompt_tokens: float
    prompt_sigma: float
    labels: tuple[str, ...]

    def prompt_tokens_at(self, share: float) -> float:
        """The length that this share of the prompts is shorter than, 0 < share < 1."""
        return self.median_prompt_tokens * math.exp(self.prompt_sigma * NormalDist().inv_cdf(share))

    def goes_by(self, label: str) -> bool:
        return label.strip().casefold() in (self.name, *self.labels)


@dataclass(frozen=True, slots=True)
class WorkloadPreset:
    """A named workload.

    output_tokens: generated tokens of every request.
    rate: requests per second of the paper's middle load on 16 decode workers.
    """

    name: str
    summary: str
    kinds: tuple[WorkloadKind, ...]
    output_tokens: int = 512
    rate: float = 60.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """The kind and the prompt length of one drawn request."""

    kind: WorkloadKind
    prompt_tokens: int


TASK = WorkloadPreset(
    "task",
    "questions from four fields: code, mathematics, medicine and law",
    (
        WorkloadKind("code", 0.25, 180, 0.55, ("coding", "programming", "python", "humaneval", "mbpp")),
        WorkloadKind("math", 0.25, 90, 0.45, ("mathematics", "maths", "gsm8k", "mgsm")),
        WorkloadKind("medical", 0.25, 330, 0.45, ("medicine", "professional_medicine", "pubmedqa", "medqa")),
        WorkloadKind("legal", 0.25, 280, 0.50, ("law", "professional_law", "legalbench")),
    ),
)
LANGUAGE = WorkloadPreset(
    "language",
    "conversations in seven languages, three quarters of them English or Chinese",
    (
        WorkloadKind("english", 0.55, 120, 1.10, ("en",)),
        WorkloadKind("chinese", 0.20, 100, 1.10, ("zh",)),
        WorkloadKind("russian", 0.09, 120, 1.10, ("ru",)),
        WorkloadKind("french", 0.05, 120, 1.10, ("fr",)),
        WorkloadKind("spanish", 0.05, 120, 1.10, ("es",)),
        WorkloadKind("german", 0.03, 120, 1.10, ("de", "deutsch")),
        WorkloadKind("japanese", 0.03, 120, 1.10, ("ja",)),
    ),
)
WORKLOADS: Mapping[str, WorkloadPreset] = {preset.name: preset for preset in (TASK, LANGUAGE)}


def find_workload(name: str) -> WorkloadPreset:
    """Return the preset with this name. Raises WorkloadError."""
    if name not in WORKLOADS:
        raise WorkloadError(f"there is no workload {name!r}; choose from {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def draw(preset: WorkloadPreset, count: int, *, seed: int) -> list[Drawn]:
    """Draw `count` requests: kinds by their shares, lengths log-normal and within MIN..MAX_PROMPT_TOKENS."""
    rng = np.random.default_rng([seed, 0])
    kinds = rng.choice(len(preset.kinds), count, p=[kind.share for kind in preset.kinds])
    z = rng.standard_normal(count)
    drawn = []
    for number, deviation in zip(kinds.tolist(), z.tolist(), strict=True):
        kind = preset.kinds[number]
        tokens = round(kind.median_prompt_tokens * math.exp(kind.prompt_sigma * deviation))
        drawn.append(Drawn(kind, min(max(tokens, MIN_PROMPT_TOKENS), MAX_PROMPT_TOKENS)))
    return drawn


def arrivals(rate_per_s: float, count: int, *, seed: int) -> NDArray[np.float64]:
    """Arrival times of a Poisson process in seconds, float64 [count]."""
    return np.cumsum(np.random.default_rng([seed, 1]).exponential(1 / rate_per_s, count))


def kinds_of(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Parse KIND=LABEL,LABEL arguments into kind -> labels. Raises WorkloadError."""
    found = {}
    for text in given:
        kind, equals, labels = text.partition("=")
        words = tuple(label.strip() for label in labels.split(",") if label.strip())
        if not equals or not words:
            raise WorkloadError(f"--kind {text}: expected KIND=LABEL,LABEL")
        found[kind.strip()] = words
    return found


def labels_of_kinds(
    preset: WorkloadPreset, labels: Sequence[str], given: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Map each kind to those of `labels` that belong to it: the ones `given` for it, otherwise the ones it is known by.

    Raises WorkloadError if a kind has no label, or if `given` has an unknown kind or label.
    """
    known = list(dict.fromkeys(labels))
    names = [kind.name for kind in preset.kinds]
    for kind_name, wanted in given.items():
        if kind_name not in names:
            raise WorkloadError(f"workload {preset.name} has no kind {kind_name!r}; its kinds are {', '.join(names)}")
        absent = [label for label in wanted if label not in known]
        if absent:
            raise WorkloadError(f"no request has the label {absent[0]!r}; the labels are {_shown(known)}")
    found = {
        kind.name: tuple(given[kind.name]) if kind.name in given else tuple(filter(kind.goes_by, known))
        for kind in preset.kinds
    }
    missing = [name for name, of_kind in found.items() if not of_kind]
    if missing:
        raise WorkloadError(
            f"workload {preset.name}: no request is of kind {missing[0]}; the labels are {_shown(known)}. Say which "
            f"labels belong to it with --kind {missing[0]}=LABEL,LABEL"
        )
    return found


def _shown(labels: Sequence[str]) -> str:
    return ", ".join(repr(label) for label in labels[:12]) + (", ..." if len(labels) > 12 else "")
