"""Workers that are killed or stopped while real requests are under way."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import openai
import pytest

from tests.e2e.real_fleet import LEASE_S, MODEL, Fleet, StartRouter, client_of, metric

PROMPT = "let x{n} = {n}; let y{n} = x{n} + 1; print(y{n}); // number {n} "


def ask(client: openai.OpenAI, n: int, max_tokens: int = 16) -> str:
    return (
        client.completions.create(model=MODEL, prompt=PROMPT.format(n=n) * 3, max_tokens=max_tokens, temperature=0)
        .choices[0]
        .text
    )


def test_a_decode_worker_stopped_past_the_lease_never_answers_with_foreign_blocks(
    fleet: Fleet, start_router: StartRouter, plain: openai.OpenAI
) -> None:
    """The request waits in the stopped worker while the prefill worker frees its blocks and fills them anew."""
    stopped = fleet.decode[1]
    with start_router("--policy", "jsq", decode=[stopped.url]) as router, ThreadPoolExecutor(8) as pool:
        client = client_of(router.url)
        ask(client, 999)  # the workers know each other
        before = metric(stopped.url, "vllm:eldr_refused_pulls_total")
        stopped.pause()
        try:
            waiting = [pool.submit(ask, client, n) for n in range(4)]
            time.sleep(LEASE_S + 4)
            # Overwrite the whole cache of the prefill worker.
            flood = client_of(fleet.prefill.url)
            list(pool.map(lambda n: ask(flood, n, 1), range(10_000, 10_400)))
        finally:
            stopped.resume()
        for n, future in enumerate(waiting):
            expected = ask(plain, n)
            with suppress(openai.InternalServerError):  # an honest error is allowed, a wrong text is not
                assert future.result(90) == expected
        assert metric(stopped.url, "vllm:eldr_refused_pulls_total") > before, "no pull was late: nothing was tested"
        router.wait_ready()  # a probe finds out that the worker is back
        assert ask(client, 77) == ask(plain, 77)


def test_a_client_that_goes_away_frees_its_workers(fleet: Fleet, start_router: StartRouter) -> None:
    with start_router("--policy", "jsq") as router:
        client = client_of(router.url)
        stream = client.completions.create(
            model=MODEL,
            prompt="on and on",
            max_tokens=1500,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        assert sum(metric(worker.url, "vllm:num_requests_running") for worker in fleet.decode) == 1
        stream.close()
        deadline = time.monotonic() + 10
        while sum(metric(worker.url, "vllm:num_requests_running") for worker in fleet.decode) > 0:
            assert time.monotonic() < deadline, "the decode worker still runs a request nobody waits for"
            time.sleep(0.1)


def test_no_worker_is_503_with_retry_after(fleet: Fleet, start_router: StartRouter) -> None:
    absent = "http://127.0.0.1:9"
    with pytest.raises(AssertionError, match="not ready"), start_router("--policy", "jsq", decode=[absent]):
        pass
