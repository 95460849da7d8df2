"""`eldr inspect`: what the file holds is what is shown, and hostile text in it is only text."""

import dataclasses
import io
import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from eldr.calibration import Calibration
from eldr.errors import EldrError
from eldr.report.calibration import calibration_as_json, calibration_page, render_calibration
from tests.synthetic import make_calibration


@pytest.fixture
def calibration() -> Calibration:
    made = make_calibration(zones=4, layers=3, layer_mask=np.array([True, False, True]))
    rho = {"count_idf": 0.5, "count": 0.25, "binary": -0.125}
    provenance = made.provenance | {"model": "[red]model\x1b[31m & <script>", "requests": 32}
    return dataclasses.replace(made, rho=rho, zone_sizes=np.array([9, 8, 8, 7]), provenance=provenance)


def shown(calibration: Calibration) -> str:
    text = io.StringIO()
    Console(file=text, width=120).print(render_calibration(calibration))
    return text.getvalue()


def test_the_terminal_shows_the_facts(calibration: Calibration) -> None:
    text = shown(calibration)
    for fact in ("3 layers x 8 experts, top-2", "2 of 3  ■·■", "4, of 7 to 9 requests", "count_idf, rho 0.500", "32"):
        assert fact in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert lines["count"].count("█") == 10
    assert lines["count_idf"].count("█") == 20
    assert lines["binary"].count("█") == 0
    assert "not in the trace" in lines["gate_prob"]
    bars = [line.count("█") for line in text.splitlines() if line.startswith("zone ")]
    assert bars == [40, 36, 36, 31]


def test_text_of_the_file_does_not_steer_the_terminal(calibration: Calibration) -> None:
    text = shown(calibration)
    assert "[red]model" in text
    assert "\x1b" not in text


def test_json_holds_the_facts(calibration: Calibration) -> None:
    read = json.loads(json.dumps(calibration_as_json(calibration)))
    assert read["geometry"] == {"layers": 3, "experts": 8, "top_k": 2}
    assert read["layers_kept"] == [0, 2]
    assert read["rho"] == {"count_idf": 0.5, "count": 0.25, "binary": -0.125}
    assert read["zone_sizes"] == [9, 8, 8, 7]
    assert read["workers"] == 4
    assert read["provenance"]["requests"] == 32


def test_a_file_without_provenance_is_still_shown(calibration: Calibration) -> None:
    bare = dataclasses.replace(calibration, provenance={})
    assert "an unnamed model" in shown(bare)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        links = [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.links += [link for link in links if not link.startswith("#")]


def test_the_page_stands_alone(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    calibration_page(calibration, path)
    text = path.read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.names.count("svg") == 3
    assert "script" not in tags.names
    assert tags.links == []
    assert "&lt;script&gt;" in text
    assert "&lt;b&gt;kind&lt;/b&gt;" in text  # a label of the picture
    for part in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part[: part.index("</svg>")] + "</svg>")


def test_kinds_with_dollar_signs_and_too_many_zones(calibration: Calibration, tmp_path: Path) -> None:
    picture = dataclasses.replace(calibration.picture, labels=np.array(["$", "a$b$c\x07", ""] * 4))
    calibration_page(dataclasses.replace(calibration, picture=picture), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "a$b$c\N{REPLACEMENT CHARACTER}" in text
    assert "no label" in text
    many = make_calibration(zones=25)
    calibration_page(many, tmp_path / "many.html")
    assert (tmp_path / "many.html").read_text().count("<svg") == 2  # by kind, and the sizes


def test_a_page_that_cannot_be_written(calibration: Calibration, tmp_path: Path) -> None:
    with pytest.raises(EldrError, match=r"none/page\.html: No such file"):
        calibration_page(calibration, tmp_path / "none" / "page.html")
