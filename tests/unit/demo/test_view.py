"""What the demo prints at its end: the change of TPOT first, then its cost line, the tables and the verdict."""

import io
from pathlib import Path

from rich.console import Console

from eldr.demo.outputs import OutputCheck
from eldr.demo.padded import ExpertBytes
from eldr.demo.result import DemoResult
from eldr.demo.view import View
from tests.synthetic import make_calibration
from tests.unit.demo.test_report import LINE, URLS, make_run


def conclude(result: DemoResult) -> list[str]:
    """The lines that are printed, without empty ones."""
    printed = io.StringIO()
    view = View(Console(file=printed, width=80))
    view.runs, view.workers = result.runs, result.workers
    view.conclude(result, Path("out"))
    return [line.rstrip() for line in printed.getvalue().splitlines() if line.strip()]


def test_the_change_of_tpot_comes_first_with_active_experts_beside_it() -> None:
    runs = [
        make_run("jsq", 200.0, (10.0, 20.0, 40.0)),
        make_run("locality-band", 160.0, (9.0, 18.0, 36.0)),
        make_run("expected-union", 120.0, (8.0, 14.0, 24.0)),
    ]
    check = OutputCheck(equal=72)
    lines = conclude(DemoResult(make_calibration(zones=2), URLS, runs, LINE, ExpertBytes(98_304, 6_291_456), check))
    # Student's t of 97.5 % with 2 degrees of freedom, 4.3027, times 10 over the root of 3.
    union = "-30.0 % (-54.8 to -5.2)"
    band = "-10.0 % (-10.0 to -10.0)"
    assert lines[:2] == [
        f"TPOT of locality-band against jsq: p50 {band}, p99 {band}, mean {band}; active experts -20 %",
        f"TPOT of expected-union against jsq: p50 {union}, p99 {union}, mean {union}; active experts -40 %",
    ]
    assert "over 3 rounds" in lines[2]
    assert "2.0 ms + 0.100 ms x active experts of 4 layers + 0.30 ms x batch, R2 0.988" in lines[2]
    assert any(
        line.split() == ["jsq", "0", "of", "24", "4.5", "20.0", "40.0", "23.3", "10.00", "1.00"] for line in lines
    )
    assert "PASSED 72 of 72 outputs are equal to those of a single plain vLLM worker" in lines[-2]


def test_without_any_tpot_the_verdict_remains() -> None:
    result = DemoResult(make_calibration(zones=2), URLS, [make_run("jsq", 0.0, failed=8)], LINE, ExpertBytes(1, 64))
    lines = conclude(result)
    assert lines[0] == "no TPOT was measured"
    assert any(line.strip().startswith("FAILED") for line in lines)
