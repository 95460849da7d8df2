"""Reports of finished requests: from real engines and a thread that never waits, to a server that plays the router."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eldr.counts import ExpertCounts, decode_counts
from eldr.engines.vllm import reports
from eldr.engines.vllm.reports import Reporter, ReportOptions, report_options
from eldr.engines.vllm.support import UnsupportedError
from tests.vllm.engine import running
from tests.vllm.models import Models

KEY = "a-key"


class Router:
    """Takes batches, or behaves as `answer` says."""

    def __init__(self) -> None:
        self.batches: list[list[dict[str, Any]]] = []
        self.keys: set[str] = set()
        self.status = 200
        self.hold = threading.Event()
        self.hold.set()
        router = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                router.hold.wait(30)
                assert (self.path, body["v"]) == ("/eldr/experts", 1)
                router.keys.add(self.headers["Authorization"])
                if router.status == 200:
                    router.batches.append(body["reports"])
                self.send_response(router.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def reports(self) -> dict[str, ExpertCounts]:
        return {one["id"]: decode_counts(one["counts"]) for batch in self.batches for one in batch}


@pytest.fixture
def router() -> Iterator[Router]:
    router = Router()
    yield router
    router.hold.set()
    router.http.shutdown()
    router.http.server_close()


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    path = tmp_path / "report.key"
    path.write_text(KEY + "\n")
    return str(path)


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize(("role", "asynchronous"), [("kv_consumer", True), ("kv_both", False)])
def test_an_engine_reports_what_its_requests_activated(
    models: Models, router: Router, key_file: str, role: str, asynchronous: bool
) -> None:
    """A decode worker, and one that has no other worker. Prompts are cold and cached, and batches mixed."""
    model = models("moe")
    rng = np.random.default_rng(3)
    prompts = [[int(token) for token in rng.integers(0, 256, length)] for length in (5, 70, 33)]
    options = {"eldr_reports": {"urls": [router.url], "key_file": key_file, "share": 1}}
    with running(model.path, role=role, extra_config=options, async_scheduling=asynchronous) as engine:
        first = engine.run(prompts, None, max_tokens=12)
        again = engine.run([prompts[1]], None, max_tokens=2)
        engine.run([prompts[0]], None, max_tokens=1)  # has no decode row
        engine.prefill(prompts[2])  # neither has the one token of a prefill
        until(lambda: len(router.reports) >= 4)
        sent = "vllm:eldr_reports"
        until(lambda: engine.run([prompts[0]], None) and engine.metric(sent)["value"] == 4)
    found = list(router.reports.values())
    expected = []
    for prompt, answer in zip([*prompts, prompts[1]], [*first, *again], strict=True):
        rows = model.reference.routing([*prompt, *answer.tokens])[len(prompt) : -1]
        counts = [np.bincount(rows[:, layer].ravel(), minlength=32) for layer in range(4)]
        expected.append((len(rows), np.stack(counts)))
    assert len(found) == 4
    for decode in found:
        decode.check()
        assert any(n == decode.prompt_tokens and np.array_equal(counts, decode.counts) for n, counts in expected)
    assert sorted(decode.prompt_tokens for decode in found) == [1, 11, 11, 11]
    assert router.keys == {f"Bearer {KEY}"}


def test_without_the_option_nothing_is_reported(models: Models, router: Router) -> None:
    with running(models("moe").path, role="kv_consumer") as engine:
        engine.run([[1, 2, 3]], None, max_tokens=4)
        assert engine.metric("vllm:eldr_reports")["value"] == 0


def some_counts() -> ExpertCounts:
    return ExpertCounts(np.array([[1, 1, 0]], dtype=np.uint32), 1, 2)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "INTERVAL_S", 0.01)
    monkeypatch.setattr(reports, "MOST_WAITING", 5)
    monkeypatch.setattr(reports, "MOST_IN_A_BATCH", 3)
    monkeypatch.setattr(reports, "TIMEOUT_S", 0.5)


@pytest.mark.usefixtures("quick")
def test_of_a_slow_router_the_oldest_reports_are_dropped(router: Router) -> None:
    router.hold.clear()
    reporter = Reporter(ReportOptions((router.url,), KEY, 1.0))
    reporter.put("first", some_counts())
    outcomes = {"dropped": 0, "sent": 0, "failed": 0}

    def collect() -> bool:
        for outcome, times in reporter.take_outcomes().items():
            outcomes[outcome] += times
        return outcomes["failed"] > 0

    time.sleep(0.1)  # it is being sent
    for n in range(12):
        reporter.put(str(n), some_counts())
    until(collect)  # the first one ran out of time
    router.hold.set()
    until(lambda: collect() and outcomes["sent"] == 5)
    assert outcomes == {"dropped": 7, "sent": 5, "failed": 1}
    told = [one["id"] for batch in router.batches for one in batch if one["id"] != "first"]
    assert told == ["7", "8", "9", "10", "11"]
    assert max(map(len, router.batches)) <= 3


@pytest.mark.usefixtures("quick")
def test_every_router_gets_the_reports_and_one_may_be_gone(router: Router) -> None:
    reporter = Reporter(ReportOptions(("http://127.0.0.1:9", router.url), KEY, 1.0))
    reporter.put("r", some_counts())
    outcomes: dict[str, int] = {}
    until(lambda: outcomes.update(reporter.take_outcomes()) or outcomes)
    assert outcomes == {"sent": 1}
    router.status = 401
    reporter.put("r2", some_counts())
    outcomes.clear()
    until(lambda: outcomes.update(reporter.take_outcomes()) or outcomes)
    assert outcomes == {"failed": 1}
    reporter.incomplete()
    assert reporter.take_outcomes() == {"incomplete": 1}


def test_the_share_is_drawn_by_the_id() -> None:
    reporter = Reporter(ReportOptions(("http://127.0.0.1:9",), KEY, 0.25))
    drawn = [reporter.draws(f"cmpl-{n}-0-abcdef01") for n in range(4000)]
    assert 800 < sum(drawn) < 1200  # six standard deviations
    assert drawn == [reporter.draws(f"cmpl-{n}-0-abcdef01") for n in range(4000)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"urls": []}, "urls"),
        ({"urls": "http://r:1"}, "urls"),
        ({"urls": ["r:1"]}, "urls"),
        ({"urls": ["http://user@r:1"]}, "urls"),
        ({"urls": ["http://r:99999999"]}, "urls"),
        ({"urls": [1]}, "urls"),
        ({"share": 0}, "share"),
        ({"share": 1.5}, "share"),
        ({"share": True}, "share"),
        ({"share": "all"}, "share"),
        ({"key_file": None}, "key_file"),
        ({"key_file": "/absent"}, "cannot be read"),
        ({"key": "x"}, "expected an object with urls, key_file, share"),
    ],
)
def test_wrong_options_are_refused_by_name(key_file: str, change: dict[str, Any], message: str) -> None:
    good = {"urls": ["http://r:8000/base/"], "key_file": key_file}
    found = report_options({"eldr_reports": good, "num_threads": 4})
    assert found == ReportOptions(("http://r:8000/base",), KEY, 0.1)
    with pytest.raises(UnsupportedError, match=message):
        report_options({"eldr_reports": good | change})


def test_a_key_file_holds_one_key(tmp_path: Path) -> None:
    for text in ("", "two words", "two\nlines", "\u00e4"):
        (tmp_path / "key").write_text(text, "utf-8")
        with pytest.raises(UnsupportedError, match="key file"):
            report_options({"eldr_reports": {"urls": ["http://r:1"], "key_file": str(tmp_path / "key")}})
    assert report_options({}) is None
