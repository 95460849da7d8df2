"""Quotas: token buckets against a model that counts every millisecond, and what clients and operators see of them."""

from __future__ import annotations

import asyncio
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eldr.router.api.keys import ApiKeys
from eldr.router.config.settings import ConfigError
from eldr.router.request.quotas import Bucket, duration
from tests.router.fake_worker import FakeWorker, Seen, reply
from tests.router.harness import ASK, CHAT, Reply, bearer, on_uvloop, running, until

ADMIN = "the-admin-key"
ALICE = bearer("secret-of-alice")
# What the fake worker says of every prompt and of every whole answer.
PROMPT_TOKENS = GENERATED_TOKENS = 4


class Model:
    """A bucket that is refilled in every millisecond, in exact numbers."""

    def __init__(self, limit: int, period_ms: int) -> None:
        self.limit, self.each_ms = limit, Fraction(limit, period_ms)
        self.balance = Fraction(limit)

    def pass_ms(self, count: int) -> None:
        for _ in range(count):
            self.balance = min(Fraction(self.limit), self.balance + self.each_ms)

    def take(self, units: int) -> None:
        self.balance = min(Fraction(self.limit), self.balance - units)


@given(
    st.integers(1, 1000),
    st.sampled_from([50, 1000]),
    st.lists(st.tuples(st.integers(0, 300), st.integers(-500, 2000)), max_size=12),
)
def test_a_bucket_is_like_its_model(limit: int, period_ms: int, events: list[tuple[int, int]]) -> None:
    now_ms = 7_000
    bucket, model = Bucket(limit, period_ms / 1000, now_ms / 1000), Model(limit, period_ms)
    for waited_ms, units in events:
        now_ms += waited_ms
        model.pass_ms(waited_ms)
        assert bucket.balance(now_ms / 1000) == pytest.approx(float(model.balance), abs=1e-6)
        needed = min(limit, 1)
        wait_ms = 0
        while model.balance < needed and wait_ms < 500:
            model.pass_ms(1)
            wait_ms += 1
        if wait_ms < 500:
            assert bucket.wait_s(needed, now_ms / 1000) * 1000 == pytest.approx(wait_ms, abs=1.01)
        now_ms += wait_ms
        model.take(units)
        bucket.take(units, now_ms / 1000)


def test_a_bucket_does_not_mind_a_clock_that_stands_still_or_goes_back() -> None:
    bucket = Bucket(10, 60.0, 100.0)
    bucket.take(10, 100.0)
    assert bucket.balance(99.0) == 0.0
    assert bucket.balance(106.0) == 1.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0201, "21ms"), (1, "1s"), (7.66, "7.66s"), (59.9996, "60s"), (60, "1m0s"), (360, "6m0s"),
     (3599.5, "1h0m0s"), (86399, "23h59m59s")],
)  # fmt: skip
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def limited(tmp_path: Path, limits: str) -> dict[str, Any]:
    (tmp_path / "keys").write_text(f"secret-of-alice alice {limits}\nsecret-of-bob bob\n")
    (tmp_path / "admin").write_text("the-admin-key\n")
    return {"api_key_file": tmp_path / "keys", "admin_key_file": tmp_path / "admin"}


def left(answer: Reply, kind: str) -> int:
    return int(answer.headers[f"x-ratelimit-remaining-{kind}"])


@on_uvloop
async def test_requests_beyond_the_quota_are_refused_as_openai_does(tmp_path: Path) -> None:
    async with running(**limited(tmp_path, "requests_per_day=2 tokens_per_day=1000")) as s:
        for remaining in (1, 0):
            answer = await s.post(headers=ALICE)
            assert (answer.status, left(answer, "requests")) == (200, remaining)
            assert answer.headers["x-ratelimit-limit-requests"] == "2"
            assert re.fullmatch("[0-9]+h[0-9]+m[0-9]+s", answer.headers["x-ratelimit-reset-requests"])
        prefills = len(s.prefill[0].generated)
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/embeddings"):
            answer = await s.post(CHAT, path, ALICE)
            assert (answer.status, left(answer, "requests")) == (429, 0)
            assert (answer.error["type"], answer.error["code"]) == ("requests", "rate_limit_exceeded")
            assert 43_100 <= int(answer.headers["retry-after"]) <= 43_200
            assert "x-request-id" in answer.headers
        assert len(s.prefill[0].generated) == prefills
        other = await s.post(headers=bearer("secret-of-bob"))
        assert (other.status, [name for name in other.headers if "ratelimit" in name.lower()]) == (200, [])
        assert (await s.post(headers=bearer(ADMIN))).status == 200
        for path in ("/v1/models", "/metrics"):
            assert (await s.get(path, headers=ALICE)).status == 200
        assert await s.metric("eldr_request_total", ADMIN, endpoint="/v1/completions", status="429") == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("usage", [False, True])
