"""A named workload in the replay: kinds by share, and what a trace cannot serve."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from eldr.cli.main import main
from eldr.replay.errors import ReplayError
from eldr.replay.experiment import Laboratory, Settings
from eldr.replay.split import Mix
from eldr.replay.workload import ServedKind, mixed_draw_order
from eldr.trace import Trace, write_trace
from tests.synthetic import make_trace


def test_pools_are_drawn_from_by_share() -> None:
    pools = [(np.arange(0, 50), 3.0), (np.arange(50, 120), 1.0)]
    order = mixed_draw_order(pools, 4000, 5.0, np.random.default_rng(0))
    first = int((order < 50).sum())
    assert stats.binomtest(first, 4000, 0.75).pvalue > 0.001
    # Within a pool every request is used, and none again at once.
    own = order[order < 50]
    assert set(own.tolist()) == set(range(50))
    assert (own[1:] != own[:-1]).all()


def laboratory(trace: Trace, *kinds: Any, **options: Any) -> Laboratory:
    labels = tuple(label for kind in kinds for label in kind.labels)
    return Laboratory(trace, Settings(requests=400, mix=Mix(0.25, labels, labels), kinds=kinds, **options))


def test_a_run_serves_the_kinds_in_their_shares() -> None:
    trace = make_trace(requests=160, kinds=4, steps=12, seed=1)
    lab = laboratory(trace, ServedKind("a", ("kind 0",), 0.7), ServedKind("b", ("kind 1", "kind 2"), 0.3))
    run = lab.run("jsq", 2, lab.rate_for_batch(2, 2), 2, seed=0)
    served = trace.label[run.request]
    assert set(served.tolist()) == {"kind 0", "kind 1", "kind 2"}
    assert stats.binomtest(int((served == "kind 0").sum()), 400, 0.7).pvalue > 0.001


def test_a_load_that_its_smallest_kind_cannot_keep_is_refused() -> None:
    trace = make_trace(requests=120, kinds=4, steps=12)
    lab = laboratory(trace, ServedKind("a", ("kind 0",), 0.9), ServedKind("b", ("kind 1",), 0.1))
    with pytest.raises(ReplayError, match=r"has 2[0-9] to serve"):  # 23 of kind 0 are served and are nine tenths
        lab.rate_for_batch(10, 3)


def test_the_command_maps_labels_to_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.npz"
    write_trace(make_trace(requests=120, kinds=4, steps=12), path)
    kinds = [f"--kind={kind}=kind {number}" for number, kind in enumerate(("code", "math", "medical", "legal"))]
    common = ["replay", str(path), "--workers", "2", "--batch", "2", "--requests", "60", "--seeds", "2"]
    assert main([*common, "--workload", "task", *kinds, "--policies", "jsq", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["policy"] for row in rows} == {"rr", "random", "p2c", "jsq"}
    assert main([*common, "--workload", "task"]) == 2
    assert "--kind code=" in capsys.readouterr().err
    assert main([*common, "--kind", "code=kind 0"]) == 2
    assert main([*common, "--workload", "task", *kinds, "--serve-labels", "kind 0"]) == 2
