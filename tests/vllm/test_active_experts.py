"""vllm:eldr_active_experts against the unions of what each generated token of a step chose."""

from __future__ import annotations

import numpy as np

from tests.vllm.engine import RECORD, Answer, running
from tests.vllm.models import Models

NAME = "vllm:eldr_active_experts"


def test_metric_equals_brute_force(models: Models) -> None:
    rng = np.random.default_rng(0)
    model = models("moe")
    answers: dict[str, Answer] = {}
    grown: list[dict[str, int]] = []
    # Long prompts arrive while others decode, so that steps hold both kinds of tokens.
    arrivals = {0: [(10, 30), (70, 12)], 5: [(250, 9)], 7: [(33, 20), (100, 1)], 20: [(300, 6)]}
    with running(model.path, max_num_batched_tokens=64, max_num_seqs=8) as engine:
        prompts: dict[str, list[int]] = {}

        def arrive(step: int) -> None:
            for length, generated in arrivals.get(step, []):
                prompt = [int(token) for token in rng.integers(0, 256, length)]
                prompts[engine.submit(prompt, RECORD, generated)] = prompt

        arrive(0)
        for step, tokens in enumerate(engine.steps(answers), start=1):
            grown.append(tokens)
            arrive(step)
        measured = engine.metric(NAME)

    sets = {rid: model.reference.decode_sets(prompt, answers[rid].tokens) for rid, prompt in prompts.items()}
    position = dict.fromkeys(prompts, 0)
    sizes: list[int] = []
    mixed = 0
    for tokens in grown:
        # A request's first token comes from its prompt; the others are one decode forward pass each.
        decoding = [sets[rid][position[rid] - 1] for rid in tokens if position[rid] > 0]
        mixed += len(decoding) < len(tokens)
        for rid, count in tokens.items():
            assert count == 1
            position[rid] += 1
        if decoding:
            sizes += [len(set().union(*(row[layer] for row in decoding))) for layer in range(model.reference.layers)]
    assert mixed > 2
    assert measured["count"] == len(sizes)
    assert measured["sum"] == sum(sizes)


def test_prefill_worker_reports_none(models: Models) -> None:
    with running(models("moe").path) as engine:
        engine.prefill(list(range(100)), list(range(50)))
        assert engine.metric(NAME)["count"] == 0
