"""Numbers and booleans as vLLM reads them: pydantic takes "5" and 5.0 for 5, and "yes" for true."""

from __future__ import annotations

import math

from eldr.kernels import JsonValue

TRUE = frozenset(("1", "on", "t", "true", "y", "yes"))
FALSE = frozenset(("0", "off", "f", "false", "n", "no"))


def whole_number(value: JsonValue) -> int | None:
    """The integer that a value stands for. None if it stands for none.

    A few strings are taken that pydantic does not take, because a worker judges them anyway.
    """
    if isinstance(value, int):  # a boolean is one
        return int(value)
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            pass
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, float) and math.isfinite(value) and value == math.floor(value):
        return int(value)
    return None


def boolean(value: JsonValue) -> bool | None:
    """The boolean that a value stands for. None if it stands for none."""
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return value == 1 if value == 0 or value == 1 else None
    if isinstance(value, str):
        return True if value.lower() in TRUE else False if value.lower() in FALSE else None
    return None


def is_true(value: JsonValue) -> bool:
    """Whether Python takes a value for true, as vLLM's own checks do before pydantic reads it."""
    return bool(value) and not (isinstance(value, bytes) and not value[1:-1].strip())
