"""The build backend of setuptools, with the requirements of a build with ELDR_COMPILE=1."""

from __future__ import annotations

import os
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# mypyc compiles what the types say, those of the libraries among them.
TO_COMPILE = ["mypy>=2.4,<3", "httptools>=0.6.4", "orjson>=3.10", "prometheus-client>=0.21"]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return TO_COMPILE if os.environ.get("ELDR_COMPILE") == "1" else []


get_requires_for_build_editable = get_requires_for_build_wheel


def build_sdist(sdist_directory: str, config_settings: dict[str, Any] | None = None) -> str:
    """Sources alone: with ELDR_COMPILE=1 the C that mypyc writes would be among them."""
    os.environ.pop("ELDR_COMPILE", None)
    return build_meta.build_sdist(sdist_directory, config_settings)
