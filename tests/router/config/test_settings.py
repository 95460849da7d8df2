"""Settings from a file and from flags, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from eldr.cost import DEFAULT_PRESET, PRESETS, CostModel, MoeLayerCost
from eldr.errors import EldrError
from eldr.router.config.settings import ConfigError, RouterConfig, read_key

TWO: dict[str, Any] = {"prefill": ["http://p:1"], "decode": ["http://d:1"]}
THREE: dict[str, Any] = {"prefill": ("http://p0:8100",), "decode": ("http://d0:8200", "http://d1:8200")}


def test_options_of_policies_from_a_file_and_flags(tmp_path: Path) -> None:
    cost = CostModel("measured", "cpu", "made up", MoeLayerCost(10.0, 2.0, 0.5))
    cost.save(tmp_path / "d1.json")
    file = tmp_path / "eldr.toml"
    file.write_text(
        'prefill = ["http://p0:8100"]\ndecode = ["http://d0:8200", "http://d1:8200"]\n'
        'cost_scope = "moe"\ntail_guard = inf\nanchor = 0\nothers_weight = 2\n'
        f'[worker_costs]\n"http://d1:8200/" = "{tmp_path / "d1.json"}"\n'
    )
    options = RouterConfig.load(file, {"anchor": 0.2}).placement.options
    assert (options.cost_scope, options.tail_guard, options.anchor, options.others_weight) == ("moe", math.inf, 0.2, 2)
    assert options.cost == PRESETS[DEFAULT_PRESET]
    assert options.worker_costs == {"http://d1:8200": cost}
    pairs: Any = [("http://d0:8200", str(tmp_path / "d1.json"))]  # as flags give them
    of_flags = RouterConfig.of(**THREE, cost_scope="moe", worker_costs=pairs)
    assert of_flags.placement.options.worker_costs == {"http://d0:8200": cost}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"others_weight": -1}, "others_weight is -1"),
        ({"anchor": math.inf}, "anchor is inf"),
        ({"tail_guard": math.nan}, "tail_guard is nan"),
        ({"tail_guard": "none"}, "tail_guard is 'none'"),
        ({"refit_interval_s": 0}, "refit_interval_s is 0"),
        ({"refit_interval_s": "often"}, "refit_interval_s is 'often'"),
        ({"refit_window_s": 0}, "refit_window_s is 0"),
        ({"cost": 3}, "cost is 3, expected text"),
        ({"cost": "h200"}, "cost 'h200' is neither a file nor a preset; the presets are qwen3"),
        ({"cost_scope": "layer"}, "cost_scope is 'layer', expected one of step, moe"),
        ({"worker_costs": "x"}, "worker_costs is 'x', expected a table"),
        (
            {"worker_costs": {"http://d7:8200": DEFAULT_PRESET}},
            "worker_costs names http://d7:8200, which is not one of the workers that decode",
        ),
        ({"worker_costs": {"http://d0:8200": 1}}, "worker_costs of http://d0:8200 is 1, expected text"),
        ({"worker_costs": {"d0": "x"}}, "'d0' is not a worker's URL"),
    ],
)
def test_options_of_policies_that_cannot_be_used(changed: Any, message: str) -> None:
    with pytest.raises(EldrError, match=message):
        RouterConfig.of(**THREE, **changed)


def test_configuration_from_a_file_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "eldr.toml"
    file.write_text(
        'prefill = ["http://p0:8100/"]\ndecode = ["https://d0:8200", "http://[::1]:8201"]\n'
        'policy = "rr"\ntau = 1\ncalibration = "zones.npz"\nmax_inflight = 7\n'
    )
    config = RouterConfig.load(file, {"policy": "p2c", "port": 1})
    assert config.workers.prefill == ("http://p0:8100",)
    assert config.workers.decode == ("https://d0:8200", "http://[::1]:8201")
    assert (config.placement.policy, config.listen.port, config.workers.max_inflight) == ("p2c", 1, 7)
    assert config.placement.options.tau == 1
    assert config.placement.calibration[""].name == "zones.npz"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"prefill": []}, "prefill"),
        ({"decode": "http://d:1"}, "decode"),
        ({"decode": [1]}, "decode"),
        ({"decode": ["d:1"]}, "decode"),
        ({"decode": ["ftp://d:1"]}, "decode"),
        ({"decode": ["http://d:99999"]}, "decode"),
        ({"decode": ["http://user:word@d:1"]}, "decode"),
        ({"decode": ["http://d:1/v1"]}, "decode"),
        ({"decode": ["http://d:1", "http://d:1/"]}, "decode"),
        ({"decode": ["http://d:1\r\nx: y"]}, "decode"),
        ({"policy": ""}, "policy"),
        ({"tau": "wide"}, "tau"),
        ({"tau": -1}, "tau"),
        ({"two_nearest": 1}, "two_nearest"),
        ({"port": 65536}, "port"),
        ({"port": True}, "port"),
        ({"max_inflight": 0}, "max_inflight"),
        ({"health_interval_s": 0}, "health_interval_s"),
        ({"grace_s": float("nan")}, "grace_s"),
        ({"log_level": "loud"}, "log_level"),
        ({"calibration": 4}, "calibration"),
    ],
)
def test_a_bad_setting_is_refused_by_name(change: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        RouterConfig.of(**{**TWO, **change})


def test_bad_files(tmp_path: Path) -> None:
    file = tmp_path / "eldr.toml"
    with pytest.raises(ConfigError, match=r"eldr\.toml"):
        RouterConfig.load(file, {})
    file.write_text("prefill = [")
    with pytest.raises(ConfigError, match="TOML"):
        RouterConfig.load(file, {})
    file.write_text("prefil = []")
    with pytest.raises(ConfigError, match=r"eldr\.toml.*prefil"):
        RouterConfig.load(file, {})
    key = tmp_path / "key"
    for text in ("", "two words", "a\nb", "ä"):
        key.write_text(text)
        with pytest.raises(ConfigError, match="key"):
            read_key(key)
    key.write_text("  secret\n")
    assert read_key(key) == b"secret"
