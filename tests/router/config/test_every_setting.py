"""The router's settings: every key of a file, every flag, the page that lists them, and what is refused."""

import argparse
import math
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.cli import serve
from eldr.cost import DEFAULT_PRESET, PRESETS
from eldr.router.config.settings import ConfigError, RouterConfig
from eldr.settings import Setting, settings_of
from eldr.settings import given as given_flags

ROOT = Path(__file__).parents[3]
TWO = {"prefill": ["http://p:1"], "decode": ["http://d:1"]}
WORKERS = {*TWO, "worker"}
ALL = {one.key: one for one in settings_of(RouterConfig)}
# What a running router takes over without a restart.
LIVE = {
    "prefill", "decode", "worker", "model", "max_inflight", "max_streams", "max_queued", "queue_timeout_s",
    "worker_wait_s", "prefill_timeout_s", "decode_first_byte_timeout_s", "decode_idle_timeout_s",
    "decode_answer_timeout_s", "stream_keepalive_s", "request_timeout_s", "drain_timeout_s", "max_bodies_bytes",
    "shutdown_delay_s", "grace_s", "log_level", "allowed_origins",
}  # fmt: skip

# A file with every key, none at its default. Files like it are in use: keys must not move or change their meaning.
FILE = """
prefill = ["http://p:1"]
decode = ["http://d:1", "http://d:2"]
worker = ["http://w:1"]
engine = "sglang"
model = "m"
policy = "expected-union"
calibration = "zones.npz"
signature = "prompt"
learn = "off"
learned_dir = "i"
learn_costs = "off"
tau = 0.2
two_nearest = false
refit_interval_s = 9
refit_window_s = 11.5
cost = "COST"
cost_scope = "moe"
others_weight = 2
anchor = 0
tail_guard = inf
step_tokens = 1.5
expert_parallel = 4
resident = 0.5
miss_cost = "cpu"
prefill_weight = 2
prefill_chunk = 512
seed = 7
host = "::1"
port = 0
processes = 4
max_inflight = 3
max_streams = 17
max_queued = 0
queue_timeout_s = 1.5
worker_wait_s = 0
client_header = "X-Team"
allowed_origins = ["https://app.example", "http://localhost:3000"]
load_interval_s = 3
worker_api_key_file = "a"
worker_ca = "b"
api_key_file = "c"
tls_cert = "d"
tls_key = "e"
admin_key_file = "f"
admin_listen = "127.0.0.1:8001"
decision_log = "g"
prefix_window_bytes = 5
max_body_bytes = 6
max_bodies_bytes = 7
max_connections = 8
head_timeout_s = 0.01
body_timeout_s = 0.02
idle_timeout_s = 0.03
stall_timeout_s = 0.04
health_interval_s = 0.05
connect_timeout_s = 0.06
prefill_timeout_s = 0.07
decode_first_byte_timeout_s = 0.08
decode_idle_timeout_s = 0.09
decode_answer_timeout_s = 0.1
stream_keepalive_s = 0.105
request_timeout_s = 0.11
health_timeout_s = 0.12
retries = 0
retry_ratio = 0
retry_burst = 1
eject_failures = 2
eject_rate = 0.25
eject_base_s = 0.13
eject_max_s = 0.14
eject_share = 1
dns_interval_s = 0.15
kubernetes_api = "http://127.0.0.1:8001"
kubernetes_account = "j"
kubernetes_relist_s = 0.17
drain_timeout_s = 0
shutdown_delay_s = 0.16
grace_s = 0
otel_endpoint = "http://collector:4318/v1/traces"
otel_sampling = 1
peers = ["nats://n:4222", "tls://u:p@[::1]"]
fleet = "f-1_A"
peers_credentials_file = "j"
peers_ca = "k"
report_key_file = "h"
routed_experts_share = 0.25
expert_geometry = "48x128x8"
log_level = "error"

[worker_costs]
"http://d:2/" = "COST"
""".replace("COST", DEFAULT_PRESET)

