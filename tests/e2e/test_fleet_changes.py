"""Real workers that join, drain and leave while requests run: outputs stay those of one plain worker."""

from __future__ import annotations

import itertools
import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from eldr.demo.ports import free_ports
from tests.e2e.real_fleet import MODEL, Fleet, StartRouter, call, client_of, metric

PROMPT = "The {n}th of all stories begins in a small house by the sea. "
PROMPTS = 24
KEY = "the-key-of-this-test"


def text_of(client: openai.OpenAI, n: int) -> str:
    ask: dict[str, Any] = {"model": MODEL, "prompt": PROMPT.format(n=n) * 2, "max_tokens": 24, "temperature": 0}
    if n % 2:
        return client.completions.create(**ask).choices[0].text
    return "".join(chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True) if chunk.choices)


class Admin:
    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, method: str, path: str, body: object = None) -> Any:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def until(self, url: str, state: str) -> None:
        deadline_s = time.monotonic() + 60
        while True:
            states = {worker["url"]: worker["state"] for worker in self("GET", "/admin/workers")["workers"]}
            if states.get(url, "gone") == state:
                return
            assert time.monotonic() < deadline_s, f"{url} is {states.get(url, 'gone')}, not {state}"
            time.sleep(0.05)


class Load:
    """Requests without a pause, each compared with what a plain worker said."""

    def __init__(self, url: str, expected: list[str], clients: int = 4) -> None:
        self._url, self._expected = url, expected
        self._stop = threading.Event()
        self.done = 0
        self.wrong: list[Any] = []
        self._numbers = itertools.count()
        self._pool = ThreadPoolExecutor(clients)
        self._running = [self._pool.submit(self._run) for _ in range(clients)]

    def _run(self) -> None:
        client = client_of(self._url)
        while not self._stop.is_set():
            n = next(self._numbers) % PROMPTS
            try:
                text = text_of(client, n)
            except Exception as error:
                text = repr(error)
            if text != self._expected[n]:
                self.wrong.append((n, text))
            self.done += 1

    def more(self, count: int) -> None:
        """Wait until so many more requests have ended."""
        target, deadline_s = self.done + count, time.monotonic() + 120
        while self.done < target:
            assert time.monotonic() < deadline_s, "the load stands still"
            time.sleep(0.02)

    def end(self) -> None:
        self._stop.set()
        for future in self._running:
            future.result(120)
        self._pool.shutdown()


@pytest.fixture(scope="module")
def expected(plain: openai.OpenAI) -> list[str]:
    return [text_of(plain, n) for n in range(PROMPTS)]


def test_workers_join_drain_and_leave_under_load(
    fleet: Fleet, start_router: StartRouter, expected: list[str], tmp_path: Path
) -> None:
    key = tmp_path / "admin.key"
    key.write_text(KEY)
    listen = f"127.0.0.1:{free_ports(1)[0]}"
    first, second = fleet.decode
    flags = ["--policy", "expected-union", "--admin-listen", listen, "--admin-key-file", str(key)]
    with start_router(*flags, decode=[first.url]) as router:
        admin = Admin(f"http://{listen}")
        load = Load(router.url, expected)
        try:
            load.more(8)
            before = metric(second.url, "vllm:request_success_total")
            admin("POST", "/admin/workers", {"url": second.url, "role": "decode"})
            admin.until(second.url, "up")
            load.more(16)
            assert metric(second.url, "vllm:request_success_total") > before, "the new worker got nothing"
            # Drained: it ends what it has, and everything goes to the other.
            admin("POST", "/admin/drain", {"url": first.url})
            admin.until(first.url, "gone")
            assert metric(first.url, "vllm:num_requests_running") == 0
            before = metric(first.url, "vllm:request_success_total")
            load.more(16)
            assert metric(first.url, "vllm:request_success_total") == before, "a drained worker got a request"
            admin("POST", "/admin/workers", {"url": first.url, "role": "decode"})
            admin.until(first.url, "up")
            load.more(16)
            # Taken out at once: what had begun to stream may break, nothing else.
            assert load.wrong == []
            admin("DELETE", "/admin/workers", {"url": second.url})
            admin.until(second.url, "gone")
            load.more(16)
        finally:
            load.end()
        broken = [text for _, text in load.wrong]
        assert len(broken) <= 4
        assert all("Error" in text for text in broken)
        assert metric(router.url, "eldr_inflight") == 0


def test_a_worker_that_is_there_or_is_not_does_not_disturb(
    fleet: Fleet, start_router: StartRouter, plain: openai.OpenAI, tmp_path: Path
) -> None:
    key = tmp_path / "admin.key"
    key.write_text(KEY)
    listen = f"127.0.0.1:{free_ports(1)[0]}"
    flags = ["--policy", "jsq", "--admin-listen", listen, "--admin-key-file", str(key)]
    with start_router(*flags) as router:
        admin = Admin(f"http://{listen}")
        with pytest.raises(urllib.error.HTTPError, match="409"):
            admin("POST", "/admin/workers", {"url": fleet.decode[0].url, "role": "decode"})
        absent = "http://127.0.0.1:9"
        admin("POST", "/admin/workers", {"url": absent, "role": "decode"})
        admin.until(absent, "down")
        assert text_of(client_of(router.url), 3) == text_of(plain, 3)
        assert call(f"http://{listen}", "/admin/workers")[0] == 401


def test_the_router_reads_what_real_workers_say_of_their_load(fleet: Fleet, start_router: StartRouter) -> None:
    with start_router("--policy", "jsq") as router:
        for worker in (fleet.prefill, *fleet.decode):
            assert metric(router.url, "eldr_worker_waiting", worker=worker.url) == 0
            assert 0 <= metric(router.url, "eldr_worker_kv_usage_ratio", worker=worker.url) <= 1
        said = call(router.url, "/metrics")[2].decode()
        assert said.count("eldr_worker_kv_usage_ratio{") == 3
