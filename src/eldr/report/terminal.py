"""What every table for the terminal needs."""

from __future__ import annotations


def printable(text: str) -> str:
    """Remove the control characters that could steer a terminal from text that comes from a file."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
