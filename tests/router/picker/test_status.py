"""What a picker has at its HTTP address, and what it shares with a router: metrics, reports, logs, the admin API."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.router.experts.lessons import GEOMETRY, Lessons
from tests.router.experts.test_connector_reports import KEY, named, report, wire
from tests.router.harness import Scripted, bearer, preferring
from tests.router.picker.client import ASK, endpoint, picking
from tests.router.picker.test_choice import all_over, handed_off


async def test_decisions_and_answers_are_counted_as_a_routers() -> None:
    async with picking(decode=2, policy=Scripted()) as g:
        exchange, _ = await g.ask(handed_off())
        assert await g.setup.metric("eldr_inflight", role="decode") == 1
        await exchange.answer(200)
        await exchange.trailers()
        await g.ask({**ASK, "model": "nobodys"})
        exchange, _ = await g.ask(b"{}", path="/of/nobody")
        await exchange.answer(404, end=True)
        assert await g.setup.metric("eldr_decisions_total", policy="scripted", reason="scripted") == 1
        assert await g.setup.metric("eldr_request_total", endpoint="/v1/completions", status="200") == 1
        assert await g.setup.metric("eldr_request_total", endpoint="/v1/completions", status="404") == 1
        assert await g.setup.metric("eldr_request_total", endpoint="other", status="404") == 1
        assert await g.setup.metric("eldr_handoffs_total") == 1
        assert await g.setup.metric("eldr_inflight", role="decode") == 0


async def test_counts_that_cannot_be_used_are_counted() -> None:
    async with picking(decode=1) as g:
        for counts in ({"v": 9}, "no counts"):
            _, picked = await g.ask(handed_off(eldr_counts=counts))
            assert "eldr_counts" not in json.loads(picked.body or b"")["kv_transfer_params"]
        assert await g.setup.metric("eldr_counts_errors_total") == 2


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("GET", "/ready", 200),
        ("GET", "/metrics", 200),
        ("POST", "/ready", 405),
        ("POST", "/v1/completions", 404),
        ("GET", "/v1/models", 404),
    ],
)
async def test_the_paths(method: str, path: str, status: int) -> None:
    async with picking(aggregated=1) as g, g.setup.session.request(method, g.setup.url + path) as answer:
        assert answer.status == status
        if status == 404:
            assert "endpoint picker" in (await answer.json())["error"]["message"]


async def test_a_finished_request_is_learned_from(tmp_path: Path) -> None:
    (tmp_path / "report").write_text(KEY)
    lessons = Lessons()
    settings: dict[str, Any] = {"report_key_file": str(tmp_path / "report"), "expert_geometry": GEOMETRY}
    async with picking(aggregated=1, expert_sink=lessons, **settings) as g:
        exchange, _ = await g.ask(x_request_id="one")
        await exchange.answer()
        await exchange.trailers()
        answer = await report(g.setup, {"id": named("one"), "counts": wire()})
        assert answer.json() == {"accepted": 1, "refused": {}}
        ((request_id, _),) = lessons.heard
        assert request_id.startswith("one/")
        assert (await report(g.setup, {"id": named("one"), "counts": wire()}, key="wrong")).status == 401


@pytest.mark.parametrize("status", [500, 0])
async def test_a_request_that_failed_is_not_and_its_name_is_free_again(tmp_path: Path, status: int) -> None:
    """status: of its answer. 0 if the client leaves before there is one."""
    (tmp_path / "report").write_text(KEY)
    lessons = Lessons()
    settings: dict[str, Any] = {"report_key_file": str(tmp_path / "report"), "expert_geometry": GEOMETRY}
    async with picking(aggregated=1, expert_sink=lessons, **settings) as g:
        failed, _ = await g.ask(x_request_id="one")
        if status:
            await failed.answer(status)
        await failed.end()
        await all_over(g)
        answer = await report(g.setup, {"id": named("one"), "counts": wire()})
        assert answer.json()["refused"] == {"unknown_request": 1}
        again, _ = await g.ask(x_request_id="one")
        await again.answer()
        assert (await report(g.setup, {"id": named("one"), "counts": wire()})).json()["accepted"] == 1
        assert len(lessons.heard) == 1


async def test_the_decision_log(tmp_path: Path) -> None:
    async with picking(decode=2, decision_log=str(tmp_path / "log")) as g:
        exchange, picked = await g.ask(handed_off(), x_request_id="mine")
        await exchange.answer(end=True)
        await all_over(g)
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    ours = [event for event in events if str(event.get("id", "")).startswith("mine/")]
    assert [event["event"] for event in ours] == ["choose", "finished"]
    assert {event["worker"] for event in ours} == {"http://" + picked.endpoints[0]}


async def test_a_line_for_each_request_at_level_debug(caplog: pytest.LogCaptureFixture) -> None:
    policy = Scripted()
    async with picking(decode=2, policy=policy) as g:
        policy.rule = preferring(g.setup.decode[1])
        with caplog.at_level(logging.DEBUG, "eldr.router"):
            exchange, _ = await g.ask(x_request_id="mine")
            await exchange.answer(200, end=True)
            await all_over(g)
        (fields,) = [record.fields for record in caplog.records if record.message == "request"]  # type: ignore[attr-defined]
        assert fields.pop("seconds") >= 0
        assert fields == {
            "id": "mine",
            "path": "/v1/completions",
            "decode": g.setup.decode[1].url,
            "reason": "scripted",
            "status": 200,
        }


async def test_workers_join_and_drain_by_the_admin_api(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("the-key")
    settings: dict[str, Any] = {"admin_key_file": str(tmp_path / "key"), "admin_listen": "127.0.0.1:0"}
    async with picking(aggregated=2, **settings) as g:
        first, second = g.setup.aggregated
        admin = f"http://127.0.0.1:{g.setup.router.admin_port}"
        headers = bearer("the-key")
        async with g.setup.session.post(admin + "/admin/drain", json={"url": first.url}, headers=headers) as answer:
            assert answer.status == 202
        for _ in range(3):
            _, picked = await g.ask()
            assert picked.endpoints == [endpoint(second)]
        for url in ("http://worker:8000", first.url + "/path", first.url + "#rank=1"):
            body = {"url": url, "role": "aggregated"}
            async with g.setup.session.post(admin + "/admin/workers", json=body, headers=headers) as answer:
                assert answer.status == 400
                assert "gateway" in (await answer.json())["error"]["message"]
        async with g.setup.session.get(admin + "/ui/state", headers=headers) as answer:
            assert len((await answer.json())["decisions"]) == 3