# Every flag, for the same reason.
FLAGS = """
--prefill http://p:1 --decode http://d:1 --decode http://d:2 --worker http://w:1 --worker http://w:2
--engine sglang --policy rr
--calibration c.npz --calibration m=d.npz --seed 3
--decision-log l --host h --port 1 --processes 3 --max-inflight 2
--api-key-file a --tls-cert b --tls-key c --worker-ca d
--worker-api-key-file e --admin-key-file f --admin-listen 127.0.0.1:1 --otel-endpoint http://o
--otel-sampling 0.5 --log-level debug --tau 0.2 --no-two-nearest --refit-interval 1 --refit-window 2 --cost x
--worker-cost http://d:1=y --cost-scope moe --others-weight 3 --anchor 4 --tail-guard inf --step-tokens 5
--expert-parallel 6 --resident 0.25 --miss-cost 90 --prefill-weight 2.5 --prefill-chunk 4096
--allowed-origins https://app.example --allowed-origins https://b.example
--signature counts --learn off --learned-dir s --learn-costs off
--peers nats://n:1 --peers tls://m --fleet f --peers-credentials-file j --peers-ca k
--report-key-file r --routed-experts-share 0.5 --expert-geometry 48x128x8 --expert-geometry m=24x32x4
"""


def values(config: RouterConfig) -> dict[str, Any]:
    return {key: getattr(one.holder(config), key) for key, one in ALL.items()}


def test_every_key_of_a_file(tmp_path: Path) -> None:
    written = tomllib.loads(FILE)
    assert written.keys() == ALL.keys()
    (tmp_path / "eldr.toml").write_text(FILE)
    config = RouterConfig.load(tmp_path / "eldr.toml", {})
    files = {key: Path(written[key]) for key in written if key in (
        "worker_api_key_file", "worker_ca", "api_key_file", "tls_cert", "tls_key", "admin_key_file",
        "decision_log", "report_key_file", "learned_dir", "peers_credentials_file", "peers_ca", "kubernetes_account",
    )}  # fmt: skip
    cost = PRESETS[DEFAULT_PRESET]
    assert values(config) == written | files | {
        "prefill": ("http://p:1",),
        "decode": ("http://d:1", "http://d:2"),
        "worker": ("http://w:1",),
        "allowed_origins": ("https://app.example", "http://localhost:3000"),
        "peers": ("nats://n:4222", "tls://u:p@[::1]"),
        "cost": cost,
        "worker_costs": {"http://d:2": cost},
        "calibration": {"": Path("zones.npz")},
        "expert_geometry": {"": (48, 128, 8)},
    }
    default = values(RouterConfig.of(**TWO))
    # There is one preset only.
    assert {key for key, value in values(config).items() if value == default[key]} == {"prefill", "cost"}


def test_every_flag() -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    arguments = parser.parse_args(FLAGS.split())
    assert given_flags(arguments, RouterConfig) == {
        "prefill": ["http://p:1"], "decode": ["http://d:1", "http://d:2"], "worker": ["http://w:1", "http://w:2"],
        "engine": "sglang", "policy": "rr", "calibration": [("", "c.npz"), ("m", "d.npz")],
        "seed": 3, "decision_log": Path("l"), "host": "h", "port": 1, "processes": 3, "max_inflight": 2,
        "api_key_file": Path("a"), "tls_cert": Path("b"), "tls_key": Path("c"), "worker_ca": Path("d"),
        "worker_api_key_file": Path("e"), "admin_key_file": Path("f"), "admin_listen": "127.0.0.1:1",
        "otel_endpoint": "http://o", "otel_sampling": 0.5, "log_level": "debug", "tau": 0.2, "two_nearest": False,
        "refit_interval_s": 1.0, "refit_window_s": 2.0, "cost": "x", "worker_costs": [("http://d:1", "y")],
        "cost_scope": "moe", "others_weight": 3.0, "anchor": 4.0, "tail_guard": math.inf, "step_tokens": 5.0,
        "expert_parallel": 6, "resident": 0.25, "miss_cost": "90", "prefill_weight": 2.5, "prefill_chunk": 4096,
        "allowed_origins": ["https://app.example", "https://b.example"],
        "signature": "counts", "learn": "off", "learned_dir": Path("s"), "learn_costs": "off",
        "peers": ["nats://n:1", "tls://m"], "fleet": "f", "peers_credentials_file": Path("j"), "peers_ca": Path("k"),
        "report_key_file": Path("r"), "routed_experts_share": 0.5,
        "expert_geometry": [("", "48x128x8"), ("m", "24x32x4")],
    }  # fmt: skip
    assert {one.flag for one in ALL.values() if one.flag} == {
        text for text in re.findall(r"--[a-z-]+", parser.format_usage()) if text != "--config"
    }


def test_the_live_settings() -> None:
    assert {key for key, one in ALL.items() if one.live} == LIVE


# Settings whose default is not shown as a value of TOML.
NOT_SHOWN = ("cost", "worker_costs", "allowed_origins", "calibration", "expert_geometry", "peers")


