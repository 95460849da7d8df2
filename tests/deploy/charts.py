"""The chart of deploy/helm, rendered by helm itself, and what its manifests say."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "eldr"
MANIFESTS = ROOT / "deploy" / "manifests"
EXAMPLES = ROOT / "deploy" / "examples"
PROGRAMS = ROOT / ".envs" / "helm" / "bin"
needs_helm = pytest.mark.skipif(not (PROGRAMS / "helm").exists(), reason="no helm: make .envs/helm/.installed")

Manifest = dict[str, Any]


def program(name: str, *arguments: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment with helm."""
    return subprocess.run([PROGRAMS / name, *arguments], input=text, capture_output=True, text=True, timeout=120)


def template(values: Mapping[str, Any], namespace: str = "serving") -> subprocess.CompletedProcess[str]:
    """Run `helm template` with these values on top of the chart's own."""
    flags = ("--namespace", namespace, "--values", "-")
    return program("helm", "template", "eldr", CHART, *flags, text=json.dumps(values))


@cache
def _rendered(values: str) -> str:
    done = template(json.loads(values))
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(values: Mapping[str, Any]) -> str:
    """The text of all manifests."""
    return _rendered(json.dumps(values))


def render(values: Mapping[str, Any]) -> list[Manifest]:
    return parse(rendered(values))


def parse(text: str) -> list[Manifest]:
    return [manifest for manifest in yaml.safe_load_all(text) if manifest]


def faults(text: str, version: str) -> str:
    """What the schemas of a version of Kubernetes, and the Prometheus Operator's, have against manifests."""
    done = program("python", Path(__file__).with_name("validate.py"), version, text=text)
    assert done.returncode == bool(done.stdout), done.stderr
    return done.stdout


def of_kind(manifests: Iterable[Manifest], kind: str) -> dict[str, Manifest]:
    """The manifests of a kind, by name."""
    return {manifest["metadata"]["name"]: manifest for manifest in manifests if manifest["kind"] == kind}


def workloads(manifests: Iterable[Manifest]) -> Iterator[Manifest]:
    return (manifest for manifest in manifests if manifest["kind"] in ("Deployment", "StatefulSet"))


def pod_of(workload: Manifest) -> dict[str, Any]:
    return workload["spec"]["template"]["spec"]


def container_of(workload: Manifest) -> dict[str, Any]:
    (container,) = pod_of(workload)["containers"]
    return container


def labels_of(workload: Manifest) -> dict[str, str]:
    return workload["spec"]["template"]["metadata"]["labels"]


def selects(labels: Mapping[str, str], pod: Mapping[str, str]) -> bool:
    return labels.items() <= pod.items()


def ports_of(workload: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container_of(workload)["ports"]}


def toml_of(manifests: Iterable[Manifest], name: str = "eldr") -> str:
    """The configuration of the router, or that of the picker: eldr-epp."""
    return of_kind(manifests, "ConfigMap")[name]["data"]["eldr.toml"]
