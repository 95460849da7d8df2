"""A real decode worker reports finished requests to a real router, which finds each of them again by its name."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eldr.demo.workers import WorkerProcess
from tests.e2e.real_fleet import MODEL, Fleet, Router, call, metric

GEOMETRY = "4x32x4"


@pytest.fixture
def router_with_reports(fleet: Fleet, tmp_path: Path) -> Iterator[Router]:
    """A router, and a decode worker that reports all of its requests to it."""
    key = tmp_path / "report.key"
    key.write_text("a-key-of-the-test\n")
    worker = fleet.worker("decode", 9)
    flags = ["--report-key-file", str(key), "--expert-geometry", GEOMETRY]
    router = Router(fleet, tmp_path / "router.log", flags, decode=[worker.url])
    reports = {"urls": [router.url], "key_file": str(key), "share": 1}
    extra = {**worker.spec.extra_config, "eldr_reports": reports}
    worker = WorkerProcess(dataclasses.replace(worker.spec, extra_config=extra))
    try:
        worker.start()
        worker.wait_ready(300)
        router.wait_ready()
        yield router
    finally:
        router.stop()
        worker.stop()


def test_every_kind_of_request_is_reported_and_found(router_with_reports: Router) -> None:
    router = router_with_reports
    said = [{"role": "user", "content": "Count to three."}]
    bodies = {
        "/v1/completions": {"prompt": "def add(a, b):", "max_tokens": 8},
        "/v1/chat/completions": {"messages": said, "max_tokens": 8},
        "/v1/responses": {"input": "Count to three.", "max_output_tokens": 8},
        "/v1/messages": {"messages": said, "max_tokens": 8},
    }
    sent = 0
    for path, body in bodies.items():
        for stream in (False, True):
            status, _, answer = call(router.url, path, {"model": MODEL, "temperature": 0, "stream": stream, **body})
            assert status == 200, answer
            sent += 1
    # One that the router sends whole to the decode worker, which computes its prompt too.
    whole = {"model": MODEL, "prompt": "for i in", "max_tokens": 8, "echo": True}
    assert call(router.url, "/v1/completions", whole, {"x-request-id": "a-name-0"})[0] == 200
    sent += 1
    # Of one token there is nothing to report.
    assert call(router.url, "/v1/completions", {**whole, "max_tokens": 1})[0] == 200
    deadline_s = time.monotonic() + 30
    while (accepted := metric(router.url, "eldr_expert_reports_total", outcome="accepted")) < sent:
        assert time.monotonic() < deadline_s, (accepted, call(router.url, "/metrics")[2].decode())
        time.sleep(0.2)
    assert metric(router.url, "eldr_expert_reports_total") == sent
