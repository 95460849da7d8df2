"""What the router logs of its decisions repeats them exactly, whatever happens to requests, workers and the disk."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from eldr.calibration import fit_calibration
from eldr.cli.main import main
from eldr.counts import ExpertCounts, encode_counts
from eldr.policies import POLICY_NAMES
from eldr.router.config.endpoint import Endpoint
from eldr.router.config.settings import ConfigError
from eldr.router.observe.decision_log import DecisionLog
from tests.router.fake_worker import EXPERTS, LAYERS, TOP_K, FakeWorker, counts_wire
from tests.router.harness import ASK, Setup, on_uvloop, running, until
from tests.synthetic import make_trace


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "calibration.npz"
    trace = make_trace(requests=60, layers=LAYERS, experts=EXPERTS, top_k=TOP_K, kinds=4)
    fit_calibration(trace, 4).save(path)
    return path


def give_counts(prefills: list[FakeWorker]) -> None:
    """Prompts of each prefill worker use experts of their own; the last one says nothing of experts."""
    rng = np.random.default_rng(0)
    for worker in prefills[:-1]:
        counts = np.zeros((LAYERS, EXPERTS), np.uint32)
        for layer in counts:
            layer[rng.choice(EXPERTS, TOP_K, replace=False)] = 4
        worker.counts = encode_counts(ExpertCounts(counts, 4, TOP_K))
    prefills[-1].counts = None


async def one_request(s: Setup, number: int, rng: random.Random) -> None:
    body = {**ASK, "prompt": f"{rng.random()} {'word ' * number}", "stream": number % 3 == 0}
    if number % 29 == 0:
        body["n"] = 2
    headers = {"x-eldr-label": f"kind-{number % 5}", "x-request-id": f"twice-{number // 2}"}
    try:
        async with asyncio.timeout(0.005 if number % 17 == 0 else 20):  # some clients go away
            await s.post(body, headers={} if number % 4 == 0 else headers)
    except (TimeoutError, aiohttp.ClientError):
        pass


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_hundreds_of_concurrent_requests_are_repeated_exactly(
    policy: str, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "decisions.jsonl"

    @on_uvloop
    async def serve() -> None:
        rng = random.Random(1)
        more = await FakeWorker("decode").start()
        settings: dict[str, Any] = {"calibration": calibration, "decision_log": path, "seed": 3, "max_inflight": 60}
        settings |= {"queue_timeout_s": 5.0, "health_interval_s": 0.5}  # nobody waits long on a crowded machine
        async with running(6, 4, policy, **settings) as s:
            give_counts(s.prefill)
            for worker in (*s.decode, more):
                worker.token_gap_s = 0.01
            requests = [asyncio.create_task(one_request(s, number, rng)) for number in range(150)]
            await until(lambda: s.decode[0].most_running > 3, "requests run")
            s.router.membership.join(Endpoint(more.url, "decode"), "test")
            await until(lambda: more.url in s.router.services.fleet.eligible, "a worker joins")
            await s.decode[1].stop()  # refuses connections, and breaks those that it has
            requests += [asyncio.create_task(one_request(s, number, rng)) for number in range(150, 300)]
            drained = s.router.membership.worker(s.decode[2].url, "decode")
            s.router.membership.drain(drained)
            await asyncio.gather(*requests)
            await until(lambda: drained not in s.router.membership.workers(), "it leaves")
            decisions = await s.metric("eldr_decisions_total")
            assert await s.metric("eldr_decision_log_dropped_total") == 0
        await more.stop()
        assert decisions > 250  # all but those whose clients went away
        lines = lines_of(path)
        events = [line["event"] for line in lines]
        assert events.count("choose") == sum(line.get("started", 0) for line in lines) == decisions
        assert events.count("finished") == decisions
        assert {"joined", "left"} <= set(events)

    serve()
    assert main(["decisions", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["decisions"] > 250
    assert result["differing"] == 0
    assert len(result["workers"]) >= 3
    if policy not in ("jsq", "jsq-speed", "prefix-affinity"):  # alike where workers are, and compute no prompts
        assert main(["decisions", str(path), "--policy", "jsq", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["differing"] > 0


@on_uvloop
async def test_the_log_holds_no_prompt(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    async with running(decision_log=path) as s:
        s.prefill[0].counts = {**counts_wire(4), "prompt": "a leaked word"}
        await s.post({**ASK, "prompt": "an unmistakable word", "user": "somebody"})
    assert len(lines_of(path)) == 4
    for word in ("unmistakable", "leaked", "somebody"):
        assert word not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


@on_uvloop
async def test_a_full_disk_costs_no_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(decision_log="/dev/full") as s:
        assert [(await s.post()).status for _ in range(5)] == [200] * 5
        await until(lambda: "No space left on device" in caplog.text, "it is said")
    assert "lines were lost at the end" in caplog.text


def test_a_file_that_cannot_be_opened_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"decision_log .*absent/log cannot be written: No such file"):
        DecisionLog(tmp_path / "absent" / "log")


# The file.


def wait_for(condition: Callable[..., Any]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def numbered(number: int) -> dict[str, int | str]:
    return {"event": "test", "number": number, "text": "x" * 200}


def test_what_does_not_fit_is_dropped_and_marked(tmp_path: Path) -> None:
    """A pipe that nobody reads is a disk that is full for a while."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = DecisionLog(path, buffer_bytes=20_000)
    write = log.run()
    for number in range(2000):
        write(numbered(number))
    assert log.dropped > 500
    read = bytearray()

    def drain() -> int:
        """Lines read so far."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(reader, 2**16):
                read.extend(data)
        return read.count(b"\n")

    wait_for(lambda: drain() >= 2000 - log.dropped)
    for number in range(2000, 2010):
        write(numbered(number))
    log.close()
    drain()
    os.close(reader)
    expected, lost = 0, 0
    for line in map(json.loads, read.decode().splitlines()):
        if line["event"] == "gap":
            expected += line["lines"]
            lost += line["lines"]
        else:
            assert line["number"] == expected
            expected += 1
    assert expected == 2010
    assert lost == log.dropped
    assert log.written + lost >= 2010


def test_a_renamed_file_stays_whole_and_a_new_one_begins(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = DecisionLog(path)
    write = log.run()
    for number in range(100):
        write(numbered(number))
    path.rename(tmp_path / "log.1")
    log.reopen()
    wait_for(path.exists)
    for number in range(100, 150):
        write(numbered(number))
    log.close()
    numbers = [line["number"] for part in ("log.1", "log") for line in lines_of(tmp_path / part)]
    assert numbers == list(range(150))
    assert len(lines_of(path)) == 50


def test_a_file_that_cannot_be_reopened_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    log = DecisionLog(folder / "log")
    write = log.run()
    folder.rename(tmp_path / "gone")
    log.reopen()
    wait_for(lambda: "the old file is kept" in caplog.text)
    write(numbered(0))
    log.close()
    assert [line["number"] for line in lines_of(tmp_path / "gone" / "log")] == [0]


def test_a_line_cut_off_by_a_crash_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('{"event":"log"}\n{"event":"sta')
    log = DecisionLog(path)
    write = log.run()
    write(numbered(0))
    log.close()
    log.close()
    lines = path.read_text().splitlines()
    assert lines[1] == '{"event":"sta'
    assert json.loads(lines[2])["number"] == 0
