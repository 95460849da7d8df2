"""Files that version 0.1.0 wrote, and what it made of them: later versions read them, and know what they say."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eldr.activation import own_frequencies
from eldr.calibration import load_calibration
from eldr.cli.main import main
from eldr.cost import load_cost
from eldr.counts import ExpertCounts, decode_counts
from eldr.trace import read_trace

FILES = Path(__file__).parents[1] / "data" / "0.1.0"


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FILES / "expected.json").read_text())
    return found


def test_a_trace_is_read(expected: dict[str, Any]) -> None:
    trace, said = read_trace(FILES / "trace.npz"), expected["trace"]
    assert len(trace.prompt_tokens) == said["requests"]
    assert hashlib.sha256(trace.prefill_counts.tobytes()).hexdigest() == said["counts_sha256"]
    assert hashlib.sha256(trace.decode_experts.astype("u1").tobytes()).hexdigest() == said["experts_sha256"]
    assert trace.arrival_s is not None
    assert trace.arrival_s[-1] == pytest.approx(said["last_arrival_s"])


def test_counts_on_the_wire_are_read(expected: dict[str, Any]) -> None:
    trace, said = read_trace(FILES / "trace.npz"), expected["counts"]
    found = decode_counts(said["wire"])
    assert (found.counts == trace.prefill_counts[said["request"]]).all()


def test_a_calibration_gives_the_same_signatures_zones_and_predictions(expected: dict[str, Any]) -> None:
    calibration, said = load_calibration(FILES / "calibration.eldr.npz"), expected["calibration"]
    trace, request = read_trace(FILES / "trace.npz"), expected["counts"]["request"]
    counts = trace.prefill_counts[request : request + 1]
    signature = calibration.signature.transform(counts)[0]
    assert calibration.workers == said["workers"]
    assert signature.tolist() == pytest.approx(said["signature"], abs=1e-6)
    assert int((calibration.centroids @ signature).argmax()) == said["zone"]
    predictor = calibration.predictor
    assert predictor is not None
    prompt = ExpertCounts(np.ascontiguousarray(counts[0]), int(trace.prompt_tokens[request]), trace.meta.top_k)
    frequency = own_frequencies(prompt, predictor.mean_frequency)
    by_the_map = predictor.predict(frequency, predictor.mean_frequency, 1.0)
    assert by_the_map.tolist() == pytest.approx(said["predicted"], abs=1e-5)


def test_a_cost_file_gives_the_same_times(expected: dict[str, Any]) -> None:
    cost = load_cost(FILES / "cost.json").step_cost(48, "step")
    assert cost.step_s(30.0, 4, 2000.0) == pytest.approx(expected["cost"]["step_s"])


def test_a_decision_log_is_read_whole(expected: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Expected-union has learned since, so that a few of its choices differ from those that the log holds."""
    code = main(["decisions", str(FILES / "decisions.jsonl"), "--json"])
    found = json.loads(capsys.readouterr().out)
    chosen = expected["chosen"]
    assert found["decisions"] == len(chosen)
    assert found["not_repeated"] == 0
    assert found["gaps"] == []
    assert {worker: of["logged"] for worker, of in found["workers"].items()} == Counter(chosen)
    assert found["differing"] <= len(chosen) // 10
    assert code == (found["differing"] > 0)
