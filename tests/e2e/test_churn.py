"""Workers killed, stopped and restarted under load, and hand-offs used late, never and under cache pressure.

Every text that a client got in full is compared with a plain worker's, which has neither router nor hand-offs.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from eldr.demo.workers import WorkerProcess
from tests.e2e.load import PROMPTS, TOKENS, Load, ask, until
from tests.e2e.real_fleet import LEASE_S, MODEL, Fleet, Router, StartRouter, call, client_of, metric

# Blocks of the victims' caches. The longest context takes 16, so that a few requests at once fill them.
FEW_BLOCKS = "40"


@pytest.fixture(scope="module")
def expected(plain: openai.OpenAI) -> dict[str, str]:
    return {prompt: ask(plain, prompt) for prompt in PROMPTS}


@pytest.fixture(scope="module")
def victims(fleet: Fleet) -> Iterator[list[WorkerProcess]]:
    """A prefill and a decode worker that may be killed; their caches are small."""
    workers = [fleet.worker(role, 9, "--num-gpu-blocks-override", FEW_BLOCKS) for role in ("prefill", "decode")]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.wait_ready()
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def test_hand_offs_that_outlive_their_lease_in_the_router(
    fleet: Fleet, victims: list[WorkerProcess], start_router: StartRouter, expected: dict[str, str]
) -> None:
    """The prefill worker's answers wait in the sockets of a stopped router while their blocks go to other prompts."""
    prefill, decode = victims
    flags = {"prefill": [prefill.url], "decode": [decode.url]}
    with start_router("--policy", "jsq", **flags) as router, ThreadPoolExecutor(16) as pool:
        client = client_of(router.url)
        ask(client, PROMPTS[0])
        prefill.pause()
        waiting = {prompt: pool.submit(ask, client, prompt) for prompt in PROMPTS[1:9]}
        until(lambda: metric(router.url, "eldr_inflight", worker=prefill.url) == 8, "they wait for their prefill")
        os.kill(router.process.pid, signal.SIGSTOP)
        try:
            prefill.resume()
            time.sleep(LEASE_S + 1)
            flood = client_of(prefill.url)
            list(pool.map(lambda n: ask(flood, f"{n} bottles of beer on the wall, " * 20, 1), range(60)))
        finally:
            os.kill(router.process.pid, signal.SIGCONT)
        for prompt, text in waiting.items():
            assert text.result(90) == expected[prompt]
        assert metric(router.url, "eldr_retries_total", leg="decode", reason="lease") == 8


def test_retries_after_aborts_and_refusals_under_cache_pressure(
    fleet: Fleet,
    victims: list[WorkerProcess],
    start_router: StartRouter,
    expected: dict[str, str],
    plain: openai.OpenAI,
) -> None:
    """Hand-offs that nobody uses, or that are refused, free their blocks at once; the next prompts get them."""
    prefill, decode = victims
    long = {f"{n}. {prompt}" * 6: "" for n, prompt in enumerate(PROMPTS * 3)}
    with ThreadPoolExecutor(4) as pool:
        long = dict(zip(long, pool.map(lambda prompt: ask(plain, prompt), long), strict=True))
    outcomes: Counter[str] = Counter()

    def once(number: int, prompt: str) -> None:
        kind = ("abort at once", "abort the stream", "refused", "served")[number % 4]
        body: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        if kind == "abort at once":
            try:
                call(router.url, "/v1/completions", body, timeout_s=0.05)
            except OSError:
                outcomes[kind] += 1
        elif kind == "abort the stream":
            stream = client.completions.create(**{**body, "stream": True})
            next(iter(stream))
            stream.close()
            outcomes[kind] += 1
        elif kind == "refused":  # by the decode worker, after the prefill
            assert call(router.url, "/v1/completions", {**body, "temperature": -1})[0] == 400
            outcomes[kind] += 1
        assert ask(client, prompt) == long[prompt]
        outcomes["equal"] += 1

    with (
        start_router("--policy", "jsq", prefill=[prefill.url], decode=[decode.url]) as router,
        ThreadPoolExecutor(8) as pool,
    ):
        client = client_of(router.url)
        list(pool.map(once, range(len(long)), long))
        assert outcomes["equal"] == len(long)
        assert min(outcomes[kind] for kind in ("abort at once", "abort the stream", "refused")) > 0
        assert metric(router.url, "eldr_inflight") == 0


def up(router: Router, worker: WorkerProcess) -> bool:
    return metric(router.url, "eldr_worker_up", worker=worker.url) == 1


def test_workers_killed_stopped_and_restarted_under_load(
    fleet: Fleet, victims: list[WorkerProcess], start_router: StartRouter, expected: dict[str, str], tmp_path: Path
) -> None:
    """The last test of this file: the prefill victim is not started again."""
    prefill, decode = victims
    config = tmp_path / "eldr.toml"
    config.write_text("health_timeout_s = 2\nhealth_interval_s = 0.5\neject_base_s = 1\n")
    with start_router(
        "--policy", "rr", "--config", str(config),
        prefill=[fleet.prefill.url, prefill.url],
        decode=[*(worker.url for worker in fleet.decode), decode.url],
    ) as router:  # fmt: skip
        load = Load(router.url, 4)
        try:
            load.more(8)
            decode.pause()
            try:
                until(lambda: not up(router, decode), "the router finds out that it is stopped")
                load.more(8)
            finally:
                decode.resume()
            until(lambda: up(router, decode), "the router finds out that it runs again")
            load.more(8)
            assert not load.errors, "a worker that was only stopped costs nobody an answer"

            assert prefill.pid is not None
            os.killpg(prefill.pid, signal.SIGKILL)
            load.more(8)
            assert not load.errors, "what a prefill worker did not do another one does"

            until(lambda: metric(router.url, "eldr_inflight", worker=decode.url) > 0, "it runs something")
            assert decode.pid is not None
            os.killpg(decode.pid, signal.SIGKILL)
            load.more(8)
            decode.stop()
            decode.start()
            decode.wait_ready()
            until(lambda: up(router, decode), "the router finds the new process")
            until(lambda: metric(decode.url, "vllm:generation_tokens_total") > TOKENS, "it serves again")
        finally:
            load.stop()
        for prompt, text in load.ended:
            assert isinstance(text, Exception) or text == expected[prompt]
        # What broke had begun on the killed worker; its client was told so, and it is counted.
        assert {type(error) for error in load.errors} <= {openai.APIError}
        broken = metric(router.url, "eldr_worker_failures_total", reason="broken_stream", worker=decode.url)
        assert len(load.errors) == broken == metric(router.url, "eldr_broken_streams_total")
        assert len(load.errors) <= 4
        assert metric(router.url, "eldr_request_total") == len(load.ended)
        assert metric(router.url, "eldr_request_total", status="200") == len(load.ended)
        assert metric(router.url, "eldr_inflight") == metric(router.url, "eldr_admitted") == 0
