"""Experts in the answers of stock workers: clients get none of them, and a share is learned from."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from typing import Any

import numpy as np
import pytest

from eldr.counts import CountsError
from eldr.router.experts.base import MoeGeometry
from eldr.router.experts.routed_experts import VllmRoutedExperts
from eldr.router.experts.sglang import SglangRoutedExperts
from tests.router.experts.lessons import GEOMETRY, Lessons, counted, rows_of
from tests.router.fake_worker import EXPERTS, LAYERS, TOP_K, FakeWorker, Seen, compact, reply
from tests.router.harness import ASK, CHAT, Setup, on_uvloop, running, until

# Runs whole on one worker, as every request does on an aggregated one.
WHOLE = {**ASK, "echo": True}
PROMPT, GENERATED = 4, 4
ROWS = rows_of(PROMPT + GENERATED - 1)


def npy(rows: np.ndarray = ROWS) -> str:
    """As vLLM's numpy2base64."""
    file = io.BytesIO()
    np.save(file, rows.astype(np.uint8))
    return base64.b64encode(file.getvalue()).decode()


class Stock:
    """Answers as vLLM with --enable-return-routed-experts, and keeps each answer as a plain worker would give it."""

    def __init__(self, experts: object = None) -> None:
        self.experts = npy() if experts is None else experts
        self.plain: list[bytes] = []

    async def __call__(
        self, worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if seen.body.get("stream"):
            await worker.answer(seen, writer)
            return
        whole = worker.whole(seen, worker.tokens, seen.path.endswith("chat/completions"))
        for choice in whole["choices"]:
            choice["routed_experts"] = None
        # A careless cut would meet this text.
        whole["choices"][0]["text"] = 'quoted "routed_experts":"AAAA" \\'
        self.plain.append(compact(whole))
        for choice in whole["choices"]:
            choice["routed_experts"] = self.experts
        await reply(writer, 200, compact(whole))


async def outcome(s: Setup, reason: str) -> float:
    return await s.metric("eldr_expert_reports_total", source="routed_experts", outcome=reason)


def settings(share: float = 1.0) -> dict[str, Any]:
    return {"routed_experts_share": share, "expert_geometry": GEOMETRY}


@on_uvloop
async def test_the_client_gets_a_plain_answer_and_the_router_learns() -> None:
    lessons, stock = Lessons(), Stock()
    async with running(expert_sink=lessons, **settings()) as s:
        s.decode[0].behaviour = stock
        chat = {**CHAT, "prompt_logprobs": 1}
        for name, body, path in (("one", WHOLE, "/v1/completions"), ("two", chat, "/v1/chat/completions")):
            answer = await s.post(body, path, headers={"x-request-id": name})
            assert answer.status == 200
            assert answer.body == stock.plain[-1]
            assert int(answer.headers["content-length"]) == len(answer.body)
        await until(lambda: len(lessons.heard) == 2, "both are learned from")
        request_id, decode = lessons.heard[0]
        assert request_id.startswith("one/")
        assert decode.prompt_tokens == GENERATED - 1
        assert np.array_equal(decode.counts, counted(ROWS[PROMPT:]))
        assert await outcome(s, "accepted") == 2


@on_uvloop
async def test_without_the_setting_answers_are_left_alone() -> None:
    stock = Stock()
    async with running() as s:
        s.decode[0].behaviour = stock
        answer = await s.post(WHOLE)
        assert answer.json()["choices"][0]["routed_experts"] == stock.experts


@on_uvloop
async def test_of_a_share_the_others_are_cut_as_well() -> None:
    lessons, stock = Lessons(), Stock()
    async with running(expert_sink=lessons, **settings(0.3)) as s:
        s.decode[0].behaviour = stock
        for _ in range(60):
            assert (await s.post(WHOLE)).body == stock.plain[-1]
        await asyncio.sleep(0.1)
        # Twelve standard deviations are wider than this.
        assert 0 < len(lessons.heard) < 60


@on_uvloop
async def test_a_client_that_asks_gets_what_it_asked_for() -> None:
    lessons, stock = Lessons(), Stock()
    async with running(expert_sink=lessons, **settings()) as s:
        s.decode[0].behaviour = stock
        answer = await s.post({**WHOLE, "routed_experts_prompt_start": 0})
        assert answer.json()["choices"][0]["routed_experts"] == stock.experts
        # A prompt that only mentions it does not ask.
        said = {**WHOLE, "prompt": 'what is "routed_experts_prompt_start"?'}
        assert (await s.post(said)).body == stock.plain[-1]
        await until(lambda: len(lessons.heard) == 1, "the second is learned from")


@on_uvloop
async def test_streams_and_hand_offs_are_left_alone() -> None:
    lessons = Lessons()
    async with running(expert_sink=lessons, **settings()) as s:
        s.decode[0].behaviour = Stock()
        assert (await s.post({**WHOLE, "stream": True})).events[-1] == "data: [DONE]"
        assert (await s.post(ASK)).status == 200
        assert lessons.heard == []


@on_uvloop
async def test_several_choices_are_cut_and_not_read() -> None:
    lessons, stock = Lessons(), Stock()
    async with running(expert_sink=lessons, **settings()) as s:
        s.decode[0].behaviour = stock
        assert (await s.post({**ASK, "n": 3})).body == stock.plain[-1]
        assert await outcome(s, "several_choices") == 1
        assert lessons.heard == []


@pytest.mark.parametrize(
    ("experts", "reason", "cut"),
    [
        (npy(rows_of(PROMPT + GENERATED)), "incomplete", True),
        (npy(ROWS[:, :1]), "geometry", True),
        (npy(ROWS * 0), "inconsistent", True),
        ("AAAA", "malformed", True),
        ("\u00e4\n", "malformed", True),
        ("", "malformed", True),
        (7, "missing", False),
        ({"routed_experts": "x"}, "missing", False),
    ],
)
def test_nonsense_is_counted_and_harms_nobody(experts: object, reason: str, cut: bool) -> None:
    @on_uvloop
    async def test() -> None:
        lessons, stock = Lessons(), Stock(experts)
        async with running(expert_sink=lessons, **settings()) as s:
            s.decode[0].behaviour = stock
            answer = await s.post(WHOLE)
            assert answer.status == 200
            assert (answer.body == stock.plain[-1]) == cut
            for _ in range(200):
                if await outcome(s, reason):
                    break
                await asyncio.sleep(0.01)
            assert await outcome(s, reason) == 1
            assert lessons.heard == []

    test()


@on_uvloop
async def test_a_worker_without_the_flag_is_told_apart() -> None:
    async with running(**settings()) as s:
        assert (await s.post(WHOLE)).status == 200
        assert await outcome(s, "missing") == 1


def test_a_share_needs_a_geometry() -> None:
    from eldr.router.config.settings import ConfigError, RouterConfig

    with pytest.raises(ConfigError, match="routed_experts_share needs expert_geometry"):
        RouterConfig.of(prefill=["http://p:1"], decode=["http://d:1"], routed_experts_share=0.1)


def test_spaces_are_no_obstacle() -> None:
    engine = VllmRoutedExperts()
    answer = b'{ "choices" : [ {"a":1 , "routed_experts" : "QQ=="} , {"routed_experts":null}, 3 , [] ] }'
    assert engine.take(answer, (14, len(answer) - 2)) == (answer.replace(b'"QQ=="', b"null"), [b"QQ=="])


def ids(rows: np.ndarray = ROWS) -> str:
    return base64.b64encode(rows.astype("<i4").tobytes()).decode()


@pytest.mark.parametrize("holder", ["sglext", "meta_info"])
def test_sglang_states_them_beside_its_choices(holder: str) -> None:
    engine = SglangRoutedExperts()
    asked = json.loads(engine.asking(b'{"model":"m","return_routed_experts":false}'))
    assert asked == {"model": "m", "return_routed_experts": True}
    plain = {"id": "x", "choices": [{"text": "a"}]}
    alone = json.dumps({**plain, holder: {"routed_experts": ids()}}).encode()
    answer, texts = engine.take(alone, None)
    assert json.loads(answer) == plain
    others = {**plain, holder: {"cached": 1, "routed_experts": ids()}}
    answer, same = engine.take(json.dumps(others).encode(), None)
    assert json.loads(answer) == {**plain, holder: {"cached": 1}}
    assert texts == same == [ids().encode()]
    decode = engine.decode(texts[0], PROMPT, GENERATED, MoeGeometry(LAYERS, EXPERTS, TOP_K))
    assert np.array_equal(decode.counts, counted(ROWS[PROMPT:]))


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"sglext":3}', b'{"sglext":{"routed_experts":null}}'])
def test_of_other_answers_sglangs_source_takes_nothing(answer: bytes) -> None:
    assert SglangRoutedExperts().take(answer, None) == (answer, [])


def test_an_answer_of_one_token_has_no_decode_rows() -> None:
    with pytest.raises(CountsError) as error:
        SglangRoutedExperts().decode(ids(ROWS[:4]).encode(), 4, 1, MoeGeometry(LAYERS, EXPERTS, TOP_K))
    assert error.value.reason == "no_rows"
