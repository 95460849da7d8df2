"""Makes the demo's prompts. Each is an opening of its kind and a few sentences of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from eldr.workloads.kinds import KINDS, Kind
from eldr.workloads.prompt import Prompt

MAX_PROMPT_BYTES = 400
# Every kind can give far more distinct prompts than this. Asking for more is a mistake.
MAX_PROMPTS_PER_KIND = 2000


def make_prompts(count: int, *, seed: int, exclude: frozenset[str] = frozenset()) -> list[Prompt]:
    """Make `count` different prompts, none of them in `exclude`, in random order.

    Each kind has the same share, as far as `count` allows. Raises ValueError if a kind would need more than
    MAX_PROMPTS_PER_KIND prompts.
    """
    if count > MAX_PROMPTS_PER_KIND * len(KINDS):
        raise ValueError(f"{count} demo prompts; there are at most {MAX_PROMPTS_PER_KIND} of each kind")
    rng = random.Random(seed)
    taken = set(exclude)
    prompts: list[Prompt] = []
    kinds = list(KINDS)
    while len(prompts) < count:
        kind = kinds[len(prompts) % len(kinds)]
        text = _compose(KINDS[kind], rng)
        if text not in taken:
            taken.add(text)
            prompts.append(Prompt(kind, text))
    rng.shuffle(prompts)
    return prompts


def mix_kinds(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Reorder prompts so that each kind's come at even distances, and otherwise in the order given.

    A worker's batch then depends less on which kinds happened to come together, and rounds differ less.
    """
    seen: Counter[str] = Counter()
    total = Counter(prompt.kind for prompt in prompts)
    places = []
    for number, prompt in enumerate(prompts):
        places.append(((seen[prompt.kind] + 0.5) / total[prompt.kind], number))
        seen[prompt.kind] += 1
    return [prompts[number] for _, number in sorted(places)]


def _compose(kind: Kind, rng: random.Random) -> str:
    text = rng.choice(kind.openings)
    for template in rng.sample(kind.sentences, rng.randint(2, 4)):
        longer = text + kind.sentence(template, rng)
        if len(longer.encode()) > MAX_PROMPT_BYTES:
            break
        text = longer
    return text
