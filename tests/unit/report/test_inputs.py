"""`eldr report`: each sort of result file as sections of one page that loads nothing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from eldr.cli.main import main
from eldr.cost import PRESETS
from eldr.report.style import POLICY_STYLES, policy_order, policy_style
from eldr.trace import write_trace
from tests.synthetic import make_calibration, make_trace

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Checker(HTMLParser):
    """Every element is closed in order; collects text and what the page would load or link to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action", "srcset", "poster"):
                self.targets.append(value or "")
            self.targets += re.findall(r"url\(([^)]*)\)", value or "")
            if name == "id":
                self.ids.add(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(path: Path) -> Checker:
    text = path.read_text()
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert all(target.startswith("#") for target in checker.targets)
    assert {target[1:] for target in checker.targets} <= checker.ids
    assert "<script" not in text
    assert "@import" not in text
    return checker


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    write_trace(make_trace(requests=90, kinds=3, steps=20), folder / "t.npz")
    common = ["replay", str(folder / "t.npz"), "--workers", "2", "--requests", "60", "--seeds", "2"]
    assert main([*common, "--batch", "3", "--json", str(folder / "replay.json")]) == 0
    change = ["--calibrate-labels", "kind 0", "--serve-labels", "kind 1", "--switch-at", "0.5"]
    assert main([*common, "--batch", "2", *change, "--json", str(folder / "drift.json")]) == 0
    assert main([*common, "--goodput", "20", "--policies", "expected-union", "--json", str(folder / "good.json")]) == 0
    return folder


def report(tmp_path: Path, *files: Any) -> Checker:
    out = tmp_path / "report.html"
    assert main(["report", *map(str, files), "-o", str(out)]) == 0
    return read_page(out)


def test_replays_become_figures_and_tables(replayed: Path, tmp_path: Path) -> None:
    page = report(tmp_path, replayed / "replay.json")
    rows = json.loads((replayed / "replay.json").read_text())
    assert "2 decode workers" in page.text
    assert "replayed: recorded experts, modelled step time" in page.text
    for row in rows:
        assert f"{row['tpot_p99_ms']:.2f}" in page.text
    assert "twentieth of the run" in report(tmp_path, replayed / "drift.json").text
    assert "limit reached" in report(tmp_path, replayed / "good.json").text


def test_cost_calibration_demo_and_load_become_sections(tmp_path: Path) -> None:
    next(iter(PRESETS.values())).save(tmp_path / "a.cost.json")
    make_calibration().save(tmp_path / "c.npz")
    demo: dict[str, Any] = {"policies": {}, "outputs_equal": 7, "outputs_ties": 0, "outputs_total": 8}
    for number, policy in enumerate(("jsq", "expected-union")):
        figures = dict.fromkeys(("ttft_p50_ms", "tpot_p50_ms", "tpot_p99_ms"), 3.25)
        demo["policies"][policy] = {"requests": 8, "errors": 0, "active_experts_mean": 9.5 - number, **figures}
    (tmp_path / "demo.json").write_text(json.dumps(demo))
    change = {"percent": -18.25, "low": -20.0, "high": -16.5}
    demo |= {"tpot_change": {"expected-union": {"p50": change, "p99": {**change, "low": None}, "mean": change}}}
    (tmp_path / "speed.json").write_text(json.dumps(demo))
    latencies = {key: {"p50": 12.5, "p99": None} for key in ("ttft_ms", "tpot_ms", "itl_ms")}
    load = {"workload": "task", "rate": 5.0, "in_flight": None, "max_tokens": 9, "prompts": "<built in>", "errors": 1}
    load |= {"requests": 4, **latencies, "kinds": {"code": {"requests": 4, **latencies}}}
    (tmp_path / "load.json").write_text(json.dumps(load))
    page = report(tmp_path, *(tmp_path / name for name in ("a.cost.json", "c.npz", "demo.json", "load.json")))
    assert "times do not" in page.text
    speed = report(tmp_path, tmp_path / "speed.json").text
    assert "-18.2 (-20.0 to -16.5)" in speed
    assert "times do not" not in speed
    for text in ("6.263", "0.9980", "Calibration requests", "7 of 8 outputs", "8.50", "task", "<built in>", "12.5"):
        assert text in page.text
    assert page.text.index("6.263") < page.text.index("7 of 8 outputs") < page.text.index("<built in>")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"{}", "not a result file that this version knows"),
        (b"[]", "not a result file that this version knows"),
        (b'[{"tpot_p50_ms": 1}]', "'workers' is missing"),
        (b'[{"tpot_p50_ms": 1, "workers": 2, "rate": 3}]', "'policy' is missing"),
        (b'{"policies": {"jsq": {}}, "outputs_total": 1}', "is missing"),
        (b'{"policies": 7, "outputs_total": 1}', "not complete"),
        (b'{"format": "eldr-evaluation-v1"}', "is missing"),
        (b'{"format": "eldr-evaluation-v1", "made": {}, "common": {}, "traces": [{"about": {}, "experiments": {},'
         b' "skipped": {}}]}', "is missing"),
        (b'{"format": "eldr-cost-v1"}', "moe_layer is missing"),
    ],
)  # fmt: skip
def test_what_cannot_be_reported_is_named(
    content: bytes | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    if content is not None:
        path.write_bytes(content)
    assert main(["report", str(path), "-o", str(tmp_path / "out.html")]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert "result.json" in error
    assert not (tmp_path / "out.html").exists()


def test_policies_look_the_same_everywhere_and_differ_from_each_other() -> None:
    looks = [(look.colour, look.marker, look.dash) for look in POLICY_STYLES.values()]
    assert len(set(looks)) == len(looks)
    assert len({look.marker for look in POLICY_STYLES.values()}) == len(looks)
    assert policy_style("somebody's own").shown == "somebody's own"
    assert policy_order({"expected-union", "zeta", "jsq"}) == ["jsq", "expected-union", "zeta"]
