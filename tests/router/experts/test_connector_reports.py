"""POST /eldr/experts: who may report, what is believed, and to which request it belongs."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eldr.counts import ExpertCounts, encode_counts
from eldr.router.api.experts import AT_ONCE, ExpertReports
from eldr.router.api.whole import Whole
from eldr.router.experts.connector_reports import leg_names
from eldr.router.experts.expected import ExpectedReports
from eldr.router.experts.watch import ExpertSources
from eldr.router.http.admin_key import AdminKey
from eldr.router.observe.counters import Metrics
from eldr.router.peers.hub import Hub
from eldr.router.peers.siblings import Siblings
from tests.router.experts.lessons import GEOMETRY, Lessons, counted, rows_of
from tests.router.fake_worker import TOP_K, FakeWorker, Seen
from tests.router.harness import ASK, CHAT, Reply, Setup, bearer, on_uvloop, running

KEY = "the-key-of-reports"
PATH = "/eldr/experts"


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Any]:
    for name, key in (("report", KEY), ("admin", "the-admin-key"), ("api", "a-client alice")):
        (tmp_path / name).write_text(key + "\n")
    return {"report_key_file": tmp_path / "report", "admin_key_file": tmp_path / "admin"}


def wire(tokens: int = 3, seed: int = 0) -> dict[str, Any]:
    return encode_counts(ExpertCounts(counted(rows_of(tokens, seed)).astype(np.uint32), tokens, TOP_K))


def named(leg: str) -> str:
    """What vLLM 0.32 calls the request of a completion with one prompt, inside the engine."""
    return f"cmpl-{leg}-0-0123abcd"


async def report(s: Setup, *reports: object, key: str = KEY, **members: object) -> Reply:
    return await s.post({"v": 1, "reports": list(reports), **members}, PATH, headers=bearer(key))


@on_uvloop
async def test_a_finished_request_is_learned_from_once(tmp_path: Path) -> None:
    (tmp_path / "report").write_text(KEY)
    lessons = Lessons()
    async with running(expert_sink=lessons, report_key_file=tmp_path / "report", expert_geometry=GEOMETRY) as s:
        assert (await s.post(headers={"x-request-id": "one"})).status == 200
        answer = await report(s, {"id": named("one"), "counts": wire()})
        assert (answer.status, answer.json()) == (200, {"accepted": 1, "refused": {}})
        ((request_id, decode),) = lessons.heard
        assert request_id.startswith("one/")
        assert decode.prompt_tokens == 3
        assert np.array_equal(decode.counts, counted(rows_of(3)))
        again = await report(s, {"id": named("one"), "counts": wire()})
        assert again.json() == {"accepted": 0, "refused": {"unknown_request": 1}}
        assert len(lessons.heard) == 1
        assert await s.metric("eldr_expert_reports_total", source="connector", outcome="accepted") == 1
        assert await s.metric("eldr_expert_reports_total", source="connector", outcome="unknown_request") == 1


@on_uvloop
async def test_a_stream_is_learned_from(tmp_path: Path) -> None:
    (tmp_path / "report").write_text(KEY)
    lessons = Lessons()
    async with running(expert_sink=lessons, report_key_file=tmp_path / "report") as s:
        answer = await s.post({**ASK, "stream": True}, headers={"x-request-id": "s"})
        assert answer.events[-1] == "data: [DONE]"
        assert (await report(s, {"id": named("s"), "counts": wire()})).json()["accepted"] == 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (bearer("wrong"), 401),
        (bearer("the-admin-key"), 401),
        (bearer("a-client"), 401),
        ({"x-api-key": KEY}, 200),
        (bearer(KEY), 200),
    ],
)
def test_only_the_key_of_reports_may_report(keys: dict[str, Any], headers: dict[str, str], status: int) -> None:
    @on_uvloop
    async def test() -> None:
        async with running(**keys, api_key_file=keys["report_key_file"].with_name("api")) as s:
            assert (await s.post({"v": 1, "reports": []}, PATH, headers=headers)).status == status
            # And the key is good for nothing else.
            assert (await s.post(headers=bearer(KEY))).status == 401

    test()


@on_uvloop
async def test_without_a_key_file_there_is_no_such_path() -> None:
    async with running() as s:
        assert (await s.post({"v": 1, "reports": []}, PATH)).status == 404


def test_with_other_sources_alone_nobody_may_report() -> None:
    @on_uvloop
    async def test() -> None:
        async with running(routed_experts_share=1.0, expert_geometry=GEOMETRY) as s:
            assert (await s.post({"v": 1, "reports": []}, PATH, headers=bearer(""))).status == 401

    test()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": None}, "malformed"),
        ({"id": "x" * 600}, "malformed"),
        ({"id": named("other")}, "unknown_request"),
        ({"counts": None}, "malformed"),
        ({"counts": {**wire(), "v": 99}}, "version"),
        ({"counts": {**wire(), "prompt_tokens": 2}}, "inconsistent"),
        ({"counts": {"v": 2, "unavailable": "incomplete"}}, "unavailable"),
        ({"counts": wire(tokens=5)}, "inconsistent"),  # the request may have 4 tokens
        ({"counts": encode_counts(ExpertCounts(np.full((2, 4), 1, np.uint32), 2, 2))}, "geometry"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], change: dict[str, Any], reason: str) -> None:
    @on_uvloop
    async def test() -> None:
        lessons = Lessons()
        async with running(expert_sink=lessons, **keys, expert_geometry=GEOMETRY) as s:
            await s.post(headers={"x-request-id": "one"})
            answer = await report(s, {"id": named("one"), "counts": wire()} | change)
            assert answer.json() == {"accepted": 0, "refused": {reason: 1}}
            assert lessons.heard == []

    test()


@on_uvloop
async def test_a_sink_may_refuse(tmp_path: Path) -> None:
    (tmp_path / "report").write_text(KEY)
    async with running(expert_sink=Lessons(refuse=True), report_key_file=tmp_path / "report") as s:
        await s.post(headers={"x-request-id": "one"})
        answer = await report(s, {"id": named("one"), "counts": wire()})
        assert answer.json() == {"accepted": 0, "refused": {"geometry": 1}}


@on_uvloop
async def test_two_requests_of_one_name_are_not_told_apart(tmp_path: Path) -> None:
    (tmp_path / "report").write_text(KEY)
    lessons = Lessons()
    async with running(expert_sink=lessons, report_key_file=tmp_path / "report") as s:
        await asyncio.gather(*(s.post(headers={"x-request-id": "twin"}) for _ in range(2)))
        answer = await report(s, *[{"id": named("twin"), "counts": wire()}] * 2)
        assert answer.json()["accepted"] == 0
        assert answer.json()["refused"]["ambiguous"] == 1
        assert lessons.heard == []


async def fail_at_first(
    worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    worker.behaviour = None
    writer.close()


@on_uvloop
async def test_only_the_attempt_that_answered_is_learned_from(tmp_path: Path) -> None:
    (tmp_path / "report").write_text(KEY)
    lessons = Lessons()
    async with running(decode=2, expert_sink=lessons, report_key_file=tmp_path / "report") as s:
        for worker in s.decode:
            worker.behaviour = fail_at_first
        s.decode[1].behaviour = None
        assert [(await s.post(headers={"x-request-id": f"r{n}"})).status for n in range(4)] == [200] * 4
        sent = [seen.headers["x-request-id"] for worker in s.decode for seen in worker.generated]
        (retried,) = [name for name in sent if "-decode-2" in name]
        first = retried.removesuffix("-decode-2")
        answer = await report(s, {"id": named(first), "counts": wire()}, {"id": named(retried), "counts": wire(seed=1)})
        assert answer.json() == {"accepted": 1, "refused": {"unknown_request": 1}}
        assert np.array_equal(lessons.heard[0][1].counts, counted(rows_of(3, seed=1)))


class Paced(Lessons):
    """Also keeps in which turn of the event loop each report was taken."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = 0
        self.taken: Counter[int] = Counter()

    def report(self, request_id: str, decode: ExpertCounts) -> None:
        super().report(request_id, decode)
        self.taken[self.turn] += 1

    async def count_turns(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.turn += 1


@on_uvloop
async def test_reports_of_another_processs_requests_are_taken_a_few_in_a_turn() -> None:
    hub = Hub()
    expected, paced = [], Paced()
    siblings = []
    for index, sink in enumerate((Lessons(), paced)):
        ours, theirs = socket.socketpair()
        await hub.attach(ours)
        one = Siblings(index, 2, theirs)
        expected.append(ExpectedReports(sink, {}, Metrics()))
        ExpertReports(ExpertSources(expected[index], True, None), AdminKey(None), Whole(one))
        await one.start()
        one.ready()
        siblings.append(one)
    asks, answers = siblings
    names = [f"r{number}" for number in range(100)]
    for name in names:
        expected[1].expect(name, name, None, None)
    await answers.ask(b"anything")  # the parent has heard that it is ready
    counting = asyncio.create_task(paced.count_turns())
    reports = [{"id": named(name), "counts": wire()} for name in [*names, "stranger"]]
    (answer,) = await asks.ask(b"reports", json.dumps(reports).encode())
    counting.cancel()
    assert json.loads(answer) == {"outcomes": {"accepted": 100}, "taken": list(range(100))}
    assert [request_id for request_id, _ in paced.heard] == names
    assert max(paced.taken.values()) <= AT_ONCE
    for one in siblings:
        one.close()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[]", 400),
        (b"{}", 400),
        (b'{"v":1,"reports":{}}', 400),
        (b'{"v":2,"reports":[]}', 400),
        (b'{"reports":[]}', 400),
        (b'{"v":1,"reports":[' + b"[" * 5000, 400),
        (json.dumps({"v": 1, "reports": [1] * 257}).encode(), 413),
        (json.dumps({"v": 1, "reports": ["x" * 2**20]}).encode(), 413),
    ],
)
def test_a_batch_that_is_none_is_refused_whole(keys: dict[str, Any], body: bytes, status: int) -> None:
    @on_uvloop
    async def test() -> None:
        async with running(**keys) as s:
            assert (await s.post(body, PATH, headers=bearer(KEY))).status == status

    test()


