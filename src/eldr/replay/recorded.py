"""Reads the published files of production traces, entry by entry."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from eldr.replay.errors import ReplayError

MAX_FILE_BYTES = 2**28
# The suffix of a file whose entries are rows by column. Those of any other file are lines.
ROWS = ".csv"

Entry = TypeVar("Entry")


def read_entries(
    path: Path, what: str, entry: str, parsers: Mapping[str, Callable[[Any], Entry]], expected: str = ""
) -> list[Entry]:
    """Read every entry of a file.

    what, entry: what the file and one entry of it are called in errors.
    parsers: by suffix, what parses an entry. That of the empty suffix parses the lines of all other files.
    expected: for an error, which files there are parsers for.
    Raises ReplayError with the file and the entry.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ReplayError(f"{what} {path}: larger than {MAX_FILE_BYTES} bytes")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ReplayError(f"{what} {path}: {getattr(error, 'strerror', None) or error}") from None
    parse = parsers.get(path.suffix) or parsers.get("")
    if parse is None:
        raise ReplayError(f"{what} {path}: expected {expected}")
    entries: list[Any] = list(csv.DictReader(lines)) if path.suffix == ROWS else lines
    found: list[Entry] = []
    for each in entries:
        try:
            found.append(parse(each))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ReplayError(f"{what} {path}, entry {len(found) + 1}: not {entry} ({error})") from None
    return found
