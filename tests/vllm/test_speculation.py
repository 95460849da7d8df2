"""Counts and active experts while drafters propose tokens that have MoE layers of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import vllm

from tests.vllm.engine import BLOCK_SIZE, RECORD, Answer, Engine, running
from tests.vllm.models import Model, Models

pytestmark = pytest.mark.skipif(
    vllm.__version__.startswith("0.30."), reason="vLLM 0.30 does not run drafters on the CPU"
)

DRAFT_TOKENS = 3
STEP_TOKENS = 96
ACTIVE = "vllm:eldr_active_experts"


@dataclass
class Case:
    model: Model
    engine: Engine
    drafter_reads_ahead: bool  # vLLM then does not use the last block of a prefix hit


def speculation(models: Models, name: str) -> tuple[Model, dict[str, Any]]:
    """The model of a case, and vLLM's speculative_config."""
    if name == "mtp":
        return models("moe-mtp"), {"method": "mtp", "num_speculative_tokens": DRAFT_TOKENS}
    # Another number of layers, of experts and of experts per token than the model's.
    drafter = str(models("moe-6x24-top3").path)
    return models("moe"), {"method": "draft_model", "model": drafter, "num_speculative_tokens": DRAFT_TOKENS}


def text(rng: np.random.Generator, tokens: int) -> list[int]:
    return [int(token) for token in rng.integers(0, 256, tokens)]


def test_active_experts_equal_brute_force(models: Models) -> None:
    """What a step activates are the experts of each request's last token and of its drafts, right or wrong."""
    model, config = speculation(models, "draft_model")
    drafter = models("moe-6x24-top3").reference
    rng = np.random.default_rng(4)
    answers: dict[str, Answer] = {}
    grown: list[dict[str, int]] = []
    # Long prompts arrive while others decode, so that steps hold both kinds of tokens.
    arrivals = {0: [(10, 20), (70, 12)], 4: [(250, 9)], 6: [(33, 15), (100, 1)]}
    # Asynchronous scheduling would compute one more step for each request, whose tokens nobody gets.
    with running(
        model.path, speculative_config=config, max_num_batched_tokens=64, max_num_seqs=8, async_scheduling=False
    ) as engine:
        prompts: dict[str, list[int]] = {}

        def arrive(step: int) -> None:
            for length, generated in arrivals.get(step, []):
                prompt = text(rng, length)
                prompts[engine.submit(prompt, RECORD, generated)] = prompt

        arrive(0)
        for step, tokens in enumerate(engine.steps(answers), start=1):
            grown.append(tokens)
            arrive(step)
        measured = engine.metric(ACTIVE)

    position = dict.fromkeys(prompts, 0)
    sizes: list[int] = []
    accepted = mixed = 0
    for tokens in grown:
        decoding = []
        for rid, count in tokens.items():
            if position[rid] > 0:
                context = prompts[rid] + answers[rid].tokens[: position[rid]]
                drafts = drafter.generate(context, DRAFT_TOKENS)
                decoding.append(model.reference.routing(context + drafts)[-1 - DRAFT_TOKENS :])
                accepted += count - 1
            position[rid] += count
        mixed += 0 < len(decoding) < len(tokens)
        if decoding:
            rows = np.concatenate(decoding)
            sizes += [len(np.unique(rows[:, layer])) for layer in range(model.reference.layers)]
    assert mixed > 1
    assert measured["count"] == len(sizes)
    assert measured["sum"] == sum(sizes)


@pytest.fixture(scope="module", params=["draft_model", "draft_model-synchronous", "mtp"])
def case(request: pytest.FixtureRequest, models: Models) -> Iterator[Case]:
    name, _, mode = request.param.partition("-")
    model, config = speculation(models, name)
    with running(
        model.path,
        speculative_config=config,
        num_gpu_blocks_override=256,
        max_model_len=512,
        max_num_batched_tokens=STEP_TOKENS,
        max_num_seqs=8,
        async_scheduling=not mode,
        extra_config={"kv_lease_duration": 1},
    ) as engine:
        yield Case(model, engine, name == "mtp")


def check(case: Case, prompt: list[int], answer: Answer) -> None:
    assert answer.unavailable is None
    np.testing.assert_array_equal(answer.counts, case.model.reference.counts(prompt))
    assert answer.tokens == case.model.reference.next_tokens([*prompt, *answer.tokens])[len(prompt) - 1 : -1]


def test_prompts_and_prefix_hits(case: Case) -> None:
    """A hit that leaves a single token makes vLLM fill up the step with placeholders of drafts."""
    rng = np.random.default_rng(1)
    before = case.engine.metric(ACTIVE)["count"]
    for length in (1, 31, 33, 64, 65, 2 * STEP_TOKENS + 33):
        prompt = text(rng, length)
        for again in range(2):
            [answer] = case.engine.prefill(prompt)
            check(case, prompt, answer)
            if again and not case.drafter_reads_ahead:
                assert answer.cached_tokens == (length - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert case.engine.metric(ACTIVE)["count"] == before, "a prefill worker generates nothing"


def test_concurrent_prompts(case: Case) -> None:
    rng = np.random.default_rng(2)
    stem = text(rng, BLOCK_SIZE)
    prompts = [stem + text(rng, int(tail)) for tail in rng.integers(1, 80, 5)]
    prompts += [prompts[0], [*stem, 1], text(rng, 50)]
    for _ in range(2):
        for prompt, answer in zip(prompts, case.engine.prefill(*prompts), strict=True):
            check(case, prompt, answer)


def test_generated_tokens(case: Case) -> None:
    """Their experts cannot be told. A second turn that finds blocks with some of them has no counts."""
    rng = np.random.default_rng(3)
    prompts = [text(rng, length) for length in (20, 40, 64)]
    for prompt, answer in zip(prompts, case.engine.record(*prompts, max_tokens=3 * BLOCK_SIZE), strict=True):
        check(case, prompt, answer)
        assert answer.params["eldr_decode_experts"]["unavailable"] == "speculative_decoding"
        [again] = case.engine.prefill([*prompt, *answer.tokens, 7, 8, 9])
        assert again.cached_tokens > len(prompt)
        assert again.unavailable == "incomplete"