@on_uvloop
async def test_a_large_batch_is_taken_whole(tmp_path: Path) -> None:
    (tmp_path / "report").write_text(KEY)
    lessons = Lessons()
    async with running(expert_sink=lessons, report_key_file=tmp_path / "report") as s:
        for n in range(20):
            await s.post(headers={"x-request-id": f"r{n}"})
        reports = [{"id": named(f"r{n}"), "counts": wire(seed=n)} for n in range(20)]
        nonsense: list[object] = [7, {}, "x", None] * 5
        mixed = [each for pair in zip(reports, nonsense, strict=True) for each in pair]
        assert (await report(s, *mixed)).json() == {"accepted": 20, "refused": {"malformed": 20}}
        for n, (request_id, decode) in enumerate(lessons.heard):
            assert request_id.startswith(f"r{n}/")
            assert np.array_equal(decode.counts, counted(rows_of(3, seed=n)))


@on_uvloop
async def test_the_key_is_read_again_on_reload(tmp_path: Path) -> None:
    (tmp_path / "report").write_text(KEY)
    async with running(report_key_file=tmp_path / "report") as s:
        (tmp_path / "report").write_text("another")
        s.router.reload()
        assert (await report(s)).status == 401
        assert (await report(s, key="another")).status == 200


LEG = st.text("abcXYZ019-_.", min_size=1, max_size=20)


