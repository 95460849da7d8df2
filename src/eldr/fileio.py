"""Reads and writes array files safely: atomic when written, fully checked before anything is allocated when read."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

# Arrays of counts and labels compress 5 to 20 times, rarely more. A file that claims to grow beyond this factor is a
# zip bomb. Small files are exempt, because they may consist of zeros.
MAX_GROWTH = 100
ALWAYS_ALLOWED_BYTES = 64 * 2**20


# What zipfile raises, besides BadZipFile, for files that are not archives.
DAMAGE = (
    EOFError, IndexError, KeyError, MemoryError, NotImplementedError, OverflowError, RuntimeError, ValueError,
    struct.error, zlib.error,
)  # fmt: skip


class NpzError(Exception):
    """Raised when a file cannot be read as a set of arrays. The caller adds the file's name and purpose."""


def reason_of(error: NpzError | OSError) -> str:
    """Return what went wrong, without the file's name."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """The requirements on one array in a file.

    dtypes: the dtypes allowed. "U" is text of any width.
    ndim: the number of dimensions.
    optional: whether the array may be missing.
    """

    dtypes: tuple[str, ...]
    ndim: int
    optional: bool = False

    def accepts(self, dtype: np.dtype[Any]) -> bool:
        return dtype.kind in self.dtypes or dtype.newbyteorder("=").str.lstrip("<|=>") in self.dtypes


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically: fill a temporary file next to `path`, sync it to disk, and rename it to `path`.

    write: called with the open temporary file.
    Raises OSError if the folder cannot be written to. `path` then keeps its previous content.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write `arrays` as a compressed .npz, atomically."""

    def write(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)

    write_atomically(path, write)


def read_npz(
    path: Path,
    specs: Mapping[str, ArraySpec],
    check_shapes: Callable[[Mapping[str, tuple[int, ...]]], None],
) -> dict[str, NDArray[Any]]:
    """Read the arrays of an .npz file that `specs` names, in native byte order. Other arrays are ignored.

    Only headers are read until every dtype, dimension and size matches the archive's own table and `check_shapes` has
    accepted the shapes. Nothing is ever unpickled.

    path: the file.
    specs: array name -> requirements.
    check_shapes: called with name -> shape of the arrays present. Raises to reject them.
    Raises NpzError with the reason if the file is not valid, or OSError if it cannot be opened.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                members = _members(archive, specs)
                shapes = {name: _shape(archive, name, member, specs[name]) for name, member in members.items()}
                _check_growth(size, members)
                check_shapes(shapes)
                return {name: _read(archive, name, member) for name, member in members.items()}
        except zipfile.BadZipFile as error:
            raise NpzError(f"not a complete .npz file ({error})") from None
        except DAMAGE as error:
            raise NpzError(f"damaged .npz file ({error or type(error).__name__})") from None


def parse_meta(text: str, expected_format: str) -> dict[str, Any]:
    """Parse the JSON object in a file's `meta` array. Raises NpzError unless its "format" is `expected_format`."""
    meta = _parse(text)
    found = meta.get("format") if isinstance(meta, dict) else None
    if not isinstance(meta, dict) or found != expected_format:
        raise NpzError(f"not an {expected_format} file (its format: {repr(found)[:60]})")
    return meta


def format_of(path: Path) -> str:
    """The format that a file states in its `meta` array. Empty if it states none.

    Raises NpzError with the reason if the file is not valid, or OSError if it cannot be opened.
    """
    meta = _parse(str(read_npz(path, {"meta": ArraySpec(("U",), 0)}, lambda _: None)["meta"]))
    found = meta.get("format") if isinstance(meta, dict) else None
    return found if isinstance(found, str) else ""


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NpzError("meta is not JSON") from None


def _members(archive: zipfile.ZipFile, specs: Mapping[str, ArraySpec]) -> dict[str, zipfile.ZipInfo]:
    found: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name not in specs or name == member.filename:
            continue
        if name in found:
            raise NpzError(f"array {name} appears twice")
        found[name] = member
    missing = [name for name, spec in specs.items() if name not in found and not spec.optional]
    if missing:
        raise NpzError(f"array {missing[0]} is missing")
    return found


def _shape(archive: zipfile.ZipFile, name: str, member: zipfile.ZipInfo, spec: ArraySpec) -> tuple[int, ...]:
    """Return the shape of one member. Raises NpzError unless its header, dtype and size in the archive agree."""
    with archive.open(member) as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read_header(file)
        except zipfile.BadZipFile:
            raise
        except Exception:  # a malformed header can break the parser in many ways
            raise NpzError(f"array {name} has no readable header") from None
        header_bytes = file.tell()
    if dtype.hasobject:
        raise NpzError(f"array {name} holds pickled Python objects, which are never loaded")
    if not spec.accepts(dtype):
        raise NpzError(f"array {name} has dtype {dtype}, expected {' or '.join(spec.dtypes)}")
    if len(shape) != spec.ndim or any(length < 0 for length in shape):
        raise NpzError(f"array {name} has shape {shape}, expected {spec.ndim} dimensions")
    if prod(shape) * dtype.itemsize != member.file_size - header_bytes:
        raise NpzError(f"array {name} declares shape {shape}, which does not fit its {member.file_size} bytes")
    return shape


def _check_growth(size_bytes: int, members: Mapping[str, zipfile.ZipInfo]) -> None:
    total_bytes = sum(member.file_size for member in members.values())
    if total_bytes > max(ALWAYS_ALLOWED_BYTES, MAX_GROWTH * size_bytes):
        raise NpzError(f"{size_bytes} bytes claim to unpack to {total_bytes} bytes")


def _read(archive: zipfile.ZipFile, name: str, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as file:
        try:
            array = np.lib.format.read_array(file, allow_pickle=False)
        except ValueError as error:
            raise NpzError(f"array {name} is damaged ({error})") from None
        if file.read(1):
            raise NpzError(f"array {name} is longer than its shape")
    return np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
