"""The example workers: as docs/vllm.md sets them up, and as the router expects them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.deploy.charts import EXAMPLES, ROOT, container_of, of_kind, parse, pod_of, ports_of, workloads

WORKERS = parse((EXAMPLES / "vllm-prefill-decode.yaml").read_text())
DEPLOYMENTS = of_kind(WORKERS, "Deployment")


def transfer_of(role: str) -> dict[str, Any]:
    flag = "--kv-transfer-config="
    (text,) = (each for each in container_of(DEPLOYMENTS[f"vllm-{role}"])["args"] if each.startswith(flag))
    return json.loads(text.removeprefix(flag))


def test_the_connector_is_set_up_as_documented() -> None:
    page = (ROOT / "docs" / "vllm.md").read_text()
    found = re.search(r"--kv-transfer-config '(\{.+?\})'$", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    documented = json.loads(found[1])
    assert documented["kv_role"] == "kv_producer"
    assert transfer_of("prefill") == documented
    assert transfer_of("decode") == {**documented, "kv_role": "kv_consumer"}


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_workers_listen_where_their_ports_say(role: str) -> None:
    worker = DEPLOYMENTS[f"vllm-{role}"]
    container = container_of(worker)
    assert f"--port={ports_of(worker)['http']}" in container["args"]
    environment = {each["name"]: each.get("value") or each["valueFrom"] for each in container["env"]}
    assert environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] == str(ports_of(worker)["nixl"])
    assert environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] == {"fieldRef": {"fieldPath": "status.podIP"}}


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_workers_end_after_their_requests(role: str) -> None:
    worker = DEPLOYMENTS[f"vllm-{role}"]
    container = container_of(worker)
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    (timeout,) = (each for each in container["args"] if each.startswith("--shutdown-timeout="))
    needed_s = int(seconds) + int(timeout.partition("=")[2])
    assert pod_of(worker)["terminationGracePeriodSeconds"] >= needed_s + 10
    # Blocks may be pulled until the lease ends.
    if role == "prefill":
        assert int(seconds) > transfer_of(role)["kv_connector_extra_config"]["kv_lease_duration"]


def test_selectors_find_one_kind_of_worker() -> None:
    for name, worker in DEPLOYMENTS.items():
        selector = worker["spec"]["selector"]["matchLabels"].items()
        found = [each["metadata"]["name"] for each in workloads(WORKERS) if selector <= labels(each)]
        assert found == [name]


def labels(workload: dict[str, Any]) -> Any:
    return workload["spec"]["template"]["metadata"]["labels"].items()


def test_the_image_of_workers_copies_what_is_in_the_context() -> None:
    text = (EXAMPLES / "vllm.Dockerfile").read_text()
    context = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [source for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for source in line.split()]
    assert {"pyproject.toml", "setup.py", "src", "build_backend"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in context
    assert "--no-deps" in text
