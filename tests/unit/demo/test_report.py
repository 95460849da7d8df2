"""summary.json has the agreed fields; the report is one well-formed file that needs nothing else."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from eldr.demo.measure import ActiveExperts, PolicyRun, Round
from eldr.demo.outputs import Difference, OutputCheck
from eldr.demo.padded import ExpertBytes
from eldr.demo.report import write_report
from eldr.demo.result import DemoResult
from eldr.demo.step_cost import Step, StepLine
from eldr.demo.summary import summarise, write_summary
from eldr.load.outcome import Outcome
from eldr.load.request import Request
from eldr.workloads.kinds import KINDS
from eldr.workloads.prompt import Prompt
from tests.synthetic import make_calibration

URLS = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
VOID = {"meta", "br", "hr", "img", "input", "link"}


LINE = StepLine(2.0, 0.1, 0.3, 0.9875, 4, (Step(1, 16.0, 3.9), Step(8, 90.0, 13.4)))


def make_run(policy: str, total: float, gaps_ms: tuple[float, ...] = (10.0,), failed: int = 0) -> PolicyRun:
    """A round for each of `gaps_ms`. Request n is sent at 0 and has three tokens, the first after (n + 1) ms, the
    others a gap apart. The rounds share `total` active experts, in 40 steps and layers in all."""
    run = PolicyRun(policy)
    rounds = len(gaps_ms)
    for at, gap_ms in enumerate(gaps_ms):
        active = {url: ActiveExperts(total / rounds, steps / rounds) for url, steps in zip(URLS, (10, 30), strict=True)}
        run.rounds.append(Round(active=active))
        for number, kind in enumerate(KINDS, at * len(KINDS)):
            first_s = (number % len(KINDS) + 1) / 1000
            error = "status 500" if number < failed else None
            times = [] if error else [first_s, first_s + gap_ms / 1000, first_s + 2 * gap_ms / 1000]
            run.rounds[-1].outcomes.append(Outcome(number, kind, 0.0, "<b>&", [1] * len(times), times, error))
            run.served_by[number] = URLS[number % 2]
    return run


@pytest.fixture
def result() -> DemoResult:
    runs = [make_run("jsq", 200.0), make_run("locality-band", 150.0, failed=1)]
    return DemoResult(
        make_calibration(zones=2), URLS, runs, LINE, ExpertBytes(98_304, 6_291_456), OutputCheck(equal=14, ties=1)
    )


def requests() -> list[Request]:
    return [Request(number, Prompt(kind, f"<script>{kind}</script>"), 3) for number, kind in enumerate(KINDS)]


def test_summary_has_exactly_the_agreed_fields(result: DemoResult, tmp_path: Path) -> None:
    write_summary(summarise(result), tmp_path / "summary.json")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.keys() == {
        "tpot_change", "step_cost", "rounds", "expert_bytes", "policies", "outputs_equal", "outputs_ties",
        "outputs_total", "calibration",
    }  # fmt: skip
    assert list(summary["policies"]) == ["jsq", "locality-band"]
    figures = {"requests", "errors", "ttft_p50_ms", "tpot_p50_ms", "tpot_p99_ms", "tpot_mean_ms"}
    figures |= {"active_experts_mean"}
    assert all(policy.keys() == figures for policy in summary["policies"].values())
    assert summary["calibration"].keys() == {"requests", "rho"}
    assert list(summary["tpot_change"]) == ["locality-band"]
    assert summary["tpot_change"]["locality-band"].keys() == {"p50", "p99", "mean"}
    for change in summary["tpot_change"]["locality-band"].values():
        assert change == {"percent": pytest.approx(0.0), "low": None, "high": None}  # a single round
    assert summary["step_cost"] == {"base_ms": 2.0, "per_expert_ms": 0.1, "per_token_ms": 0.3, "r2": 0.9875}
    assert (summary["rounds"], summary["expert_bytes"]) == (1, 6_291_456)


def test_summary_compares_policies_round_by_round(result: DemoResult) -> None:
    result.runs = [make_run("jsq", 200.0, (10.0, 20.0, 40.0)), make_run("expected-union", 150.0, (8.0, 14.0, 24.0))]
    summary = summarise(result)
    # 8/10, 14/20 and 24/40: -20, -30 and -40 percent. Student's t of 97.5 % with 2 degrees of freedom is 4.3027.
    half = 4.302653 * 10 / 3**0.5
    for change in summary["tpot_change"]["expected-union"].values():
        assert change == pytest.approx({"percent": -30.0, "low": -30 - half, "high": -30 + half})
    assert summary["rounds"] == 3


def test_summary_has_the_right_values(result: DemoResult) -> None:
    summary = summarise(result)
    assert len(KINDS) == 8
    jsq, band = summary["policies"]["jsq"], summary["policies"]["locality-band"]
    assert (jsq["requests"], jsq["errors"], band["requests"], band["errors"]) == (8, 0, 8, 1)
    assert jsq["ttft_p50_ms"] == pytest.approx(4.5)
    assert band["ttft_p50_ms"] == pytest.approx(5.0)  # without the first, which failed
    assert jsq["tpot_p50_ms"] == pytest.approx(10.0)
    assert jsq["tpot_p99_ms"] == pytest.approx(10.0)
    assert jsq["tpot_mean_ms"] == pytest.approx(10.0)
    assert jsq["active_experts_mean"] == pytest.approx(400 / 40)
    assert band["active_experts_mean"] == pytest.approx(300 / 40)
    assert (summary["outputs_equal"], summary["outputs_ties"], summary["outputs_total"]) == (14, 1, 15)


def test_what_was_not_measured_is_null_not_a_number(result: DemoResult, tmp_path: Path) -> None:
    result.runs = [PolicyRun("jsq")]
    write_summary(summarise(result), tmp_path / "summary.json")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["tpot_change"] == {}
    figures = summary["policies"]["jsq"]
    assert figures.pop("requests") == 0
    assert figures.pop("errors") == 0
    assert set(figures.values()) == {None}


def without_the_last(check: OutputCheck) -> Callable[[DemoResult], None]:
    def change(result: DemoResult) -> None:
        result.runs.pop()
        result.check = check

    return change


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        (lambda result: None, False),  # one request failed
        (lambda result: result.runs.pop(), False),  # more outputs compared than there are requests
        (lambda result: result.runs.__setitem__(1, make_run("locality-band", 150.0)), False),  # one not compared
        (without_the_last(OutputCheck(equal=7, ties=1)), True),
        (without_the_last(OutputCheck(7, 0, [Difference("jsq", 1, 0, "they differ")])), False),
    ],
)
def test_passed_means_no_error_and_every_output_right(
    result: DemoResult, change: Callable[..., Any], passed: bool
) -> None:
    change(result)
    assert result.passed is passed


class Checker(HTMLParser):
    """Every element is closed in order; collects what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[Any] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action", "srcset", "poster"):
                self.loads.append(value)
            self.loads += re.findall(r"url\(([^)]*)\)", value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.loads += re.findall(r"@import\s+(\S+)|url\(([^)]*)\)", data)


def check_page(path: Path) -> tuple[str, Checker]:
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert [load for load in checker.loads if not str(load).startswith("#")] == []
    assert "script" not in checker.tags
    return text, checker


def test_report_is_well_formed_self_contained_and_escaped(result: DemoResult, tmp_path: Path) -> None:
    write_report(result, requests(), tmp_path / "report.html")
    text, checker = check_page(tmp_path / "report.html")
    assert {"svg", "table", "style", "title"} <= checker.tags
    assert "&lt;script&gt;law&lt;/script&gt;" in text
    assert "&lt;b&gt;&amp;" in text


def test_report_leads_with_the_change_of_tpot_and_says_what_it_means(result: DemoResult, tmp_path: Path) -> None:
    result.runs = [make_run("jsq", 200.0, (10.0, 20.0)), make_run("locality-band", 150.0, (9.0, 16.0))]
    write_report(result, requests(), tmp_path / "report.html")
    text, _ = check_page(tmp_path / "report.html")
    # 9/10 and 16/20: -10 and -20 percent. Student's t of 97.5 % with 1 degree of freedom is 12.706.
    assert text.index("-15.0 %") < text.index("-78.5 to +48.5") < text.index("10.0 → 7.5") < text.index("<section")
    assert "(-25 %)" in text
    assert "2.00 ms + 0.1000 ms x active experts" in text
    assert "R2 0.9875" in text
    assert "experts padded from 0.1 to 6.3 MB" in text
    assert "larger than a real model" in text
    assert "no evidence of speed" not in text


def test_report_of_a_run_in_which_everything_failed(result: DemoResult, tmp_path: Path) -> None:
    result.runs = [make_run("jsq", 0.0, failed=8), PolicyRun("locality-band")]
    result.check = OutputCheck(differences=[Difference("jsq", 1, None, "nothing came")])
    write_report(result, requests(), tmp_path / "report.html")
    assert "nothing came" in check_page(tmp_path / "report.html")[0]
