"""Marks for mypyc, which may compile what they stand on (setup.py). Where it is not installed they mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr as mypyc_attr
else:

    def mypyc_attr(**_: Any) -> Callable[[type], type]:
        """Leaves a class as it is."""
        return lambda decorated: decorated
