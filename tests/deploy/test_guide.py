"""What docs/kubernetes.md tells an operator to write and to look for."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from eldr.router.api.keys import ApiKeys
from eldr.router.config.settings import read_key
from tests.deploy.cases import CASES, IMAGE
from tests.deploy.charts import MANIFESTS, ROOT, faults, needs_helm, of_kind, program, render, template, toml_of

GUIDE = (ROOT / "docs" / "kubernetes.md").read_text()
SECTIONS = {section.partition("\n")[0]: section for section in GUIDE.split("\n## ")}
SOURCE = "\n".join(path.read_text() for path in (ROOT / "src" / "eldr").rglob("*.py"))


@needs_helm
def test_the_values_of_the_guide_can_be_installed() -> None:
    (text,) = re.findall(r"```yaml\n(.+?)```", SECTIONS["Install"], re.DOTALL)
    values: dict[str, Any] = yaml.safe_load(text)
    manifests = render(values)
    for kind, name in (("ServiceMonitor", "eldr"), ("PrometheusRule", "eldr"), ("ConfigMap", "eldr-dashboard")):
        assert name in of_kind(manifests, kind)
    assert "policy = " in of_kind(manifests, "ConfigMap")["eldr"]["data"]["eldr.toml"]


@needs_helm
def test_the_values_of_the_page_about_gateways_can_be_installed() -> None:
    (text,) = re.findall(r"```yaml\n(image:.+?)```", (ROOT / "docs" / "gateway.md").read_text(), re.DOTALL)
    manifests = render(yaml.safe_load(text))
    assert faults(yaml.safe_dump_all(manifests), "1.37") == ""
    (pool,) = of_kind(manifests, "InferencePool")
    assert toml_of(manifests, "eldr-epp").count(f"/inferencepools/{pool}") == 1
    assert of_kind(manifests, "Deployment").keys() == {"eldr-epp"}


@needs_helm
def test_the_picker_is_where_the_guide_says() -> None:
    section = SECTIONS["Behind a gateway"]
    service = of_kind(render(CASES["picker"]), "Service")["eldr-epp"]
    for port in service["spec"]["ports"]:
        assert re.search(rf"answers {port['name']} at {port['port']}\b", section, re.IGNORECASE)
        assert f"`{port.get('appProtocol', 'http2')}`" in section
    named = re.findall(r"[A-Z]\w+", section.partition(" are called")[0].rpartition("**Objects.**")[2])
    manifests = render(CASES["picker"])
    assert {manifest["kind"] for manifest in manifests if manifest["metadata"]["name"] == "eldr-epp"} == set(named)


def test_the_keys_of_the_guide_are_keys(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    commands = [line.strip() for line in SECTIONS["Install"].splitlines() if re.match(r"    (openssl|\{ echo)", line)]
    assert len(commands) == 3
    subprocess.run(["bash", "-euc", "\n".join(commands)], cwd=tmp_path, check=True, timeout=60)
    keys = ApiKeys(tmp_path / "api-keys")
    for name in ("metrics-key", "admin-key"):
        assert read_key(tmp_path / name) == (tmp_path / name).read_bytes()  # no end of line, which a header cannot have
    prometheus = read_key(tmp_path / "metrics-key")
    assert keys.client({b"authorization": b"Bearer " + prometheus}) == "prometheus"
    first = (tmp_path / "api-keys").read_bytes().split()[0]
    assert keys.client({b"authorization": b"Bearer " + first}) == "search"


@needs_helm
def test_helm_says_what_the_guide_says() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| helm \|", GUIDE, re.MULTILINE)
    said = template({}).stderr + template({**IMAGE, "X": 1}).stderr
    assert len(rows) == 2
    for message in rows:
        assert message in said


@pytest.mark.parametrize("message", re.findall(r"^\| `([^`]+)` \| (?:log|`/ready`)[^|]*\|", GUIDE, re.MULTILINE))
def test_the_router_says_what_the_guide_says(message: str) -> None:
    """Every part of a message that does not depend on the case stands in the source."""
    parts = re.split(r"'X'|http://\S+|403| and no |prefill|decode", message)
    for part in filter(None, (part.strip() for part in parts)):
        assert part in SOURCE.replace('"\n            "', ""), part


def test_every_folder_and_file_that_is_named_exists() -> None:
    named = set(re.findall(r"deploy/[\w./-]+\w", GUIDE))
    assert {"deploy/helm/eldr", "deploy/manifests", "deploy/examples/kustomize"} <= named
    for path in named:
        assert (ROOT / path).exists(), path
    assert MANIFESTS.is_dir()


@needs_helm
def test_the_delays_of_the_guide_are_those_of_the_chart() -> None:
    values = yaml.safe_load(program("helm", "show", "values", ROOT / "deploy" / "helm" / "eldr").stdout)
    for key in ("shutdown_delay_s", "grace_s"):
        assert f"`{key}` ({values['config'][key]} s)" in GUIDE
    scaling = values["autoscaling"]
    for metric, value in (("stream_events", scaling["eventsPerSecond"]), ("requests", scaling["requestsPerSecond"])):
        assert re.search(rf"`eldr_{metric}_per_second` \|.*\| {value:,} \|", GUIDE)


def test_the_capacity_is_that_of_the_benchmark() -> None:
    """docs/overhead.md has the figures; this page repeats them for one core."""
    overhead = (ROOT / "docs" / "overhead.md").read_text()

    def figure(row: str) -> float:
        found = re.search(rf"^\| {re.escape(row)} \|[^|]*\| ([0-9.,]+)", overhead, re.MULTILINE)
        assert found is not None, row
        return float(found[1].replace(",", ""))

    def stated(row: str) -> tuple[float, float]:
        found = re.search(
            rf"^\| {re.escape(row)} \| ([0-9.]+) \w+ \| ([0-9,]+) a second", SECTIONS["Capacity"], re.MULTILINE
        )
        assert found is not None, row
        return float(found[1]), float(found[2].replace(",", ""))

    whole = stated("a request with a hand-off, decision and decision log included")
    assert whole == (figure("CPU-ms per request, whole answer"), figure("requests/s on one core, whole answer"))
    for row, cost, unit in (
        ("a streamed request of one token", "CPU-ms per request, streamed answer", 1e3),
        ("a token, 1,000 streams at 30 tokens/s", "CPU-s per million tokens, 1,000 streams", 1e6),
        ("a token, 256 streams", "CPU-s per million tokens, 256 streams", 1e6),
    ):
        each, a_second = stated(row)
        assert each == figure(cost)
        assert a_second == pytest.approx(unit / each, rel=0.01)
