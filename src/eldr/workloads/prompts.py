"""Prompts of a workload, built in or read from the user's files."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from eldr.record import read_prompts
from eldr.workloads.presets import WorkloadError, WorkloadPreset, draw, labels_of_kinds
from eldr.workloads.prompt import Prompt
from eldr.workloads.texts import write_prompt


def built_in_prompts(preset: WorkloadPreset, count: int, *, seed: int) -> list[Prompt]:
    """Make `count` prompts with the workload's kinds and lengths from the built-in templates."""
    rng = random.Random(seed)
    return [
        Prompt(drawn.kind.name, write_prompt(drawn.kind.name, drawn.prompt_tokens, rng))
        for drawn in draw(preset, count, seed=seed)
    ]


def prompts_from(
    path: Path, preset: WorkloadPreset, count: int, *, seed: int, given: Mapping[str, Sequence[str]]
) -> list[Prompt]:
    """Read `count` prompts of the workload's kinds and shares from a prompt file or a folder of prompt files.

    Labels tell the kinds apart. In a folder, a prompt without a label is labelled with the name of its file. Prompts of
    a kind come in random order, and are reused only after all have been used. Raises WorkloadError or RecordError.
    """
    by_label = _read(path)
    found = labels_of_kinds(preset, list(by_label), given)
    rng = random.Random(seed)
    decks: dict[str, list[str]] = {kind: [] for kind in found}
    prompts = []
    for drawn in draw(preset, count, seed=seed):
        kind = drawn.kind.name
        if not decks[kind]:
            decks[kind] = [text for label in found[kind] for text in by_label[label]]
            rng.shuffle(decks[kind])
        prompts.append(Prompt(kind, decks[kind].pop()))
    return prompts


def _read(path: Path) -> dict[str, list[str]]:
    """Read the texts, grouped by label."""
    files = sorted(entry for entry in path.iterdir() if entry.suffix in (".jsonl", ".txt")) if path.is_dir() else [path]
    if not files:
        raise WorkloadError(f"{path}: no .jsonl or .txt file with prompts")
    by_label: dict[str, list[str]] = {}
    for file in files:
        for prompt in read_prompts(file):
            if "prompt" not in prompt.body:
                raise WorkloadError(f'{file}: the load client sends completions: use "prompt", not "messages"')
            by_label.setdefault(prompt.label or file.stem, []).append(prompt.body["prompt"])
    return by_label
