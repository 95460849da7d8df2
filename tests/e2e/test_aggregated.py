"""Two plain vLLM workers behind the router: no connector, no hand-off, and the answers of one of them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from eldr.demo.workers import WorkerProcess
from eldr.router.fleet.load_watch import parse_cache_tokens
from tests.e2e.real_fleet import MODEL, Fleet, Router, StartRouter, call, client_of, metric
from tests.e2e.test_equal_to_one_worker import (
    CHATS,
    COMPLETIONS,
    GREEDY,
    MESSAGES,
    TEXT,
    assert_same,
    collect,
    strip,
)


@pytest.fixture(scope="module")
def workers(fleet: Fleet) -> Iterator[list[WorkerProcess]]:
    another = fleet.worker("plain", 1)
    try:
        another.start()
        another.wait_ready(300)
        yield [fleet.plain, another]
    finally:
        another.stop()


def flags(workers: list[WorkerProcess], policy: str) -> list[str]:
    return ["--policy", policy, *(text for worker in workers for text in ("--worker", worker.url))]


@pytest.fixture(scope="module")
def aggregated(start_router: StartRouter, workers: list[WorkerProcess]) -> Iterator[Router]:
    with start_router(*flags(workers, "rr"), prefill=[], decode=[]) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_every_request_is_answered_as_by_a_worker(aggregated: Router, plain: openai.OpenAI, stream: bool) -> None:
    routed = client_of(aggregated.url)
    streamed = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    read: Callable[[Any], Any] = collect if stream else lambda answer: strip(answer.model_dump())
    for name, asked in COMPLETIONS.items():
        if not (stream and name == "prompt logprobs"):  # which vLLM refuses
            ask: dict[str, Any] = {"model": MODEL, "prompt": TEXT, **GREEDY, **asked, **streamed}
            answers = [read(client.completions.create(**ask)) for client in (routed, plain)]
            assert_same(answers[0], answers[1], name)
    for name, asked in CHATS.items():
        ask = {"model": MODEL, "messages": MESSAGES, **GREEDY, **asked, **streamed}
        answers = [read(client.chat.completions.create(**ask)) for client in (routed, plain)]
        assert_same(answers[0], answers[1], name)
    assert metric(aggregated.url, "eldr_handoffs_total") == 0
    assert metric(aggregated.url, "eldr_retries_total") == 0


@pytest.mark.parametrize(
    "change", [{"max_tokens": 0}, {"min_tokens": 99}, {"stream_options": {"include_usage": True}}, {"temperature": -1}]
)
def test_every_refusal_is_the_workers(aggregated: Router, fleet: Fleet, change: dict[str, Any]) -> None:
    ask = {"model": MODEL, "prompt": TEXT, "max_tokens": 4, **change}
    routed, plain = (call(url, "/v1/completions", ask) for url in (aggregated.url, fleet.plain.url))
    assert (routed[0], json.loads(routed[2])) == (plain[0], json.loads(plain[2]))
    assert plain[0] == 400


def test_the_router_knows_what_is_cached(
    start_router: StartRouter, workers: list[WorkerProcess], aggregated: Router
) -> None:
    """Against the tokens that the workers themselves find in their caches.

    Prompts are token ids, whose number the router knows. It is right to a block of the worker's, and to a chunk of its
    own, which is 512 bytes of them.
    """
    draw = random.Random(5)
    shared = [[draw.randrange(100, 200) for _ in range(600)] for _ in range(3)]
    sizes = re.search(r'[{,]block_size="([0-9]+)"', call(workers[0].url, "/metrics")[2].decode())
    assert sizes is not None
    block, chunk = int(sizes[1]), 512 // len("100,") + 1
    requests, first = 24, 6  # each worker computes each prompt once
    with start_router(*flags(workers, "rr"), prefill=[], decode=[]) as router:
        before = sum(metric(worker.url, "vllm:prefix_cache_hits_total") for worker in workers)
        for _ in range(requests):
            prompt = draw.choice(shared) + [draw.randrange(100, 200) for _ in range(draw.randrange(1, 300))]
            ask = {"model": MODEL, "prompt": prompt, "max_tokens": 1}
            assert call(router.url, "/v1/completions", ask)[0] == 200
        real = sum(metric(worker.url, "vllm:prefix_cache_hits_total") for worker in workers) - before
        believed = metric(router.url, "eldr_prompt_tokens_cached_total")
        assert real >= (requests - first) * (600 // block * block)
        assert real - requests * chunk <= believed <= real + requests * block
        assert metric(router.url, "eldr_prompt_tokens_total") > believed


def test_the_router_reads_the_size_of_a_workers_cache(fleet: Fleet) -> None:
    said = re.search(r"KV cache size: ([0-9,]+) tokens", fleet.plain.spec.log_path.read_text())
    assert said is not None
    assert parse_cache_tokens(call(fleet.plain.url, "/metrics")[2], 0) == int(said[1].replace(",", ""))


def test_a_worker_that_dies_is_replaced_by_the_other(
    fleet: Fleet, start_router: StartRouter, workers: list[WorkerProcess], plain: openai.OpenAI
) -> None:
    mortal = fleet.worker("plain", 2)
    mortal.start()
    try:
        mortal.wait_ready(300)
        with start_router(*flags([mortal, workers[1]], "rr"), prefill=[], decode=[]) as router:
            routed = client_of(router.url)
            ask: dict[str, Any] = {"model": MODEL, "prompt": TEXT, **GREEDY}
            expected = plain.completions.create(**ask).choices[0].text
            assert {routed.completions.create(**ask).choices[0].text for _ in range(4)} == {expected}
            mortal.stop()
            assert {routed.completions.create(**ask).choices[0].text for _ in range(4)} == {expected}
    finally:
        mortal.stop()
