"""What a policy hears of the workers' prefix caches, and when that is forgotten."""

from __future__ import annotations

from typing import Any

import pytest

from tests.router.harness import ASK, CHAT, Scripted, Setup, aggregated, on_uvloop, preferring, running, until

LONG = "The quick brown fox jumps over the lazy dog. " * 100  # 4,500 bytes
TOKENS = 4500 // 512 * 128


def heard(policy: Scripted) -> tuple[Any, Any, bool]:
    """Of the last request: who has a part of it, its length, and whether the worker computes it."""
    request = policy.asked[-1][0]
    return dict(request.cached_tokens or {}), request.prompt_tokens, request.computes_prompt


@on_uvloop
async def test_a_policy_hears_who_has_seen_the_start_of_a_prompt() -> None:
    policy = Scripted()
    async with aggregated(3, policy=policy) as s:
        policy.rule = preferring(s.aggregated[1])
        url = s.aggregated[1].url
        assert (await s.post({**ASK, "prompt": LONG})).status == 200
        assert heard(policy) == ({}, pytest.approx(1125, abs=2), True)
        assert (await s.post({**ASK, "prompt": LONG + "And then?" * 300})).status == 200
        assert heard(policy) == ({url: TOKENS}, pytest.approx(1800, abs=2), True)
        assert (await s.post({**ASK, "prompt": "Not " + LONG})).status == 200
        assert heard(policy)[0] == {}
        policy.rule = preferring(s.aggregated[2])
        for _ in range(2):
            await s.post({**ASK, "prompt": LONG})
        assert heard(policy)[0] == {url: TOKENS, s.aggregated[2].url: TOKENS}
        assert await s.metric("eldr_prompt_tokens_cached_total") == 2 * TOKENS
        assert await s.metric("eldr_prompt_tokens_total") == pytest.approx(1125 * 4 + 1800, abs=10)


@on_uvloop
async def test_the_next_turn_of_a_conversation_knows_the_one_before() -> None:
    policy = Scripted()
    async with aggregated(2, policy=policy) as s:
        policy.rule = preferring(s.aggregated[0])
        talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": LONG}]
        await s.chat({**CHAT, "messages": talk})
        talk += [{"role": "assistant", "content": "abcd"}, {"role": "user", "content": "go on"}]
        await s.chat({**CHAT, "messages": talk})
        assert heard(policy)[0] == {s.aggregated[0].url: TOKENS}


@on_uvloop
async def test_a_worker_that_was_away_has_nothing_cached() -> None:
    policy = Scripted()
    async with aggregated(2, policy=policy) as s:
        policy.rule = preferring(s.aggregated[0])
        await s.post({**ASK, "prompt": LONG})
        worker = s.router.services.fleet.workers("decode")[s.aggregated[0].url]
        await s.aggregated[0].stop()
        await until(lambda: not worker.healthy, "it is down")
        await s.aggregated[0].start()
        await until(lambda: worker.healthy, "it is back")
        await s.post({**ASK, "prompt": LONG})
        assert heard(policy)[0] == {}
        await s.post({**ASK, "prompt": LONG})
        assert heard(policy)[0] == {s.aggregated[0].url: TOKENS}


@on_uvloop
async def test_an_adapter_shares_no_cache_with_its_base() -> None:
    def prepare(s: Setup) -> None:
        for worker in s.aggregated:
            worker.adapters = ["sql"]

    policy = Scripted()
    async with aggregated(2, policy=policy, prepare=prepare) as s:
        policy.rule = preferring(s.aggregated[0])
        await s.post({**ASK, "prompt": LONG, "model": "sql"})
        await s.post({**ASK, "prompt": LONG})
        assert heard(policy)[0] == {}
        await s.post({**ASK, "prompt": LONG, "model": "sql"})
        assert heard(policy)[0] == {s.aggregated[0].url: TOKENS}


@on_uvloop
async def test_the_size_of_a_workers_cache_bounds_what_it_is_believed_to_have() -> None:
    def prepare(s: Setup) -> None:
        s.aggregated[
            0
        ].metrics = (
            'vllm:cache_config_info{block_size="16",enable_prefix_caching="True",engine="0",num_gpu_blocks="24"} 1.0\n'
        )
        s.aggregated[
            1
        ].metrics = (
            'vllm:cache_config_info{block_size="16",enable_prefix_caching="False",engine="0",num_gpu_blocks="99"} 1.0\n'
        )

    policy = Scripted()
    async with aggregated(2, policy=policy, prepare=prepare) as s:
        for worker, tokens in zip(s.aggregated, (24 * 16, 0), strict=True):
            policy.rule = preferring(worker)
            for _ in range(2):
                await s.post({**ASK, "prompt": LONG})
            assert heard(policy)[0].get(worker.url, 0) == tokens


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 4000}}


@pytest.mark.parametrize(
    "body", [{**CHAT, "messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": LONG}]}]}]
)
@on_uvloop
async def test_the_tokens_of_an_image_are_not_guessed(body: dict[str, Any]) -> None:
    policy = Scripted()
    async with aggregated(1, policy=policy) as s:
        for _ in range(2):
            assert (await s.chat(body)).status == 200
        assert heard(policy) == ({}, 0, True)


@on_uvloop
async def test_a_prompt_is_no_longer_than_the_model_allows() -> None:
    policy = Scripted()
    async with aggregated(1, policy=policy, prepare=lambda s: setattr(s.aggregated[0], "max_model_len", 700)) as s:
        for _ in range(2):
            await s.post({**ASK, "prompt": LONG})
        assert heard(policy) == ({s.aggregated[0].url: 700}, 700, True)


@on_uvloop
async def test_a_decode_worker_is_asked_for_no_prompt() -> None:
    policy = Scripted()
    async with running(policy=policy) as s:
        for _ in range(2):
            await s.post({**ASK, "prompt": LONG})
        request = policy.asked[-1][0]
        assert (request.cached_tokens, request.computes_prompt, request.prompt_tokens) == (None, False, 4)
        assert await s.metric("eldr_prompt_tokens_total") == 0
