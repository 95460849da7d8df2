"""Declared settings: what is refused, what flags and flat values make of them, what a reload may change."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from eldr.settings import SettingError, add_flags, adopt, build, check, given, group, setting, settings_of


@dataclass
class Oven:
    power_w: int = setting(800, "power at 100 %", least=1, most=3000, flag=True, live=True)
    bake_s: float = setting(60.0, "time to bake", least=0.5, infinite=True, flag=True)
    share: float = setting(0.5, "share of heat from below", most=1)
    fan: bool = setting(True, "turn the fan", flag=True)
    mode: str = setting("grill", "what heats", choices=("grill", "air"), flag=True)
    serial: int = setting(0, "number of the oven", most=2**63 - 1)
    log: Path | None = setting(None, "file to write to", flag=True, shown="nowhere")


def _words(key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise SettingError(f"{key} is no list")
    return tuple(word.upper() for word in value)


@dataclass
class Shelf:
    name: str | None = setting(None, "name of the shelf", live=True)
    jars: tuple[str, ...] = setting((), "a jar", parse=_words, flag="--jar", metavar="JAR")
    prices: Mapping[str, str] = setting(
        {}, "price of a jar", parse=lambda _, v: dict(v), flag=True, metavar="JAR=PRICE"
    )


@dataclass
class Kitchen:
    oven: Oven = group("The oven")
    shelf: Shelf = group("The shelf")


def parse(arguments: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_flags(parser, Kitchen)
    return given(parser.parse_args(arguments), Kitchen)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("power_w", 0, "a whole number from 1 to 3000"),
        ("power_w", 3001, "a whole number from 1 to 3000"),
        ("power_w", True, "a whole number from 1 to 3000"),
        ("power_w", 800.0, "a whole number from 1 to 3000"),
        ("serial", 2**63, "a whole number from 0 to 9223372036854775807"),
        ("bake_s", 0.4, "seconds from 0.5, or inf"),
        ("bake_s", "long", "seconds from 0.5, or inf"),
        ("bake_s", math.nan, "seconds from 0.5, or inf"),
        ("bake_s", 10**400, "seconds from 0.5, or inf"),
        ("share", math.inf, "a number from 0 to 1"),
        ("share", False, "a number from 0 to 1"),
        ("fan", 1, "true or false"),
        ("mode", "steam", "one of grill, air"),
        ("mode", None, "one of grill, air"),
        ("log", "a.log", "the path of a file"),
    ],
)
def test_what_a_setting_cannot_be(key: str, value: object, expected: str) -> None:
    oven = Oven()
    check(oven)
    setattr(oven, key, value)
    with pytest.raises(SettingError) as caught:
        check(oven)
    assert str(caught.value) == f"{key} is {value!r}, expected {expected}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("power_w", 3000),
        ("bake_s", math.inf),
        ("bake_s", 1),
        ("share", 0),
        ("share", 1),
        ("log", None),
        ("mode", "air"),
    ],
)
def test_the_ends_of_a_range_belong_to_it(key: str, value: object) -> None:
    oven = Oven()
    setattr(oven, key, value)
    check(oven)


def test_flat_values_reach_their_groups() -> None:
    kitchen = build(Kitchen, {"jars": ["plum"], "log": "a.log", "bake_s": 5})
    assert (kitchen.shelf.jars, kitchen.oven.log, kitchen.oven.bake_s) == (("PLUM",), Path("a.log"), 5)
    assert kitchen.oven.power_w == 800
    assert build(Kitchen, {}).shelf.prices is not build(Kitchen, {}).shelf.prices


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pwoer_w": 1}, "unknown key 'pwoer_w'; the keys are bake_s, fan, jars"),
        ({"oven": {}}, "unknown key 'oven'"),
        ({"jars": "plum"}, "jars is no list"),
        ({"power_w": 0}, "power_w is 0"),
        ({"log": ""}, "log is ''"),
    ],
)
def test_flat_values_that_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        build(Kitchen, values)


def test_flags_set_what_was_given_and_nothing_else() -> None:
    assert parse([]) == {}
    flags = "--power-w 5 --bake inf --no-fan --mode air --log a --jar plum --jar fig --prices plum=2 --prices a=b=3"
    assert parse(flags.split()) == {
        "power_w": 5, "bake_s": math.inf, "fan": False, "mode": "air", "log": Path("a"),
        "jars": ["plum", "fig"], "prices": [("plum", "2"), ("a=b", "3")],
    }  # fmt: skip


@pytest.mark.parametrize("flags", ["--share 1", "--name x", "--power-w x", "--mode steam", "--prices plum", "--fan"])
def test_flags_that_are_refused(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(flags.split())
    assert "error: " in capsys.readouterr().err


def test_help_says_what_a_flag_means_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "The oven: --power-w N power at 100 % (800)", "--bake SECONDS time to bake (60)",
        "--no-fan do not turn the fan", "--mode {grill,air} what heats (grill)",
        "--log FILE file to write to (nowhere)", "The shelf: --jar JAR a jar (repeatable)",
    ):  # fmt: skip
        assert text in shown


def test_a_reload_changes_what_is_live_and_names_the_rest() -> None:
    old, new = build(Kitchen, {"name": "a"}), build(Kitchen, {"power_w": 1, "name": "b", "jars": ["x"], "share": 0.5})
    oven, shelf = old.oven, old.shelf
    assert adopt(old, new) == ["jars"]
    assert (old.oven, old.shelf) == (oven, shelf)  # parts that keep a group see the change
    assert (oven.power_w, shelf.name, shelf.jars) == (1, "b", ())
    assert adopt(old, new) == ["jars"]


def test_sections_are_those_of_the_groups() -> None:
    assert {one.section for one in settings_of(Kitchen)} == {"The oven", "The shelf"}
