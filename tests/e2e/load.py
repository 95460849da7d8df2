"""Clients that keep routers under load, and what they ask for."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

import openai

from tests.e2e.real_fleet import MODEL, client_of

PROMPTS = [f"fn item_{n}(a: u{n}, b: u{n}) -> u{n} {{ let sum = a + {n} * b; return " for n in range(12)]
TOKENS = 40


def until(condition: Callable[[], object], what: str, timeout_s: float = 90.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"never happened: {what}"
        time.sleep(0.05)


def ask(client: openai.OpenAI, prompt: str, max_tokens: int = TOKENS) -> str:
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0)
    return str(answer.choices[0].text)


class Load:
    """Clients that stream one prompt after the other until `stop`. ended: (prompt, text or the error) of each."""

    def __init__(self, url: str, clients: int) -> None:
        self._client = client_of(url)
        self._prompts = itertools.cycle(PROMPTS)
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]
        self.ended: list[tuple[str, str | Exception]] = []
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            prompt = next(self._prompts)
            try:
                self.ended.append((prompt, self._stream(prompt)))
            except Exception as error:
                self.ended.append((prompt, error))

    def _stream(self, prompt: str) -> str:
        text, finish = "", None
        for event in self._client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True
        ):
            text += event.choices[0].text
            finish = event.choices[0].finish_reason or finish
        assert finish is not None, "a truncated answer passed for a whole one"
        return text

    def more(self, count: int) -> None:
        """Wait until `count` more requests have succeeded."""
        target = self.succeeded + count
        until(lambda: self.succeeded >= target, f"{count} more requests served")

    @property
    def succeeded(self) -> int:
        return sum(isinstance(result, str) for _, result in list(self.ended))

    @property
    def errors(self) -> list[Exception]:
        return [result for _, result in self.ended if isinstance(result, Exception)]

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(90)
            assert not thread.is_alive(), "a request never ended"
