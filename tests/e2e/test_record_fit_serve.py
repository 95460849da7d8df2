"""Record, fit and serve with the command line, on real workers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from eldr.trace import read_trace
from tests.e2e.real_fleet import MODEL, Fleet, StartRouter, client_of, metric

KINDS = {
    "code": "for i in range({n}):\n    total[{n}] += values[i] * {n}\n",
    "law": "Section {n}. The party of the first part shall notify the party of the second part. ",
    "greek": "Η πόλη έχει {n} δρόμους και πολλές μικρές πλατείες. ",
    "numbers": "{n} + 12 = 31; 7 * {n} = 49; {n} / 3 = 8; 5 - {n} = 2; ",
}


def eldr(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "eldr", *arguments], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("record") / "prompts.jsonl"
    lines = [{"prompt": text.format(n=n) * 2, "label": kind} for n in range(6) for kind, text in KINDS.items()]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trace(fleet: Fleet, prompts: Path) -> Path:
    path = prompts.with_name("worker.npz")
    done = eldr("record", str(prompts), "--url", fleet.prefill.url, "--max-tokens", "12", "-o", str(path))
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def calibration(trace: Path) -> Path:
    path = trace.with_name("calibration.npz")
    done = eldr("fit", str(trace), "--workers", "2", "-o", str(path))
    assert done.returncode == 0, done.stderr
    return path


def test_the_trace_holds_what_was_asked(trace: Path) -> None:
    recorded = read_trace(trace)
    assert len(recorded.prompt_tokens) == 24
    assert set(recorded.label.tolist()) == set(KINDS)
    lengths = np.diff(recorded.decode_offsets)
    assert lengths.max() == 11  # 12 generated tokens, the first of them by the prompt's own forward
    assert recorded.decode_experts.shape[1:] == (recorded.meta.layers, recorded.meta.top_k)


def test_a_router_records_what_a_worker_records(
    trace: Path, prompts: Path, start_router: StartRouter, tmp_path: Path
) -> None:
    key = tmp_path / "admin.key"
    key.write_text("a-secret-of-the-test\n")
    path = tmp_path / "router.npz"
    with start_router("--policy", "jsq", "--admin-key-file", str(key)) as router:
        asked = ["--url", router.url, "--admin-key-file", str(key), "--max-tokens", "12"]
        done = eldr("record", str(prompts), *asked, "-o", str(path))
        assert done.returncode == 0, done.stderr
        refused = eldr("record", str(prompts), "--url", router.url, "-o", str(tmp_path / "none.npz"))
    by_worker, by_router = read_trace(trace), read_trace(path)
    for field in ("prefill_counts", "prompt_tokens", "decode_offsets", "label"):
        assert np.array_equal(getattr(by_worker, field), getattr(by_router, field)), field
    # As sets: the order within a token's top-k carries no meaning.
    assert np.array_equal(np.sort(by_worker.decode_experts, axis=2), np.sort(by_router.decode_experts, axis=2))
    assert refused.returncode == 2
    assert not (tmp_path / "none.npz").exists()


def test_locality_band_serves_the_same_text_and_separates_kinds(
    calibration: Path, start_router: StartRouter, plain: openai.OpenAI
) -> None:
    """Requests of one kind go to one worker when nothing else runs, and outputs do not change."""
    with start_router("--policy", "locality-band", "--calibration", str(calibration), "--tau", "0") as router:
        client = client_of(router.url)
        for n in (7, 8):
            for text in KINDS.values():
                ask: dict[str, Any] = {
                    "model": MODEL,
                    "prompt": text.format(n=n) * 2,
                    "max_tokens": 12,
                    "temperature": 0,
                }
                expected = plain.completions.create(**ask).choices[0].text
                assert client.completions.create(**ask).choices[0].text == expected
        assert metric(router.url, "eldr_decisions_total", policy="locality-band") == 8
        assert metric(router.url, "eldr_decisions_total", reason="no_signature") == 0


def test_a_decision_log_repeats_every_choice(calibration: Path, start_router: StartRouter, tmp_path: Path) -> None:
    """Through concurrent requests, refits, a rotation of the file, a killed router, and another start."""
    log, rotated = tmp_path / "decisions.jsonl", tmp_path / "decisions.jsonl.1"
    logged = ("--calibration", str(calibration), "--decision-log", str(log))

    def send(url: str, first: int) -> None:
        client = client_of(url)
        prompts = [text.format(n=n) * 2 for n in range(first, first + 5) for text in KINDS.values()]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda it: client.completions.create(model=MODEL, prompt=it, max_tokens=8), prompts))

    with start_router("--policy", "locality-band", "--refit-interval", "0.2", *logged) as router:
        send(router.url, 10)
        wait_for(lambda: metric(router.url, "eldr_zone_refits_total", outcome="applied") > 0)
        log.rename(rotated)
        router.process.send_signal(signal.SIGHUP)
        wait_for(log.exists)
        send(router.url, 20)
        wait_for(lambda: metric(router.url, "eldr_inflight") == 0)
    with start_router("--policy", "expected-union", *logged) as router:
        send(router.url, 30)
        router.process.kill()
    with start_router("--policy", "random", "--seed", "3", *logged) as router:
        send(router.url, 40)
    done = eldr("decisions", str(rotated), str(log), "--json")
    result = json.loads(done.stdout)
    assert (done.returncode, result["differing"], result["gaps"]) == (0, 0, []), done.stderr
    assert result["decisions"] > 60
    assert [start["policy"] for start in result["starts"]] == ["locality-band", "expected-union", "random"]
    assert '"event":"refit"' in rotated.read_text()
    assert json.loads(eldr("decisions", str(rotated), str(log), "--policy", "jsq", "--json").stdout)["differing"] > 0
    for text in KINDS.values():
        assert text.format(n=12)[:12] not in rotated.read_text() + log.read_text()


def wait_for(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_inspect_shows_the_file(calibration: Path) -> None:
    shown = eldr("inspect", str(calibration))
    assert shown.returncode == 0
    assert MODEL in shown.stdout
    assert json.loads(eldr("inspect", str(calibration), "--json").stdout)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "absent"])
def test_a_damaged_calibration_is_refused_at_start(
    calibration: Path, fleet: Fleet, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "damaged.npz"
    if damage == "truncated":
        path.write_bytes(calibration.read_bytes()[:-200])
    elif damage == "foreign":
        path.write_bytes(b"PK not a calibration")
    flags = ["--policy", "locality-band", "--calibration", str(path)]
    done = eldr("serve", "--prefill", fleet.prefill.url, "--decode", fleet.decode[0].url, *flags)
    assert done.returncode == 2
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr
