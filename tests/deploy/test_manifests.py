"""The plain manifests: as the chart renders them, and as kustomize puts them together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.cases import EVERYTHING
from tests.deploy.charts import (
    EXAMPLES,
    MANIFESTS,
    ROOT,
    container_of,
    needs_helm,
    of_kind,
    parse,
    program,
    render,
    toml_of,
)

pytestmark = needs_helm
FOLDERS = sorted(path.parent.name for path in MANIFESTS.glob("*/values.yaml"))


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*-*.yaml")}


def test_they_are_what_the_chart_renders(tmp_path: Path) -> None:
    done = program("python", ROOT / "tools" / "manifests.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert FOLDERS == ["autoscaling", "base", "monitoring"]
    for name in FOLDERS:
        assert files(MANIFESTS / name) == files(tmp_path / name), "run `make manifests`"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_is_listed(folder: str) -> None:
    listed = yaml.safe_load((MANIFESTS / folder / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(files(MANIFESTS / folder))


def kustomized(folder: Path) -> list[dict[str, Any]]:
    done = program("kubectl", "kustomize", folder)
    assert done.returncode == 0, done.stderr
    return parse(done.stdout)


def test_kustomize_puts_together_what_helm_renders() -> None:
    """But for Helm's labels, the checksum of the configuration that the example replaces, and comments in it."""
    values = {
        "image": {"repository": "registry.example/eldr"},
        "peers": {"fleet": "eldr"},
        **{key: {"enabled": True} for key in ("serviceMonitor", "prometheusRule", "dashboard", "autoscaling")},
    }
    by_helm, by_kustomize = render(values), kustomized(EXAMPLES / "kustomize")
    for manifest in (*by_helm, *by_kustomize):
        for label in ("app.kubernetes.io/managed-by", "helm.sh/chart"):
            manifest["metadata"]["labels"].pop(label, None)
        manifest["metadata"].pop("namespace", None)
        if manifest["kind"] == "Deployment":
            del manifest["spec"]["template"]["metadata"]["annotations"]
        if manifest["kind"] == "ConfigMap":
            manifest["data"].pop("eldr.toml", None)

    def sorted_by_name(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(manifests, key=lambda each: (each["kind"], each["metadata"]["name"]))

    assert len(by_helm) == 17
    assert sorted_by_name(by_kustomize) == sorted_by_name(by_helm)


def test_the_example_has_its_namespace_image_and_settings() -> None:
    manifests = kustomized(EXAMPLES / "kustomize")
    assert {manifest["metadata"]["namespace"] for manifest in manifests} == {"serving"}
    (subject,) = of_kind(manifests, "RoleBinding")["eldr"]["subjects"]
    assert subject["namespace"] == "serving"
    router = of_kind(manifests, "Deployment")["eldr"]
    assert container_of(router)["image"].startswith("registry.example/eldr:")
    lines = set(toml_of(manifests).splitlines())
    ours = set(toml_of(parse((MANIFESTS / "base" / "configmap-eldr.yaml").read_text())).splitlines())
    assert lines - ours == {"max_inflight = 128"}
    assert ours - lines == {"port = 8000"}  # the default


def test_nothing_of_helm_is_left() -> None:
    assert any("helm.sh/chart" in manifest["metadata"]["labels"] for manifest in render(EVERYTHING))
    for folder in FOLDERS:
        assert not any("elm" in text.replace("the realm", "") for text in files(MANIFESTS / folder).values())
