"""Fixtures of the router's tests."""

from __future__ import annotations

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
