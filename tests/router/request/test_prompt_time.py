"""Deadlines of decode legs: who computes the prompt has the time for it, and nobody is blamed for a slow prompt."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.router.fake_worker import FakeWorker, Seen, reply
from tests.router.harness import ASK, CHAT, Scripted, on_uvloop, running

IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
IMAGE_CHAT = {**CHAT, "messages": [{"role": "user", "content": IMAGE}]}
LIMITS: dict[str, Any] = {"decode_first_byte_timeout_s": 0.3, "decode_answer_timeout_s": 0.3}
PROMPT_S = 1.0


async def slow_prompt(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    if "do_remote_prefill" not in (seen.body.get("kv_transfer_params") or {}) or worker.role == "prefill":
        await asyncio.sleep(PROMPT_S)
    await worker.answer(seen, writer)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", IMAGE_CHAT),
        ("/v1/completions", {**ASK, "echo": True}),
        ("/v1/completions", {**ASK, "n": 2}),
    ],
)
@on_uvloop
async def test_a_request_that_runs_whole_has_the_time_of_a_prefill(
    path: str, body: dict[str, Any], stream: bool
) -> None:
    async with running(decode=2, **LIMITS) as s:
        for worker in s.decode:
            worker.behaviour = slow_prompt
        assert (await s.post({**body, "stream": stream}, path)).status == 200
        assert sum(len(worker.generated) for worker in s.decode) == 1
        assert await s.metric("eldr_timeouts_total") == 0


@on_uvloop
async def test_so_has_a_request_whose_prefill_worker_hands_nothing_off() -> None:
    async with running(decode=2, **LIMITS) as s:
        s.prefill[0].role = "plain"
        for worker in s.decode:
            worker.behaviour = slow_prompt
        assert (await s.post({**ASK, "stream": True})).status == 200
        assert sum(len(worker.generated) for worker in s.decode) == 1


@pytest.mark.parametrize("stream", [False, True])
@on_uvloop
async def test_a_worker_that_refuses_the_pull_has_the_time_that_the_prefill_took(stream: bool) -> None:
    async def refused(
        worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await asyncio.sleep(PROMPT_S)
        await worker.answer(seen, writer)

    async with running(decode=2, **LIMITS) as s:
        s.prefill[0].behaviour = slow_prompt
        for worker in s.decode:
            worker.behaviour = refused
        assert (await s.post({**ASK, "stream": stream})).status == 200
        assert sum(len(worker.generated) for worker in s.decode) == 1


@on_uvloop
async def test_a_worker_that_is_late_with_a_whole_request_is_not_blamed() -> None:
    async with running(decode=2, prefill_timeout_s=0.1, eject_failures=1, retries=1, **LIMITS) as s:
        for worker in s.decode:
            worker.behaviour = slow_prompt
        assert (await s.post({**ASK, "echo": True, "stream": True})).status == 504
        assert sum(len(worker.generated) for worker in s.decode) == 2
        assert await s.metric("eldr_timeouts_total", leg="first_byte") == 2
        assert await s.metric("eldr_worker_failures_total") == 0
        assert await s.metric("eldr_ejections_total") == 0


async def busy(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    error = b'{"error":{"message":"full","type":"RateLimitError","param":null,"code":429}}'
    await reply(writer, 429, error, "content-type: application/json\r\nretry-after: 7\r\n")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("role", ["prefill", "decode"])
@on_uvloop
async def test_another_worker_may_have_room(role: str, stream: bool) -> None:
    async with running(prefill=2, decode=2, policy=Scripted(), eject_failures=1) as s:
        for worker in getattr(s, role):
            worker.behaviour = busy
        refused = await s.post({**ASK, "stream": stream})
        assert (refused.status, refused.headers["retry-after"]) == (429, "7")
        assert [len(worker.generated) for worker in getattr(s, role)] == [1, 1]
        getattr(s, role)[1].behaviour = None
        for _ in range(4):
            assert (await s.post({**ASK, "stream": stream})).status == 200
        assert await s.metric("eldr_retries_total", leg=role, reason="overloaded") >= 1
        assert await s.metric("eldr_worker_failures_total") == 0
        assert await s.metric("eldr_ejections_total") == 0


@on_uvloop
async def test_the_only_worker_is_not_asked_again_when_it_is_full() -> None:
    async with running() as s:
        s.decode[0].behaviour = busy
        assert (await s.post()).status == 429
        assert len(s.decode[0].generated) == len(s.prefill[0].generated) == 1
        assert await s.metric("eldr_retries_denied_total", leg="decode", reason="tries") == 1