@given(LEG, st.text("0123456789abcdef", min_size=8, max_size=8), st.integers(0, 9))
def test_the_leg_is_found_in_the_name_that_vllm_gives(leg: str, random_part: str, turn: int) -> None:
    """As in vllm/entrypoints (prefix, number of the prompt, turn) and InputProcessor.assign_request_id."""
    assert leg_names(f"cmpl-{leg}-0-{random_part}")[0] == leg
    assert leg_names(f"chatcmpl-{leg}-{random_part}")[0] == leg
    assert leg_names(f"resp_{leg}_{turn}-{random_part}")[0] == leg


def test_any_text_has_names() -> None:
    for text in ("", "-", "cmpl-", "cmpl--0-01234567", "x-0", "-0123abcd"):
        assert len(leg_names(text)) == 2


@on_uvloop
async def test_every_endpoint_names_its_requests(tmp_path: Path) -> None:
    (tmp_path / "report").write_text(KEY)
    lessons = Lessons()
    async with running(expert_sink=lessons, report_key_file=tmp_path / "report") as s:
        await s.chat(CHAT, headers={"x-request-id": "c-0"})
        await s.post(ASK, headers={"x-request-id": "t"})
        response = {"model": "tiny", "input": "hello", "max_output_tokens": 4}
        await s.post(response, "/v1/responses", headers={"x-request-id": "r"})
        message = {"model": "tiny", "messages": CHAT["messages"], "max_tokens": 4}
        await s.post(message, "/v1/messages", headers={"x-request-id": "m"})
        names = ["chatcmpl-c-0-0123abcd", named("t"), "resp_r_0-0123abcd", "chatcmpl-m-0123abcd"]
        answer = await report(s, *({"id": name, "counts": wire()} for name in names))
        assert answer.json() == {"accepted": 4, "refused": {}}
        assert [request_id.partition("/")[0] for request_id, _ in lessons.heard] == ["c-0", "t", "r", "m"]
