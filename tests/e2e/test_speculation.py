"""A decode worker that speculates takes hand-offs from a prefill worker that does not."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from eldr.demo.workers import WorkerProcess
from tests.e2e.real_fleet import MODEL, Fleet, StartRouter, client_of, metric

# Drafts are copied from the prompt, so the drafter has no KV cache of its own.
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
TEXT = "def area(width, height):\n    return width * height\n\n" * 3
TOKENS = 48


@pytest.fixture(scope="module")
def speculating(fleet: Fleet) -> Iterator[WorkerProcess]:
    worker = fleet.worker("decode", 3, "--speculative-config", json.dumps(NGRAM))
    try:
        worker.start()
        worker.wait_ready(300)
        yield worker
    finally:
        worker.stop()


def test_the_answer_is_that_of_one_plain_worker(
    speculating: WorkerProcess, start_router: StartRouter, plain: openai.OpenAI
) -> None:
    with start_router("--policy", "expected-union", decode=[speculating.url]) as router:
        client = client_of(router.url)
        for number in range(3):
            prompt = f"{number}: {TEXT}"
            whole, expected = (
                of.completions.create(model=MODEL, prompt=prompt, max_tokens=TOKENS, temperature=0)
                for of in (client, plain)
            )
            assert whole.choices[0].text == expected.choices[0].text
            assert whole.usage == expected.usage
            chunks = list(
                client.completions.create(
                    model=MODEL,
                    prompt=prompt,
                    max_tokens=TOKENS,
                    temperature=0,
                    stream=True,
                    stream_options={"include_usage": True},
                )
            )
            assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected.choices[0].text
            assert chunks[-1].usage == expected.usage
        assert metric(router.url, "eldr_handoffs_total") == 6
        assert metric(router.url, "eldr_counts_errors_total") == 0
    assert metric(speculating.url, "vllm:spec_decode_num_accepted_tokens_total") > 0
    # It computed none of the three prompts itself.
    pulled = metric(speculating.url, "vllm:prompt_tokens_by_source_total", source="external_kv_transfer")
    assert pulled >= 3 * len(TEXT)