def rows() -> dict[str, list[str]]:
    """The tables of the page: key -> its other cells."""
    page = (ROOT / "docs" / "router.md").read_text()
    part = page.partition("<!-- settings -->")[2].partition("<!-- /settings -->")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if "| `" in line]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_the_page_lists_every_setting_with_its_default() -> None:
    assert list(rows()) == list(ALL)
    default = values(RouterConfig.of(**TWO))
    for key, (flag, shown, live, _) in rows().items():
        assert flag.strip("`") == ALL[key].flag
        assert (live == "yes") == (key in LIVE)
        if key not in {*WORKERS, *NOT_SHOWN} and default[key] is not None:
            text = shown.replace("`", '"')
            assert tomllib.loads(f"value = {text}")["value"] == default[key], key


@pytest.mark.parametrize("tool", ["settings_table.py", "settings_schema.py"])
def test_the_page_and_the_schema_are_up_to_date(tool: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / tool, "--check"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def toml(flat: Mapping[str, object]) -> str:
    return "".join(f"{key} = {toml_value(value)}\n" for key, value in flat.items())


def toml_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(letter):08x}" for letter in value) + '"'
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml_value(name)} = {toml_value(item)}' for name, item in value.items())}}}"
    return repr(value)


def valid(one: Setting) -> st.SearchStrategy[Any]:
    if one.key in WORKERS:
        return st.lists(st.integers(1, 9).map(lambda port: f"http://w:{port}"), min_size=1, max_size=3, unique=True)
    if one.key == "allowed_origins":
        return st.lists(st.sampled_from(["*", "https://a.example", "http://[::1]:3000", "app://x"]), unique=True)
    if one.key == "peers":
        return st.lists(st.sampled_from(["nats://h", "tls://u:p@h:1", "nats://token@[::1]:4222"]), unique=True)
    if one.key == "fleet":
        return st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
    if one.key == "calibration":
        return st.sampled_from(["c.npz", {"m": "c.npz", "": "d.npz"}])
    if one.key == "expert_geometry":
        return st.sampled_from(["48x128x8", {"m": "24x32x4", "": "1x8x2"}, {}])
    if one.key == "cost":
        return st.just(DEFAULT_PRESET)
    if one.key == "miss_cost":
        return st.sampled_from(["pcie4", "cpu", "12.5"])
    if one.key == "kubernetes_api":
        return st.sampled_from(["http://127.0.0.1:8001", "https://[fd00::1]:6443", "https://clusters.example/c/1"])
    if one.choices:
        return st.sampled_from(one.choices)
    if one.kind is bool:
        return st.booleans()
    if one.kind is int:
        return st.integers(int(one.least), int(one.most))
    if one.kind is float:
        numbers = st.floats(one.least, one.most) | st.integers(math.ceil(one.least), math.ceil(min(one.most, 10**9)))
        return numbers | st.just(math.inf) if one.infinite else numbers
    return st.text(min_size=1, max_size=20)


def wrong(one: Setting) -> st.SearchStrategy[Any]:
    if one.key in WORKERS:
        more: list[str] = [] if one.key in TWO else TWO["decode"]
        return st.sampled_from(["http://w:1", 1, [1], ["w:1"], ["http://w:1", "http://w:1"], ["http://w:0"], more])
    if one.key == "allowed_origins":
        return st.sampled_from(["*", 1, [1], ["null"], ["https://a.example/"], ["a.example"], ["https://a b"], [""]])
    if one.key == "peers":
        return st.sampled_from(
            ["nats://h", 1, [1], ["h:4222"], ["http://h"], ["nats://h/x"], ["nats://h:0"], ["nats://"]]
        )
    if one.key == "fleet":
        return st.sampled_from(["", 1, "a.b", "a b", "*", ">", "x" * 65, "é", ["a"]])
    if one.key == "miss_cost":
        return st.sampled_from(["", "pcie6", "-1", "nan", -1, math.inf, True, [60]])
    if one.key == "worker_costs":
        return st.text(max_size=9).map(lambda cost: {"http://d:1": cost})
    if one.key == "calibration":
        return st.sampled_from(["", 1, [], ["c.npz"], {"m": 1}, {"m": ""}, [("m", "")]])
    if one.key == "expert_geometry":
        return st.sampled_from(["", 1, [], ["48x128x8"], "48x128", {"m": 1}, {"m": "1x2x3"}, [("m", "")]])
    if one.key == "cost":
        return st.text(max_size=9)
    others = st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(), st.integers(), max_size=2)
    text, numbers = st.text(), st.integers() | st.floats()
    if one.kind is int:
        outside = st.integers(max_value=int(one.least) - 1) | st.integers(min_value=int(one.most) + 1)
        return others | text | st.booleans() | st.floats() | outside
    if one.kind is float:
        below = st.floats(max_value=one.least, exclude_max=True) | st.integers(max_value=math.ceil(one.least) - 1)
        bad = others | text | st.booleans() | below | st.sampled_from([math.nan, 10**400])
        if one.most <= 1:
            bad |= st.floats(min_value=one.most, exclude_min=True)
        return bad if one.infinite else bad | st.just(math.inf)
    if one.kind is bool:
        return others | text | numbers
    return others | numbers | st.booleans() | st.just("")


