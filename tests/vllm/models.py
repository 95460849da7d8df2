"""Tiny models on disk, each with its reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.vllm.reference import Reference

Models = Callable[[str], "Model"]


class Model:
    """A tiny model on disk and its reference."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reference = Reference(path)
