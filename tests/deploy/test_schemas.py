"""Every manifest against the published schemas, of the oldest Kubernetes that the chart admits and of a recent one."""

from __future__ import annotations

import re
from functools import reduce
from operator import getitem

import pytest
import yaml

from tests.deploy.cases import CASES, EVERYTHING
from tests.deploy.charts import CHART, EXAMPLES, MANIFESTS, faults, needs_helm, of_kind, program, render, rendered

pytestmark = needs_helm
OLDEST = re.search(r">=(\d+\.\d+)", yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"])
assert OLDEST is not None
VERSIONS = (OLDEST[1], "1.37")


@pytest.mark.parametrize("version", VERSIONS)
def test_all_manifests_fit_the_schemas(version: str) -> None:
    texts = [rendered(values) for values in CASES.values()]
    texts += [path.read_text() for path in MANIFESTS.glob("*/*-*.yaml")]
    texts += [(EXAMPLES / "vllm-prefill-decode.yaml").read_text()]
    texts += [program("kubectl", "kustomize", EXAMPLES / "kustomize").stdout]
    assert all(texts)
    assert faults("\n---\n".join(texts), version) == ""


def test_fields_that_do_not_exist_are_faults() -> None:
    unknown = {
        "Deployment": ("spec.template.spec", "terminationGracePeriod"),
        "HorizontalPodAutoscaler": ("spec", "maximum"),
        "InferencePool": ("spec.endpointPickerRef", "portNumber"),
        "NetworkPolicy": ("spec", "ingres"),
        "PrometheusRule": ("spec", "group"),
        "ServiceMonitor": ("spec", "endpoint"),
    }
    manifests = [each for each in render(EVERYTHING) if each["kind"] in unknown and each["metadata"]["name"] == "eldr"]
    manifests += of_kind(render(CASES["picker"]), "InferencePool").values()
    for manifest in manifests:
        place, key = unknown[manifest["kind"]]
        reduce(getitem, place.split("."), manifest)[key] = 1
    found = faults(yaml.safe_dump_all(manifests), VERSIONS[0]).splitlines()
    assert sorted(line.partition("/")[0] for line in found) == sorted(unknown)


def test_helm_itself_finds_no_fault() -> None:
    done = program("helm", "lint", "--strict", "--set", "image.repository=eldr", CHART)
    assert done.returncode == 0, done.stdout