# Those that are of no use alone, or name another.
TOGETHER = {"tls_cert", "tls_key", "admin_listen", "admin_key_file", "worker_costs", "routed_experts_share"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings")


@settings(max_examples=50)
@given(st.data())
def test_values_of_a_file_arrive_as_they_were_written(folder: Path, data: st.DataObject) -> None:
    keys = data.draw(st.sets(st.sampled_from(sorted(ALL.keys() - TOGETHER - WORKERS))))
    flat = {key: data.draw(valid(ALL[key]), key) for key in [*TWO, *sorted(keys)]}
    (folder / "eldr.toml").write_text(toml(flat))
    found = values(RouterConfig.load(folder / "eldr.toml", {}))
    default = values(RouterConfig.of(**TWO))
    for key, value in found.items():
        if key in TWO or (key in ("allowed_origins", "peers") and key in flat):
            assert value == tuple(flat[key])
        elif key == "cost":
            assert value == PRESETS[DEFAULT_PRESET]
        elif key not in flat:
            assert value == default[key]
        elif key == "calibration":
            files = {"": flat[key]} if isinstance(flat[key], str) else flat[key]
            assert value == {model: Path(file) for model, file in files.items()}
        elif key == "expert_geometry":
            texts = {"": flat[key]} if isinstance(flat[key], str) else flat[key]
            assert value == {model: tuple(map(int, text.split("x"))) for model, text in texts.items()}
        else:
            assert value == (Path(flat[key]) if isinstance(value, Path) else flat[key])


@pytest.mark.parametrize("key", ALL)
@settings(max_examples=6)
@given(data=st.data())
def test_a_wrong_value_is_refused_by_name(key: str, data: st.DataObject) -> None:
    value = data.draw(wrong(ALL[key]))
    with pytest.raises(ConfigError) as caught:
        RouterConfig.of(**{**TWO, key: value})
    assert re.search(rf"\b{key}\b", str(caught.value))


def test_costs_of_workers_with_a_path() -> None:
    url = "http://gateway/d1"
    config = RouterConfig.of(**{**TWO, "decode": [f"dns+{url}", url]}, worker_costs={f"{url}/": DEFAULT_PRESET})
    assert config.workers.decode == (f"dns+{url}", url)
    assert config.placement.options.worker_costs == {url: PRESETS[DEFAULT_PRESET]}


def test_a_key_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'decoed'; the keys are .*\bdecode\b"):
        RouterConfig.of(**TWO, decoed=[])


@pytest.mark.parametrize("cost", [3, "", "no such", "x" * 5000, "\0"])
def test_a_cost_that_is_none_is_refused_by_name(cost: object) -> None:
    with pytest.raises(ConfigError, match=r"\bcost\b"):
        RouterConfig.of(**TWO, cost=cost)
    with pytest.raises(ConfigError, match=r"worker_costs of http://d:1\b"):
        RouterConfig.of(**TWO, worker_costs={"http://d:1": cost})


@pytest.mark.parametrize("costs", ["x", 3, ["ab"], [[1, "x"]], [["http://d:1", DEFAULT_PRESET]]])
def test_costs_that_are_no_table_are_refused(costs: object) -> None:
    with pytest.raises(ConfigError, match=r"worker_costs is .*, expected a table"):
        RouterConfig.of(**TWO, worker_costs=costs)


@pytest.mark.parametrize(
    "text", ["port = ", "port = " + "1" * 5000, "port = " + "[" * 5000, "port = 1\nport = 2", "\0"]
)
def test_a_file_that_is_no_toml_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "eldr.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"eldr\.toml: cannot be read as TOML: "):
        RouterConfig.load(tmp_path / "eldr.toml", {})