@on_uvloop
async def test_tokens_are_those_of_prompt_and_answer(tmp_path: Path, stream: bool, usage: bool) -> None:
    async with running(**limited(tmp_path, "tokens_per_day=1000")) as s:
        body = {**ASK, "prompt": "x" * 2000, "stream": stream}
        if usage and stream:
            body["stream_options"] = {"include_usage": True}
        for path in ("/v1/completions", "/v1/chat/completions"):
            before = left(await s.post({"prompt": ""}, headers=ALICE), "tokens")
            asked = body if path == "/v1/completions" else {**body, "messages": CHAT["messages"]}
            answer = await s.post(asked, path, ALICE)
            assert answer.status == 200
            assert before - left(answer, "tokens") >= 500  # the estimate
            after = left(await s.post({"prompt": ""}, headers=ALICE), "tokens")
            assert before - after == PROMPT_TOKENS + GENERATED_TOKENS
        assert await s.metric("eldr_client_tokens_total", ADMIN, client="alice") == 16


@on_uvloop
async def test_the_debt_of_a_request_delays_the_next(tmp_path: Path) -> None:
    async with running(**limited(tmp_path, "tokens_per_day=7")) as s:
        assert (await s.post(headers=ALICE)).status == 200  # of 8 tokens
        refused = await s.post(headers=ALICE)
        assert (refused.status, refused.error["type"], left(refused, "tokens")) == (429, "tokens", 0)
        assert 86_400 / 7 - 60 < int(refused.headers["retry-after"]) <= 86_400 / 7 + 1


@on_uvloop
async def test_what_runs_is_taken_into_account_by_the_length_of_its_prompt(tmp_path: Path) -> None:
    async with running(**limited(tmp_path, "tokens_per_day=1000")) as s:
        s.decode[0].token_gap_s = 30.0
        asked = asyncio.create_task(s.post({**ASK, "prompt": "x" * 4100, "n": 2}, headers=ALICE))
        await until(lambda: s.decode[0].running, "it runs whole")
        refused = await s.post(headers=ALICE)
        assert (refused.status, refused.error["type"]) == (429, "tokens")
        asked.cancel()


