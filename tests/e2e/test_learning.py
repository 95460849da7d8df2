"""A router learns the experts of prompts from a stock worker's own answers, and places requests by what it learned.

On a CPU, vLLM states routed experts up to 0.30: the worker is of that version, from ELDR_VLLM_OLD_PYTHON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eldr.demo.prompts import make_prompts
from eldr.demo.workers import WorkerProcess
from tests.e2e.real_fleet import MODEL, Fleet, Router, call, metric

GEOMETRY = "4x32x4"
LESSONS = 40


@pytest.fixture
def worker(fleet: Fleet) -> Iterator[WorkerProcess]:
    python = os.environ.get("ELDR_VLLM_OLD_PYTHON")
    if not python:
        pytest.skip("needs an environment with vLLM 0.30: make test-matrix makes one")
    spec = fleet.worker("plain", 7, "--enable-return-routed-experts").spec
    worker = WorkerProcess(dataclasses.replace(spec, python=Path(python).absolute()))
    try:
        worker.start()
        worker.wait_ready(300)
        yield worker
    finally:
        worker.stop()


def test_a_router_learns_from_a_stock_workers_answers(fleet: Fleet, worker: WorkerProcess, tmp_path: Path) -> None:
    learned = tmp_path / "learned"
    flags = ["--worker", worker.url, "--policy", "expected-union", "--routed-experts-share", "1"]
    flags += ["--expert-geometry", GEOMETRY, "--learned-dir", str(learned)]
    prompts = [prompt.text for prompt in make_prompts(LESSONS + 4, seed=1)]

    def ask(url: str, prompt: str) -> str:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0}
        status, _, answer = call(url, "/v1/completions", body)
        assert status == 200, answer
        (choice,) = json.loads(answer)["choices"]
        assert choice.get("routed_experts") is None or url == worker.url
        return str(choice["text"])

    router = Router(fleet, tmp_path / "router.log", flags, decode=[], prefill=[])
    try:
        router.wait_ready()
        with ThreadPoolExecutor(4) as pool:
            texts = list(pool.map(lambda prompt: ask(router.url, prompt), prompts[:LESSONS]))
        assert texts[:4] == [ask(worker.url, prompt) for prompt in prompts[:4]]
        accepted = metric(router.url, "eldr_expert_reports_total", source="routed_experts", outcome="accepted")
        assert accepted == LESSONS
        deadline_s = time.monotonic() + 60
        while not metric(router.url, "eldr_learning_fits_total", outcome="adopted"):
            assert time.monotonic() < deadline_s, call(router.url, "/metrics")[2].decode()
            time.sleep(0.2)
        ask(router.url, prompts[LESSONS])
        assert metric(router.url, "eldr_decisions_total", reason="expected_union_prompt") == 1
    finally:
        router.stop()
    assert list(learned.glob("*.npz")), "nothing was kept"
    # The next router knows it from its first request on.
    router = Router(fleet, tmp_path / "next.log", flags, decode=[], prefill=[])
    try:
        router.wait_ready()
        ask(router.url, prompts[LESSONS + 1])
        assert metric(router.url, "eldr_decisions_total", reason="expected_union_prompt") == 1
    finally:
        router.stop()
