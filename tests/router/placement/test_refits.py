"""Zones refitted while the router serves: the process that fits, its failures, and the log of it all."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eldr.calibration import fit_calibration
from eldr.cli.main import main
from eldr.counts import ExpertCounts, encode_counts
from eldr.router.api.metrics import FRESH_PER_S
from tests.router.fake_worker import EXPERTS, LAYERS, TOP_K, FakeWorker
from tests.router.harness import ASK, Scripted, Setup, on_uvloop, running, until
from tests.synthetic import make_trace


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "calibration.npz"
    fit_calibration(make_trace(requests=60, layers=LAYERS, experts=EXPERTS, top_k=TOP_K, kinds=4), 4).save(path)
    return path


def give_counts(prefills: list[FakeWorker]) -> None:
    """Prompts of each prefill worker use two experts of their own."""
    for number, worker in enumerate(prefills):
        counts = np.zeros((LAYERS, EXPERTS), np.uint32)
        counts[:, [number, (number + 3) % EXPERTS]] = 4
        worker.counts = encode_counts(ExpertCounts(counts, 4, TOP_K))


async def send(s: Setup, count: int) -> None:
    answers = await asyncio.gather(*(s.post({**ASK, "prompt": f"{number} " * 9}) for number in range(count)))
    assert [answer.status for answer in answers] == [200] * count


async def until_refits(s: Setup, outcome: str, count: float) -> None:
    async with asyncio.timeout(30):
        while await s.metric("eldr_zone_refits_total", outcome=outcome) < count:
            await asyncio.sleep(1.5 / FRESH_PER_S)  # what is asked more often is told the same again


def test_zones_follow_the_traffic_and_the_log_repeats_it(
    calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "decisions.jsonl"

    @on_uvloop
    async def serve() -> None:
        settings: dict[str, Any] = {
            "calibration": calibration,
            "decision_log": path,
            "refit_interval_s": 0.1,
            "refit_window_s": 5,
        }
        async with running(5, 4, "locality-band", **settings) as s:
            give_counts(s.prefill)
            for applied in (1, 2):
                await send(s, 100)
                await until_refits(s, "applied", applied)
            await send(s, 100)
            assert 0 <= await s.metric("eldr_zone_refit_age_seconds") < 30
            assert await s.metric("eldr_zone_refit_duration_seconds") > 0
            assert await s.metric("eldr_zone_refits_total", outcome="failed") == 0

    serve()
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum(event["event"] == "refit" for event in events) >= 2
    assert main(["decisions", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decisions"] == 300


@on_uvloop
async def test_a_fitting_process_that_dies_costs_one_refit(calibration: Path) -> None:
    async with running(5, 4, "locality-band", calibration=calibration, refit_interval_s=0.1) as s:
        give_counts(s.prefill)
        await send(s, 60)
        await until_refits(s, "applied", 1)
        (child,) = active_children()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        await until_refits(s, "failed", 1)
        await send(s, 60)
        await until_refits(s, "applied", await s.metric("eldr_zone_refits_total", outcome="applied") + 1)
        assert await s.metric("eldr_policy_errors_total") == 0
    await until(lambda: not active_children(), "the process ends with the router")


class Unfittable(Scripted):
    """A policy whose fit cannot be made."""

    def refit_task(self, newest: int) -> None:
        raise ZeroDivisionError("nothing to divide by")


@on_uvloop
async def test_a_fit_that_cannot_be_made_is_said_and_serving_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async with running(policy=Unfittable(), refit_interval_s=0.1) as s:
        await until_refits(s, "failed", 2)
        assert (await s.post()).status == 200
    assert "zones could not be refitted and stay as they are: nothing to divide by" in caplog.text


class Zoneless(Scripted):
    asked_to_fit = 0

    def refit_task(self, newest: int) -> None:
        self.asked_to_fit += 1


@on_uvloop
async def test_a_policy_without_zones_needs_no_process() -> None:
    policy = Zoneless()
    async with running(policy=policy, refit_interval_s=0.1) as s:
        await until(lambda: policy.asked_to_fit == 3, "it is asked")
        assert await s.metric("eldr_zone_refits_total") == 0
        assert not active_children()