@on_uvloop
async def test_errors_cost_no_tokens(tmp_path: Path) -> None:
    async with running(retries=0, eject_share=0, **limited(tmp_path, "tokens_per_day=1000")) as s:

        async def failing(
            worker: FakeWorker, seen: Seen, _: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            writer.transport.abort()

        s.decode[0].behaviour = failing
        for body, status in ((b"{" + b" " * 2000, 400), ({**ASK, "prompt": "x" * 2000}, 502)):
            assert (await s.post(body, headers=ALICE)).status == status
        assert left(await s.post({"prompt": ""}, headers=ALICE), "tokens") == 997  # but for its own estimate
        assert await s.metric("eldr_client_tokens_total", ADMIN, client="alice") == 0
        assert await s.metric("eldr_client_requests_total", ADMIN, client="alice") == 3


@on_uvloop
async def test_a_client_that_leaves_pays_for_what_it_got(tmp_path: Path) -> None:
    async with running(**limited(tmp_path, "tokens_per_day=1000")) as s:
        s.decode[0].tokens = ["x"] * 50
        s.decode[0].token_gap_s = 0.01
        request = {**ASK, "stream": True, "max_tokens": 50}
        async with s.session.post(s.url + "/v1/completions", json=request, headers=ALICE) as answer:
            for _ in range(10):
                await answer.content.readuntil(b"\n\n")
        await until(lambda: s.router.running == 0, "it has left")
        used = await s.metric("eldr_client_tokens_total", ADMIN, client="alice")
        assert PROMPT_TOKENS + 10 <= used < PROMPT_TOKENS + 50


@on_uvloop
async def test_tokens_of_a_prompt_in_the_cache_cost_as_much(tmp_path: Path) -> None:
    """Anthropic's input_tokens are those that were not read from the cache. A decode worker has pulled all others."""

    async def pulled(worker: FakeWorker, seen: Seen, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        usage = {"input_tokens": 1, "cache_read_input_tokens": 99, "output_tokens": 7}
        answer = {"id": f"chatcmpl-{seen.headers['x-request-id']}", "content": [], "usage": usage}
        await reply(writer, 200, json.dumps(answer).encode())

    async with running(**limited(tmp_path, "tokens_per_day=1000")) as s:
        s.decode[0].behaviour = pulled
        answer = await s.post({**CHAT, "max_tokens": 9}, "/v1/messages", ALICE)
        assert answer.status == 200, answer.body
        assert await s.metric("eldr_client_tokens_total", ADMIN, client="alice") == 107


@on_uvloop
async def test_embeddings_cost_the_tokens_of_their_usage(tmp_path: Path) -> None:
    async with running(**limited(tmp_path, "tokens_per_day=1000")) as s:
        answer = b'{"data": [], "usage": {"prompt_tokens": 77, "total_tokens": 77}}'
        s.decode[0].others = dict.fromkeys(("/v1/embeddings", "/tokenize"), (200, answer, "application/json"))
        for path in ("/v1/embeddings", "/tokenize"):
            assert (await s.post(headers=ALICE, path=path)).status == 200
        assert await s.metric("eldr_client_tokens_total", ADMIN, client="alice") == 77
        assert await s.metric("eldr_client_requests_total", ADMIN, client="alice") == 2


@on_uvloop
async def test_names_of_clients_are_shown_with_the_admin_key_alone(tmp_path: Path) -> None:
    async with running(**limited(tmp_path, "requests_per_day=1")) as s:
        for _ in range(3):
            await s.post(headers=ALICE)
        assert b"alice" not in (await s.get("/metrics", headers=ALICE)).body
        assert await s.metric("eldr_client_requests_total", ADMIN, client="alice") == 1
        assert await s.metric("eldr_client_refusals_total", ADMIN, client="alice", limit="requests") == 2
        assert b"alice" not in (await s.get("/metrics", headers=ALICE)).body


@on_uvloop
async def test_a_reload_keeps_the_balances_of_clients_whose_limits_stay(tmp_path: Path) -> None:
    settings = limited(tmp_path, "requests_per_day=3")
    async with running(**settings) as s:
        assert left(await s.post(headers=ALICE), "requests") == 2
        for text, remaining in (
            ("another-key alice requests_per_day=3\n", 1),
            ("another-key alice requests_per_day=3\nsecret-of-alice alice requests_per_day=3\n", 0),
            ("another-key alice requests_per_day=5\n", 4),
        ):
            (tmp_path / "keys").write_text(text)
            s.router.reload_secrets()
            assert left(await s.post(headers=bearer("another-key")), "requests") == remaining
        assert await s.metric("eldr_client_requests_total", ADMIN, client="alice") == 4
        (tmp_path / "keys").write_text("another-key alice requests_per_day=0\n")
        with pytest.raises(ConfigError, match=r"keys:1: expected KEY, KEY NAME or KEY NAME LIMIT=NUMBER"):
            s.router.reload_secrets()
        assert left(await s.post(headers=bearer("another-key")), "requests") == 3
        (tmp_path / "keys").write_text("third zoe\n")
        s.router.reload_secrets()
        assert (await s.post(headers=bearer("another-key"))).status == 401
        assert b"alice" not in (await s.get("/metrics", headers=bearer(ADMIN))).body


@pytest.mark.parametrize(
    "line",
    ["k a requests_per_min=0", "k a requests_per_min=-1", "k a requests_per_min=1.5", "k a requests_per_min=",
     "k a requests_per_min", "k a requests=1", "k a requests_per_min=1 requests_per_min=1", "k a 5",
     "k a requests_per_min=1e3", "k a requests_per_min=9999999999999"],
)  # fmt: skip
def test_limits_that_are_none_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "keys").write_text("# clients\n" + line + "\n")
    with pytest.raises(ConfigError, match=r"keys:2: .*requests_per_min, requests_per_day, tokens_per_min"):
        ApiKeys(tmp_path / "keys")


def test_the_keys_of_one_client_have_the_same_limits(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("k  a   tokens_per_min=5 requests_per_day=1\nl a requests_per_day=1 tokens_per_min=5\nm b\nn\n")
    assert ApiKeys(path).limits == {"a": {"tokens_per_min": 5, "requests_per_day": 1}, "b": {}, "client-4": {}}
    path.write_text("k a tokens_per_min=5\nl a tokens_per_min=6\n")
    with pytest.raises(ConfigError, match=":2: another key of a has other limits"):
        ApiKeys(path)
    path.write_text("k a tokens_per_min=5\nl a\n")
    with pytest.raises(ConfigError, match=":2: another key of a has other limits"):
        ApiKeys(path)
