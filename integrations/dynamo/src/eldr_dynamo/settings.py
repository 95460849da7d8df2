"""The settings of the component: where it stands in a Dynamo deployment, and how the router of eldr places requests."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eldr.router.config.groups import LOG_LEVELS, PlacementSettings
from eldr.settings import SettingError, group, setting, text

ENDPOINT = re.compile(r"(?:dyn://)?([A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+)")


def _endpoint(key: str, value: Any) -> str:
    match = ENDPOINT.fullmatch(text(key, value))
    if match is None:
        raise SettingError(f"{key} is {value!r}, expected NAMESPACE.COMPONENT.ENDPOINT")
    return match[1]


@dataclass(kw_only=True)
class DynamoSettings:
    """Where the component stands between Dynamo's frontend and its workers."""

    model_path: str = setting(
        "", "the model as the workers name it: a folder or a name on Hugging Face, whose tokenizer the frontend reads",
        flag=True, metavar="MODEL", shown="required",
    )  # fmt: skip
    served_model_name: str | None = setting(
        None, "name by which clients ask for the model", flag=True, metavar="NAME", shown="the model's"
    )
    namespace: str = setting(
        "eldr", "Dynamo namespace that the frontend looks into. The workers must be in another", flag=True,
        metavar="NAME",
    )  # fmt: skip
    prefill_endpoint: str = setting(
        "dynamo.prefill.generate", "endpoint of the prefill workers", parse=_endpoint, flag=True,
        metavar="NAMESPACE.COMPONENT.ENDPOINT",
    )  # fmt: skip
    decode_endpoint: str = setting(
        "dynamo.backend.generate", "endpoint of the decode workers", parse=_endpoint, flag=True,
        metavar="NAMESPACE.COMPONENT.ENDPOINT",
    )  # fmt: skip
    decision_log: Path | None = setting(
        None, "file to append every decision to, for `eldr decisions`", flag=True, metavar="FILE"
    )
    log_level: str = setting("warning", "least severe messages of eldr to log", choices=LOG_LEVELS, flag=True)

    def __post_init__(self) -> None:
        if not self.model_path:
            raise SettingError("model_path is missing: give the model that the workers serve as --model-path")
        for endpoint in (self.prefill_endpoint, self.decode_endpoint):
            if endpoint.partition(".")[0] == self.namespace:
                raise SettingError(
                    f"the workers' endpoint {endpoint} is in the namespace of the component, {self.namespace}: a "
                    "frontend would find the workers beside it; start them with another DYN_NAMESPACE"
                )

    @property
    def model_name(self) -> str:
        return self.served_model_name or self.model_path


@dataclass
class ComponentConfig:
    """All settings of the component."""

    dynamo: DynamoSettings = group("Dynamo")
    placement: PlacementSettings = group("Placement")
