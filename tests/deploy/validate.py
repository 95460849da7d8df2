"""Checks manifests against the published schemas: Kubernetes' own, strictly, the Prometheus Operator's, and GAIE's.

Run: .envs/helm/bin/python tests/deploy/validate.py VERSION < manifests.yaml, with VERSION such as 1.27. Writes a line
for each fault, and exits with 1 if there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import yaml


def record(*required: str, **properties: object) -> dict[str, object]:
    return {"type": "object", "required": required, "additionalProperties": False, "properties": properties}


# What GAIE's definition of inference.networking.k8s.io/v1 says of an InferencePool's spec. No package has it.
NAME, LABEL = {"type": "string", "minLength": 1, "maxLength": 253}, {"type": "string", "maxLength": 63}
PORT = record("number", number={"type": "integer", "minimum": 1, "maximum": 65535})
INFERENCE_POOL = record(
    "selector",
    "targetPorts",
    "endpointPickerRef",
    selector=record("matchLabels", matchLabels={"type": "object", "additionalProperties": LABEL}),
    targetPorts={"type": "array", "minItems": 1, "maxItems": 8, "uniqueItems": True, "items": PORT},
    appProtocol={"enum": ["http", "kubernetes.io/h2c"]},
    endpointPickerRef=record(
        "name",
        "port",  # a Service's
        group={"type": "string"},
        kind=NAME,
        name=NAME,
        port=PORT,
        failureMode={"enum": ["FailOpen", "FailClose"]},
    ),
)


def faults(manifest: dict[str, Any], version: str) -> Iterator[str]:
    if manifest["apiVersion"].startswith("monitoring.coreos.com/"):
        yield from operator_faults(manifest)
        return
    if manifest["apiVersion"] == "inference.networking.k8s.io/v1":
        for error in jsonschema.Draft202012Validator(INFERENCE_POOL).iter_errors(manifest["spec"]):
            yield f"{error.json_path}: {error.message}"
        return
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(str(part) for part in error.path)}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        yield error.message


def operator_faults(manifest: dict[str, Any]) -> Iterator[str]:
    from cloudcoil.models.prometheus_operator import v1

    try:
        model = getattr(v1, manifest["kind"]).model_validate(manifest)
    except ValueError as error:
        yield str(error)
        return
    # The models pass over fields that they do not know. What they say of themselves lacks these.
    if model.model_dump(mode="json", by_alias=True, exclude_unset=True) != manifest:
        yield "it has fields that the model does not know"


def main() -> int:
    found = 0
    for manifest in filter(None, yaml.safe_load_all(sys.stdin)):
        for fault in faults(manifest, sys.argv[1]):
            print(f"{manifest['kind']}/{manifest['metadata']['name']}: {fault}")
            found = 1
    return found


if __name__ == "__main__":
    sys.exit(main())
