"""Fixtures of the router's tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.router.admin import KEY


@pytest.fixture
def admin(tmp_path: Path) -> dict[str, Any]:
    """Settings that turn the admin API on."""
    key = tmp_path / "admin.key"
    key.write_text(KEY + "\n")
    return {"admin_listen": "127.0.0.1:0", "admin_key_file": key}


@pytest.fixture
def collector() -> Iterator[None]:
    """Nothing is collected but by hand, and what is found is kept in gc.garbage."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()
