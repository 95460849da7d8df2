"""What the chart's manifests say of each other and of the router, which no schema knows."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import eldr
from eldr.cli.main import main
from eldr.router.config.picker import PickerConfig
from eldr.router.config.settings import RouterConfig
from eldr.settings import settings_of
from tests.deploy.cases import CASES, EVERYTHING, IMAGE, NO_BUS
from tests.deploy.charts import (
    CHART,
    EXAMPLES,
    ROOT,
    Manifest,
    container_of,
    labels_of,
    needs_helm,
    of_kind,
    parse,
    pod_of,
    ports_of,
    render,
    selects,
    template,
    toml_of,
    workloads,
)
from tests.nats_server import PROGRAM as NATS
from tests.router.harness import ASK, on_uvloop, running

pytestmark = needs_helm
KINDS = {"serve": RouterConfig, "epp": PickerConfig}
every_case = pytest.mark.parametrize("values", CASES.values(), ids=CASES)


def test_the_chart_has_the_version_of_the_router() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == eldr.__version__
    assert chart["version"] == eldr.__version__.replace(".dev", "-dev.")  # semantic versioning's form


@every_case
def test_selectors_find_their_pods_and_no_others(values: dict[str, Any]) -> None:
    manifests = render(values)
    pods = {workload["metadata"]["name"]: labels_of(workload) for workload in workloads(manifests)}
    checked = 0
    for manifest in manifests:
        spec = manifest.get("spec", {})
        for selector in (spec.get("selector"), spec.get("podSelector")):
            if manifest["kind"] in ("ServiceMonitor", "InferencePool") or not selector:
                continue
            labels = selector.get("matchLabels", selector)
            found = [name for name, pod in pods.items() if selects(labels, pod)]
            assert found == [manifest["metadata"]["name"]], manifest
            checked += 1
    for workload in workloads(manifests):
        for spread in pod_of(workload)["topologySpreadConstraints"]:
            assert selects(spread["labelSelector"]["matchLabels"], labels_of(workload))
    assert checked >= 2


@every_case
def test_ports_that_are_named_exist(values: dict[str, Any]) -> None:
    manifests = render(values)
    by_name = {workload["metadata"]["name"]: workload for workload in workloads(manifests)}
    for name, service in of_kind(manifests, "Service").items():
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in ports_of(by_name[name])
    for name, policy in of_kind(manifests, "NetworkPolicy").items():
        for rule in policy["spec"]["ingress"]:
            assert {port["port"] for port in rule["ports"]} <= ports_of(by_name[name]).keys()
    for pool in of_kind(manifests, "InferencePool").values():
        picker = pool["spec"]["endpointPickerRef"]
        (port,) = (
            port
            for port in of_kind(manifests, "Service")[picker["name"]]["spec"]["ports"]
            if port["port"] == picker["port"]["number"]
        )
        assert port["targetPort"] == "grpc"
    for workload in by_name.values():
        for _, probe in probes_of(workload):
            assert probe["httpGet"]["port"] in ports_of(workload)
    for monitor in of_kind(manifests, "ServiceMonitor").values():
        services = of_kind(manifests, "Service").values()
        (service,) = (
            each for each in services if selects(monitor["spec"]["selector"]["matchLabels"], each["metadata"]["labels"])
        )
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}


def probes_of(workload: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    container = container_of(workload)
    return (
        (kind, container[kind]) for kind in ("startupProbe", "livenessProbe", "readinessProbe") if kind in container
    )


@every_case
def test_what_is_mounted_exists(values: dict[str, Any]) -> None:
    manifests = render(values)
    config_maps = of_kind(manifests, "ConfigMap").keys() | {"costs"}
    secrets = {one["name"] for one in values.get("secrets", {}).values()}
    for workload in workloads(manifests):
        volumes = {volume.pop("name"): volume for volume in pod_of(workload)["volumes"]}
        mounts = [mount["name"] for mount in container_of(workload)["volumeMounts"]]
        assert sorted(volumes) == sorted(mounts)
        for volume in volumes.values():
            match volume:
                case {"configMap": {"name": name}}:
                    assert name in config_maps
                case {"secret": {"secretName": name}}:
                    assert name in secrets
                case _:
                    assert volume == {"emptyDir": {}}


def test_every_secret_is_mounted_where_its_setting_says() -> None:
    manifests = render(EVERYTHING)
    config = tomllib.loads(toml_of(manifests))
    router = of_kind(manifests, "Deployment")["eldr"]
    at = {mount["name"]: mount["mountPath"] for mount in container_of(router)["volumeMounts"]}
    secrets = {
        f"{at[volume['name']]}/": volume["secret"]["secretName"]
        for volume in pod_of(router)["volumes"]
        if "secret" in volume
    }

    def secret(key: str) -> tuple[str, str]:
        path = config[key]
        (folder,) = (each for each in secrets if path.startswith(each))
        return secrets[folder], path.removeprefix(folder)

    assert {key: secret(key) for key, value in config.items() if "/secrets/" in str(value)} == {
        "api_key_file": ("clients", "api-keys"),
        "admin_key_file": ("admin", "admin-key"),
        "worker_api_key_file": ("workers", "worker-api-key"),
        "report_key_file": ("reports", "report-key"),
        "peers_credentials_file": ("bus", "nats.creds"),
        "peers_ca": ("bus", "ca.pem"),
        "tls_cert": ("certificate", "tls.crt"),
        "tls_key": ("certificate", "tls.key"),
    }


@every_case
def test_pods_may_watch_pods_and_nothing_else(values: dict[str, Any]) -> None:
    manifests = render(values)
    account = values.get("serviceAccount", {})
    configs = {name: toml_of(manifests, name) for name in of_kind(manifests, "Deployment")}
    asks = any("k8s+" in text for text in configs.values())
    for name, text in configs.items():
        pod = pod_of(of_kind(manifests, "Deployment")[name])
        assert pod["automountServiceAccountToken"] is ("k8s+" in text)
    if account.get("create", True):
        assert pod["serviceAccountName"] in of_kind(manifests, "ServiceAccount")
    else:
        assert pod["serviceAccountName"] == account.get("name", "default")
    roles, bindings = of_kind(manifests, "Role"), of_kind(manifests, "RoleBinding")
    if not asks or not values.get("rbac", {}).get("create", True):
        assert not roles
        assert not bindings
        return
    role, binding = roles["eldr"], bindings["eldr"]
    assert role["metadata"].get("namespace") == binding["metadata"].get("namespace")
    assert role["metadata"].get("namespace", "") == values.get("discovery", {}).get("namespace", "")
    assert binding["roleRef"]["name"] == "eldr"
    (subject,) = binding["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": pod["serviceAccountName"], "namespace": "serving"}
    verbs = {(*rule["apiGroups"], *rule["resources"]): set(rule["verbs"]) for rule in role["rules"]}
    pools = [key for key in verbs if key == ("inference.networking.k8s.io", "inferencepools")]
    assert bool(pools) == any("inferencepools" in text for text in configs.values())
    assert verbs.keys() - pools == {("", "pods")}
    assert all(given == {"list", "watch"} for given in verbs.values())


@every_case
def test_pods_keep_to_the_restricted_standard(values: dict[str, Any]) -> None:
    """Pod Security Standards, `restricted`; and a root file system that cannot be written."""
    for workload in workloads(render(values)):
        pod, container = pod_of(workload), container_of(workload)["securityContext"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}


def test_the_pod_runs_as_the_image_does() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    pod = pod_of(of_kind(render(IMAGE), "Deployment")["eldr"])
    assert re.findall(r"^USER (\d+)$", dockerfile, re.MULTILINE) == [str(pod["securityContext"]["runAsUser"])]


def test_the_image_has_what_the_chart_configures() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    installed = re.search(r"'\.\[(.+)\]'$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert installed is not None
    assert {"router", "epp", "kubernetes", "peers"} & extras <= set(installed[1].split(","))


@every_case
def test_router_and_picker_take_their_configurations(values: dict[str, Any], tmp_path: Path) -> None:
    manifests = render(values)
    for name, deployment in of_kind(manifests, "Deployment").items():
        asked: dict[str, Any] = values.get("config", {})
        kind = KINDS[container_of(deployment)["command"][1]]
        if kind is PickerConfig:
            asked = {key: value for key, value in asked.items() if key not in PickerConfig.without}
            asked |= values["picker"].get("config", {})
        path = tmp_path / "eldr.toml"
        path.write_text(toml_of(manifests, name))
        config = kind.load(path, {})
        for key, value in asked.items():
            if value is not None and not isinstance(value, list | dict):
                (one,) = (each for each in settings_of(kind) if each.key == key)
                found = getattr(one.holder(config), key)
                assert found == (float(value) if value == "inf" else value)
        assert config.listen.host == "0.0.0.0"
        assert config.listen.port == asked.get("port", 8000) == ports_of(deployment)["http"]
        if isinstance(config, PickerConfig):
            assert config.picker.grpc_listen == f"0.0.0.0:{ports_of(deployment)['grpc']}"


def test_what_config_says_is_in_the_file_as_it_is() -> None:
    config = tomllib.loads(toml_of(render(EVERYTHING)))
    for key, value in EVERYTHING["config"].items():
        assert config[key] == (float("inf") if value == "inf" else value)
        assert isinstance(config[key], float if value == "inf" else type(value))


@pytest.mark.parametrize(("case", "name"), [("default", "eldr"), ("picker", "eldr-epp")])
def test_the_command_is_one_of_eldr(case: str, name: str, tmp_path: Path) -> None:
    program, *arguments = container_of(of_kind(render(CASES[case]), "Deployment")[name])["command"]
    assert program == "eldr"
    empty = tmp_path / "eldr.toml"
    empty.write_text("")
    here = [str(empty) if argument == "/etc/eldr/config/eldr.toml" else argument for argument in arguments]
    assert here != arguments
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(here) == 2  # unknown flags would end in SystemExit
    assert "no workers are given" in said.getvalue()


def test_the_file_is_where_the_command_looks() -> None:
    router = of_kind(render(IMAGE), "Deployment")["eldr"]
    assert "/etc/eldr/config/eldr.toml" in container_of(router)["command"]
    (mount,) = (each for each in container_of(router)["volumeMounts"] if each["name"] == "config")
    assert mount["mountPath"] == "/etc/eldr/config"
    assert "subPath" not in mount


@every_case
def test_the_end_leaves_time_for_running_requests(values: dict[str, Any]) -> None:
    manifests = render(values)
    for name, deployment in of_kind(manifests, "Deployment").items():
        config = tomllib.loads(toml_of(manifests, name))
        assert "lifecycle" not in container_of(deployment)  # shutdown_delay_s is in its place
        spare_s = pod_of(deployment)["terminationGracePeriodSeconds"] - config["shutdown_delay_s"] - config["grace_s"]
        assert 10 <= spare_s <= 20
        # Within shutdown_delay_s, every proxy hears that the pod is not ready.
        readiness = dict(probes_of(deployment))["readinessProbe"]
        assert readiness["periodSeconds"] * readiness["failureThreshold"] <= config["shutdown_delay_s"]


def test_other_delays_change_the_end() -> None:
    for config, least_s in (({"grace_s": None}, 40), ({"shutdown_delay_s": None}, 120), ({"grace_s": 0}, 10)):
        pod = pod_of(of_kind(render({**IMAGE, "config": config}), "Deployment")["eldr"])
        assert least_s + 10 <= pod["terminationGracePeriodSeconds"] <= least_s + 20


def test_a_changed_configuration_rolls_the_pods() -> None:
    def checksum(**config: object) -> str:
        router = of_kind(render({**IMAGE, "config": config}), "Deployment")["eldr"]
        return router["spec"]["template"]["metadata"]["annotations"]["checksum/config"]

    assert checksum() == checksum(policy="expected-union")
    assert checksum(policy="jsq") != checksum()


@every_case
def test_memory_covers_the_bodies(values: dict[str, Any]) -> None:
    """docs/security.md: twice max_bodies_bytes, and 300 MB."""
    needed = 2 * RouterConfig.of(worker=["http://w:1"]).clients.max_bodies_bytes + 3e8
    for deployment in of_kind(render(values), "Deployment").values():
        limits = container_of(deployment)["resources"]["limits"]
        assert limits["memory"].endswith("Mi")
        assert int(limits["memory"].removesuffix("Mi")) * 2**20 >= needed
        assert "cpu" not in limits


@on_uvloop
async def test_probes_ask_what_the_router_answers() -> None:
    probes = probes_of(of_kind(render(IMAGE), "Deployment")["eldr"])
    paths = {probe["httpGet"]["path"] for _, probe in probes}
    assert paths == {"/health", "/ready"}
    async with running() as s:
        for path in paths:
            assert (await s.get(path)).status == 200


@on_uvloop
async def test_metrics_that_scale_routers_exist() -> None:
    adapter = yaml.safe_load((EXAMPLES / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    offered = {rule["name"]["as"]: rule for rule in adapter}
    autoscaler = of_kind(render(EVERYTHING), "HorizontalPodAutoscaler")["eldr"]["spec"]
    asked = {metric["pods"]["metric"]["name"] for metric in autoscaler["metrics"] if metric["type"] == "Pods"}
    assert asked == offered.keys()
    assert autoscaler["scaleTargetRef"]["name"] in of_kind(render(EVERYTHING), "Deployment")
    assert "replicas" not in of_kind(render(EVERYTHING), "Deployment")["eldr"]["spec"]
    async with running() as s:
        await s.post({**ASK, "stream": True})
        for rule in offered.values():
            series, _, _ = rule["seriesQuery"].partition("{")
            assert re.fullmatch(rule["name"]["matches"], series)
            assert await s.metric(series) > 0


def peers_of(policy: Manifest, direction: str, port: int | str) -> list[Any]:
    """Whom the rules of a direction name for a port. None stands for everybody."""
    key = {"ingress": "from", "egress": "to"}[direction]
    return [
        peer
        for rule in policy["spec"][direction]
        if "ports" not in rule or any(each["port"] == port for each in rule["ports"])
        for peer in rule.get(key) or [None]
    ]


def test_routers_reach_what_they_need() -> None:
    policies = of_kind(render(IMAGE), "NetworkPolicy")
    router, nats = policies["eldr"], policies["eldr-nats"]
    workloads_ = {workload["metadata"]["name"]: workload for workload in workloads(render(IMAGE))}
    assert peers_of(router, "egress", 53) == peers_of(router, "egress", 6443) == [None]
    assert peers_of(router, "ingress", "http") == [None]
    # Towards workers as the examples have them, at the port that discovery asks for.
    examples = parse((EXAMPLES / "vllm-prefill-decode.yaml").read_text())
    config = tomllib.loads(toml_of(render(IMAGE)))
    for role in ("prefill", "decode"):
        worker = of_kind(examples, "Deployment")[f"vllm-{role}"]
        (address,) = config[role]
        found = re.fullmatch(r"k8s\+http://\?selector=(.+)&port=(.+)", address)
        assert found is not None
        selector = dict(part.split("=") for part in found[1].split(","))
        assert selects(selector, labels_of(worker))
        assert found[2] in ports_of(worker)
        peers = [peer["podSelector"]["matchLabels"] for peer in peers_of(router, "egress", found[2])]
        assert selector in peers
        # The workers' own policy lets routers and pickers in.
        *sources, _ = peers_of(of_kind(examples, "NetworkPolicy")["vllm"], "ingress", found[2])
        pods = [workloads_["eldr"], of_kind(render(CASES["picker"]), "Deployment")["eldr-epp"]]
        for source, pod in zip(sources, pods, strict=True):
            assert selects(source["podSelector"]["matchLabels"], labels_of(pod))
    # The bus: out of one policy and into the other.
    (there,) = peers_of(router, "egress", 4222)
    assert selects(there["podSelector"]["matchLabels"], labels_of(workloads_["eldr-nats"]))
    (here,) = peers_of(nats, "ingress", "client")
    assert selects(here["podSelector"]["matchLabels"], labels_of(workloads_["eldr"]))
    assert ports_of(workloads_["eldr-nats"])["client"] == 4222


@pytest.mark.parametrize(
    ("url", "port"), [("nats://bus", 4222), ("nats://bus:4333", 4333), ("tls://user:word@bus.example:7422", 7422)]
)
def test_the_bus_may_be_somewhere_else(url: str, port: int) -> None:
    manifests = render({**IMAGE, **NO_BUS, "peers": {"url": url}})
    assert peers_of(of_kind(manifests, "NetworkPolicy")["eldr"], "egress", port) == [None]
    assert tomllib.loads(toml_of(manifests))["peers"] == [url]
    assert not of_kind(manifests, "StatefulSet")


def test_another_namespace_is_reached_and_read() -> None:
    manifests = render(EVERYTHING)
    policy = of_kind(manifests, "NetworkPolicy")["eldr"]
    (peer,) = peers_of(policy, "egress", 8100)
    assert peer["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "workers"}}
    assert tomllib.loads(toml_of(manifests))["worker"][0].startswith("k8s+http://workers?")
    assert of_kind(manifests, "Role")["eldr"]["metadata"]["namespace"] == "workers"


def test_the_api_server_may_be_named() -> None:
    policy = of_kind(render(EVERYTHING), "NetworkPolicy")["eldr"]
    blocks = [{"ipBlock": {"cidr": "10.0.0.1/32"}}, {"ipBlock": {"cidr": "10.0.0.2/32"}}]
    assert peers_of(policy, "egress", 8443) == blocks
    assert peers_of(policy, "egress", 6443) == []
    assert peers_of(of_kind(render(CASES["alone"]), "NetworkPolicy")["eldr"], "egress", 6443) == []


def test_pools_may_be_narrowed_down() -> None:
    manifests = render(CASES["divided pool"])
    config = tomllib.loads(toml_of(manifests))
    assert config["prefill"] == ["k8s+http:///inferencepools/qwen3?selector=llm-d.ai/role=prefill"]
    assert config["decode"] == ["k8s+http:///inferencepools/qwen3?selector=llm-d.ai/role=decode&port=8200"]
    policy = of_kind(manifests, "NetworkPolicy")["eldr"]
    prefill, decode = [{"podSelector": {"matchLabels": {"llm-d.ai/role": role}}} for role in ("prefill", "decode")]
    assert peers_of(policy, "egress", 8200) == [prefill, decode]  # of the prefill pool no port is known
    assert peers_of(policy, "egress", 8201) == [prefill]
    whole = render(CASES["pool"])
    assert tomllib.loads(toml_of(whole))["worker"] == ["k8s+http:///inferencepools/qwen3"]
    assert {"podSelector": {"matchLabels": {}}} in peers_of(of_kind(whole, "NetworkPolicy")["eldr"], "egress", 1)


@pytest.mark.parametrize(
    ("selector", "labels"),
    [
        ("a=b", {"a": "b"}),
        ("a==b,c=d", {"a": "b", "c": "d"}),
        ("a=b,c!=d,e,!f", {"a": "b"}),
        ("a in (b,c),d=e", {}),  # wider than the selector, never narrower
    ],
)
def test_the_policy_lets_through_what_the_selector_finds(selector: str, labels: dict[str, str]) -> None:
    values = {**IMAGE, "discovery": {"worker": {"selector": selector, "port": 8765}}}
    (peer,) = peers_of(of_kind(render(values), "NetworkPolicy")["eldr"], "egress", 8765)
    assert peer["podSelector"]["matchLabels"] == labels


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "image.repository is empty"),
        ({**IMAGE, "replica": 3}, "replica"),
        ({**IMAGE, "discovery": {"decode": {"labels": {}}}}, "labels"),
        ({**IMAGE, "config": {"max_inflght": 3}}, "max_inflght"),
        ({**IMAGE, "config": {"max_inflight": 0}}, "/config/max_inflight"),
        ({**IMAGE, "config": {"engine": "best"}}, "/config/engine"),
        ({**IMAGE, "config": {"grace_s": "30s"}}, "/config/grace_s"),
        ({**IMAGE, "config": {"tail_guard": "none"}}, "/config/tail_guard"),
        ({**IMAGE, "config": {"worker": ["dns+http://vllm:8000"]}}, "networkPolicy.egress is empty"),
        ({**IMAGE, "peers": {"url": "nats://bus:4222"}}, "give one bus"),
        ({**IMAGE, "router": {"enabled": False}}, "there is nothing to run"),
        ({**IMAGE, "picker": {"config": {"retries": 3}}}, "retries"),
        ({**IMAGE, "config": {"phase": "pair"}}, "phase"),
        ({**IMAGE, "picker": {"config": {"phase": "both"}}}, "/picker/config/phase"),
        ({**IMAGE, "picker": {"config": {"fallbacks": 17}}}, "/picker/config/fallbacks"),
        ({**IMAGE, "picker": {"config": {"worker": ["http://10.0.0.1:8000"]}}}, "networkPolicy.egress is empty"),
        ({**IMAGE, "picker": {"inferencePool": {"failureMode": "Open"}}}, "/picker/inferencePool/failureMode"),
        ({**IMAGE, "picker": {"inferencePool": {"targetPorts": []}}}, "/picker/inferencePool/targetPorts"),
        (
            {**IMAGE, "picker": {"enabled": True, "inferencePool": {"create": True}}},
            "picker.inferencePool.matchLabels is empty",
        ),
        (
            {**CASES["picker"], "discovery": {"namespace": "workers"}},
            "an InferencePool takes pods and its picker from its own namespace",
        ),
        ({**IMAGE, "peers": {"url": "redis://bus"}}, "/peers/url"),
        ({**IMAGE, "peers": {"fleet": "a.b"}}, "/peers/fleet"),
        (
            {**IMAGE, "secrets": {"apiKeys": {"name": "keys"}}, "serviceMonitor": {"enabled": True}},
            "serviceMonitor.authorization.name is empty",
        ),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], message: str) -> None:
    done = template(values)
    assert done.returncode != 0
    assert message in done.stderr


def test_prometheus_gets_the_key_that_metrics_need() -> None:
    monitor = of_kind(render(EVERYTHING), "ServiceMonitor")["eldr"]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["authorization"] == {"credentials": {"name": "metrics", "key": "metrics-key"}}
    assert endpoint["scheme"] == "https"


def test_a_picker_needs_no_router() -> None:
    manifests = render(CASES["picker"])
    for kind in ("Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service", "ConfigMap"):
        assert of_kind(manifests, kind).keys() - {"eldr-nats"} == {"eldr-epp"}, kind
    assert of_kind(manifests, "ServiceMonitor").keys() == {"eldr-epp"}


def test_a_picker_is_scaled_on_its_requests_and_a_router_beside_it_by_its_own_values() -> None:
    manifests = render(CASES["picker"])
    (autoscaler,) = of_kind(manifests, "HorizontalPodAutoscaler").values()
    spec = autoscaler["spec"]
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "eldr-epp"}
    assert (spec["minReplicas"], spec["maxReplicas"]) == (3, 8)
    (metric,) = spec["metrics"]  # no events, and CPU is turned off
    assert metric["pods"]["metric"] == {"name": "eldr_requests_per_second"}
    assert "replicas" not in of_kind(manifests, "Deployment")["eldr-epp"]["spec"]
    values = CASES["router and picker"]
    assert of_kind(render(values), "HorizontalPodAutoscaler").keys() == {"eldr"}
    both = {**values, "picker": {**values["picker"], "autoscaling": {"enabled": True}}}
    assert of_kind(render(both), "HorizontalPodAutoscaler").keys() == {"eldr", "eldr-epp"}


def test_gateways_speak_http2_to_the_picker() -> None:
    def port(case: str, name: str) -> dict[str, Any]:
        ports = of_kind(render(CASES[case]), "Service")["eldr-epp"]["spec"]["ports"]
        (found,) = (port for port in ports if port["name"] == name)
        return found

    assert (port("picker", "grpc")["port"], port("picker", "http")["port"]) == (9002, 8000)
    assert port("picker", "grpc")["appProtocol"] == "kubernetes.io/h2c"
    assert (port("router and picker", "grpc")["port"], port("router and picker", "http")["port"]) == (9443, 9090)
    assert port("router and picker", "grpc")["appProtocol"] == "http2"  # with TLS


def test_the_pool_is_what_the_picker_picks_from() -> None:
    manifests = render(CASES["picker"])
    (pool,) = of_kind(manifests, "InferencePool").values()
    assert tomllib.loads(toml_of(manifests, "eldr-epp"))["worker"] == [
        f"k8s+http:///inferencepools/{pool['metadata']['name']}"
    ]
    assert pool["spec"]["selector"] == {"matchLabels": {"app": "qwen3"}}
    assert pool["spec"]["targetPorts"] == [{"number": 8000}]
    assert pool["spec"]["endpointPickerRef"]["failureMode"] == "FailClose"
    assert not of_kind(render(CASES["router and picker"]), "InferencePool")


def test_a_picker_has_the_routers_settings_and_secrets_but_for_those_that_mean_nothing_to_it() -> None:
    manifests = render(CASES["router and picker"])
    router, picker = (tomllib.loads(toml_of(manifests, name)) for name in ("eldr", "eldr-epp"))
    without = {"api_key_file", "allowed_origins", "retries", "processes", "otel_endpoint", "prefill"}
    assert without <= router.keys()
    assert picker.keys() == router.keys() - without | {"grpc_listen"}
    assert {key for key in picker.keys() & router.keys() if picker[key] != router[key]} == {
        "port", "policy", "grace_s", "worker_costs"
    }  # fmt: skip
    deployments = of_kind(manifests, "Deployment")
    mounted = [{volume["name"] for volume in pod_of(deployments[name])["volumes"]} for name in ("eldr", "eldr-epp")]
    assert mounted[0] - mounted[1] == {"api-keys"}
    assert mounted[1] <= mounted[0]
    monitors = of_kind(manifests, "ServiceMonitor")
    assert "authorization" not in monitors["eldr-epp"]["spec"]["endpoints"][0]
    assert deployments["eldr-epp"]["spec"]["replicas"] == 3
    assert "replicas" not in deployments["eldr"]["spec"]  # the autoscaler's


def test_pickers_are_reached_by_the_gateway_and_reach_what_they_need() -> None:
    manifests = render(CASES["router and picker"])
    policies = of_kind(manifests, "NetworkPolicy")
    pods = {workload["metadata"]["name"]: labels_of(workload) for workload in workloads(manifests)}
    for port in ("grpc", "http"):
        assert peers_of(policies["eldr-epp"], "ingress", port) == EVERYTHING["networkPolicy"]["from"]
    assert policies["eldr-epp"]["spec"]["egress"] == policies["eldr"]["spec"]["egress"]
    sources = [peer["podSelector"]["matchLabels"] for peer in peers_of(policies["eldr-nats"], "ingress", "client")]
    for name in ("eldr", "eldr-epp"):
        assert any(selects(source, pods[name]) for source in sources)


@on_uvloop
async def test_probes_ask_what_the_picker_answers() -> None:
    probes = probes_of(of_kind(render(CASES["picker"]), "Deployment")["eldr-epp"])
    paths = {probe["httpGet"]["path"] for _, probe in probes}
    assert paths == {"/health", "/ready"}
    async with running(kind=PickerConfig) as s:
        for path in paths:
            assert (await s.get(path)).status == 200


def test_alerts_and_dashboard_are_those_of_the_repository() -> None:
    manifests = render(EVERYTHING)
    dashboards = ROOT / "dashboards"
    assert of_kind(manifests, "PrometheusRule")["eldr"]["spec"] == yaml.safe_load(
        (dashboards / "alerts.yml").read_text()
    )
    found = of_kind(manifests, "ConfigMap")["eldr-dashboard"]
    assert found["data"]["eldr.json"].strip() == (dashboards / "eldr.json").read_text().strip()
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_nats_takes_its_configuration(tmp_path: Path) -> None:
    if NATS is None:
        pytest.skip("no nats-server")
    manifests = render({**IMAGE, "nats": {"replicas": 3}})
    text = of_kind(manifests, "ConfigMap")["eldr-nats"]["data"]["nats.conf"]
    path = tmp_path / "nats.conf"
    path.write_text(text)
    done = subprocess.run([NATS, "-t", "-c", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    # Each pod of the set is a route, under the name that a headless service gives it.
    stateful = of_kind(manifests, "StatefulSet")["eldr-nats"]["spec"]
    assert of_kind(manifests, "Service")[stateful["serviceName"]]["spec"]["clusterIP"] == "None"
    names = re.findall(r"nats://([^:]+):6222", text)
    assert names == [f"eldr-nats-{i}.{stateful['serviceName']}" for i in range(stateful["replicas"])]
