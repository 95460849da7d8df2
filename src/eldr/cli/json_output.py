"""The results of a command as JSON, in a file or on standard output."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from eldr.errors import EldrError


def write_json(
    target: str | None, value: object, what: str, failure: type[EldrError], *, indent: int | None = 2
) -> None:
    """Write `value` to the file `target`, or to standard output if it is "-". None writes nothing.

    indent: as of `json.dumps`. None writes one line.

    Raises `failure`, which names the file and `what` could not be written.
    """
    from eldr.fileio import write_atomically

    if target is None:
        return
    text = json.dumps(value, indent=indent, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        write_atomically(Path(target), lambda file: file.write(text.encode()))
    except OSError as error:
        raise failure(f"{target}: the {what} cannot be written: {error.strerror or error}") from None
