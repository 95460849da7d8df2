"""Workers as Envoy names them, ip:port, and the endpoints to which Envoy limits a choice."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from ipaddress import IPv6Address
from typing import Final
from urllib.parse import urlsplit

from google.protobuf.struct_pb2 import Value

from eldr.router.config.endpoint import LEGS
from eldr.router.fleet.workers import Fleet
from eldr.router.picker.messages_pb2 import Metadata

# The keys of GAIE's endpoint-picker protocol, version 1.0.
SUBSET_NAMESPACE: Final = "envoy.lb.subset_hint"
SUBSET: Final = "x-gateway-destination-endpoint-subset"
DESTINATION_NAMESPACE: Final = "envoy.lb"
DESTINATION: Final = "x-gateway-destination-endpoint"
SERVED: Final = "x-gateway-destination-endpoint-served"

DEFAULT_PORTS: Final = {"http": 80, "https": 443}
SEPARATORS: Final = re.compile("[, ]+")


def endpoint_of(url: str) -> str:
    """The endpoint ip:port of a worker. The host stays a name if it is one.

    Envoy compares texts, and writes IPv6 addresses as RFC 5952 says.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if ":" in host:
        host = f"[{IPv6Address(host).compressed}]"
    return f"{host}:{parts.port or DEFAULT_PORTS[parts.scheme]}"


def subset_of(metadata: Metadata) -> frozenset[str] | None:
    """The endpoints to which Envoy limits the choice: ip:port, or ip for all its ports. None if it does not."""
    namespace = metadata.filter_metadata.get(SUBSET_NAMESPACE)
    if namespace is None or SUBSET not in namespace.fields:
        return None
    return frozenset(_texts(namespace.fields[SUBSET]))


def served_by(metadata: Metadata) -> str:
    """The endpoint that a gateway says an answer comes from. Empty if it does not say."""
    namespace = metadata.filter_metadata.get(DESTINATION_NAMESPACE)
    if namespace is None or SERVED not in namespace.fields:
        return ""
    return next(iter(_texts(namespace.fields[SERVED])), "")


def urls_in(fleet: Fleet, endpoints: Collection[str]) -> frozenset[str]:
    """The URLs of the workers at these endpoints."""
    urls: set[str] = set()
    for leg in LEGS:
        for url in fleet.workers(leg):
            endpoint = endpoint_of(url)
            host = endpoint.rpartition(":")[0]
            if endpoint in endpoints or host in endpoints or host.strip("[]") in endpoints:
                urls.add(url)
    return frozenset(urls)


def _texts(value: Value) -> Iterable[str]:
    """The texts in a protobuf Value: of a text with commas, or of a list of texts."""
    kind = value.WhichOneof("kind")
    if kind == "string_value":
        texts = [value.string_value]
    elif kind == "list_value":
        texts = [each.string_value for each in value.list_value.values]
    else:
        texts = []
    return (each for text in texts for each in SEPARATORS.split(text) if each)
