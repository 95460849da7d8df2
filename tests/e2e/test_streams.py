"""What streams carry besides text: the tokens of a long prompt, and comments while their prefill takes long."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from eldr.demo.workers import WorkerProcess
from tests.e2e.real_fleet import MODEL, Fleet, Router, StartRouter, call, client_of
from tests.e2e.test_other_apis import anthropic_of

TEXT = "def area(width, height):\n    return width * height\n\n"
LONG = (TEXT * 40)[:1900]
SAID: list[Any] = [{"role": "user", "content": TEXT}]
STOPPED_S = 1.5


def chunks_of(url: str, path: str, question: dict[str, Any]) -> list[dict[str, Any]]:
    ask = {"model": MODEL, "max_tokens": 12, "temperature": 0, "stream": True, **question}
    status, _, raw = call(url, path, ask)
    events = [line.removeprefix("data: ") for line in raw.decode().splitlines() if line]
    assert (status, events.pop()) == (200, "[DONE]")
    return [json.loads(event) for event in events]


@pytest.mark.parametrize(
    ("path", "question"),
    [
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/completions", {"prompt": [60 + n % 40 for n in range(1900)]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
    ],
    ids=["text", "tokens", "chat"],
)
def test_tokens_of_a_long_prompt(router: Router, fleet: Fleet, path: str, question: dict[str, Any]) -> None:
    """The first event holds all of the prompt."""
    seen = []
    for url in (router.url, fleet.plain.url):
        chunks = chunks_of(url, path, {**question, "return_token_ids": True})
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        prompts = [part["prompt_token_ids"] for part in (*chunks, *choices) if part.get("prompt_token_ids")]
        seen.append((prompts, [token for choice in choices for token in choice.get("token_ids") or ()]))
    assert seen[0] == seen[1]
    [prompt], generated = seen[0]
    assert (len(prompt) >= len(LONG), len(generated)) == (True, 12)


@pytest.fixture(scope="module")
def commenting(start_router: StartRouter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    config: Path = tmp_path_factory.mktemp("commenting") / "eldr.toml"
    config.write_text("stream_keepalive_s = 0.5\n")
    with start_router("--policy", "jsq", "--config", str(config)) as running:
        yield running


@contextmanager
def stopped(worker: WorkerProcess) -> Iterator[None]:
    """The worker stands still for STOPPED_S."""
    worker.pause()
    timer = threading.Timer(STOPPED_S, worker.resume)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        worker.resume()


def test_clients_read_over_comments(commenting: Router, fleet: Fleet, plain: openai.OpenAI) -> None:
    client = client_of(commenting.url)

    def completion(of: openai.OpenAI) -> str:
        chunks = of.completions.create(model=MODEL, prompt=TEXT, max_tokens=8, temperature=0, stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks)

    def response(of: openai.OpenAI) -> str:
        with of.responses.stream(model=MODEL, input=TEXT, max_output_tokens=8, temperature=0) as stream:
            return stream.until_done().get_final_response().output_text

    def message(url: str) -> str:
        greedy = {"temperature": 0}
        with anthropic_of(url).messages.stream(model=MODEL, messages=SAID, max_tokens=8, extra_body=greedy) as stream:
            return "".join(stream.text_stream)

    waiting: list[tuple[Callable[[], str], str]] = [
        (lambda: completion(client), completion(plain)),
        (lambda: response(client), response(plain)),
        (lambda: message(commenting.url), message(fleet.plain.url)),
    ]
    for ours, theirs in waiting:
        with stopped(fleet.prefill):
            assert ours() == theirs

    with stopped(fleet.prefill):
        ask = {"model": MODEL, "prompt": TEXT, "max_tokens": 8, "temperature": 0, "stream": True}
        raw = call(commenting.url, "/v1/completions", ask)[2]
    assert raw.startswith(b": keep-alive\n\n"), "no request waited long enough"


def test_a_refusal_behind_comments_is_the_worker_s(commenting: Router, fleet: Fleet, plain: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "prompt": "x" * 5000, "max_tokens": 8, "stream": True}
    with pytest.raises(openai.BadRequestError) as expected:
        plain.completions.create(**ask)
    with stopped(fleet.prefill), pytest.raises(openai.APIError) as refused:
        list(client_of(commenting.url).completions.create(**ask))
    assert type(refused.value) is openai.APIError, "the status went out before the comment"
    assert isinstance(expected.value.body, dict)
    assert refused.value.message == expected.value.body["message"]
