"""Argument types and helpers that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def count(text: str) -> int:
    """Parse a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def words(text: str) -> tuple[str, ...]:
    """Parse words between commas, of which there is at least one."""
    found = tuple(word.strip() for word in text.split(",") if word.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is an empty list")
    return found


def read_key_file(path: Path | None) -> str | None:
    """Return the key in a one-line file. Raises ConfigError."""
    from eldr.router.config.settings import read_key

    return None if path is None else read_key(path).decode()
