"""What Kubernetes says of pods and InferencePools, as far as it says which workers there are.

It comes from another machine, so nothing about its form is taken for granted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from eldr.router.config.kubernetes import LABELLED, KubernetesAddress


@dataclass(frozen=True, slots=True)
class Pool:
    """An InferencePool: the label selector of its pods, and the numbers of their ports."""

    selector: str
    ports: tuple[str, ...]


def member(value: Any, *path: str) -> Any:
    """What stands at the end of a path of keys. None if anything on the way is missing or no object."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def pod_urls(pod: Any, address: KubernetesAddress, ports: tuple[str, ...]) -> frozenset[str] | None:
    """The URLs of a pod's workers. Empty if it has none of the ports, None if it shall get no requests.

    A pod gets requests while it is ready and not about to end (Kubernetes API, v1.PodStatus: `Running` and the
    condition `Ready`). Every other one is left out, as Services leave it out.
    """
    ready = any(
        member(condition, "type") == "Ready" and member(condition, "status") == "True"
        for condition in _objects(member(pod, "status", "conditions"))
    )
    if not ready or member(pod, "status", "phase") != "Running" or member(pod, "metadata", "deletionTimestamp"):
        return None
    host = str(member(pod, "status", "podIP"))
    try:
        ip_address(host)
    except ValueError:
        return None
    if "%" in host:  # an IPv6 zone means something on the pod's own node only
        return None
    numbers = [_port(pod, port) for port in ports]
    return frozenset().union(*(address.worker_urls(host, number) for number in numbers if number is not None))


def _port(pod: Any, port: str) -> int | None:
    """The number of a port. A pod need not declare a port that is given by number."""
    if port.isdecimal():
        return int(port)
    for kind in ("containers", "initContainers"):  # sidecars are among the latter
        for container in _objects(member(pod, "spec", kind)):
            for declared in _objects(member(container, "ports")):
                if member(declared, "name") == port:
                    return _number(member(declared, "containerPort"))
    return None


def pool_of(found: Any) -> Pool | None:
    """Read an InferencePool of inference.networking.k8s.io/v1. None if it selects nothing that could be followed."""
    labels = member(found, "spec", "selector", "matchLabels")
    wanted = [f"{key}={value}" for key, value in sorted(labels.items())] if isinstance(labels, Mapping) else []
    numbers = [_number(member(port, "number")) for port in _objects(member(found, "spec", "targetPorts"))]
    ports = tuple(dict.fromkeys(str(number) for number in numbers if number is not None))
    sound = wanted and ports and all(LABELLED.fullmatch(each) for each in wanted)
    return Pool(",".join(wanted), ports) if sound else None


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 65536 else None


def _objects(value: Any) -> Iterator[Mapping[str, Any]]:
    return (each for each in value if isinstance(each, Mapping)) if isinstance(value, list) else iter(())
