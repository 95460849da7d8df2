"""Make the training text: read the packages of sources.toml, add the text of written.py, hold some out.

    python training/corpus.py --packages build/training/packages --out build/training

writes corpus.npz (kind -> bytes, training), heldout.npz (the same, never trained on) and corpus.json (what came from
where: package, version, licence, SHA-256, bytes).
"""

from __future__ import annotations

import argparse
import ast
import gettext
import hashlib
import io
import json
import random
import re
import tarfile
import tomllib
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from written import WRITERS, write_text

from eldr.demo.prompts import make_prompts

SOURCES = Path(__file__).with_name("sources.toml")
END_OF_TEXT = 257  # separates documents
SEED = 0
# Of each kind at most this much from packages, and this much written by templates: less of the languages, whose few
# templates would be learnt by heart.
PACKAGE_BYTES = 3_000_000
WRITTEN_BYTES = {"mathematics": 800_000, "medicine": 800_000, "law": 800_000}
WRITTEN_LANGUAGE_BYTES = 200_000
HELD_OUT_EVERY = 20  # one document in so many
SHORTEST_DOCUMENT = 200
LEAKED_BYTES = 64  # a stretch of a demo prompt this long may not be in the training text
_CATALOGUE = re.compile(r"/([A-Za-z_]+)/LC_MESSAGES/[^/]+\.mo$")
_DISCLAIMER = re.compile(r"Disclaimer:.*?Data Types\.\s*", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=Path("build/training/packages"))
    parser.add_argument("--out", type=Path, default=Path("build/training"))
    parser.add_argument("--list", action="store_true", help="only print the packages to fetch from PyPI")
    args = parser.parse_args()
    sources = tomllib.loads(SOURCES.read_text(encoding="utf-8"))
    if args.list:
        print(
            *(f"{package['name']}=={package['version']}" for package in sources["package"] if "licences" not in package)
        )
        return
    documents: dict[str, list[str]] = defaultdict(list)
    provenance: list[dict[str, Any]] = []
    for package in sources["package"]:
        archive = find_archive(args.packages, package["name"], package["version"])
        found = read_package(archive, package, sources["languages"])
        for kind, texts in found.items():
            documents[kind] += texts
        provenance.append(
            {
                "package": package["name"],
                "version": package["version"],
                "licence": package["licence"],
                "file": archive.name,
                "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
                "bytes": {kind: sum(len(text.encode()) for text in texts) for kind, texts in found.items()},
            }
        )
    train, held_out = split(documents)
    refuse_leaks(train)
    args.out.mkdir(parents=True, exist_ok=True)
    save(args.out / "corpus.npz", train)
    save(args.out / "heldout.npz", held_out)
    note = {
        "packages": provenance,
        "written": "training/written.py, Apache-2.0",
        "training_bytes": {kind: len(stream) for kind, stream in train.items()},
        "heldout_bytes": {kind: len(stream) for kind, stream in held_out.items()},
    }
    (args.out / "corpus.json").write_text(json.dumps(note, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for kind, stream in train.items():
        print(f"{kind:12} {len(stream) / 1e6:6.2f} MB for training, {len(held_out[kind]) / 1e3:6.0f} kB held out")


def find_archive(folder: Path, name: str, version: str) -> Path:
    """The one archive of a package in `folder`, whatever its punctuation and platform tags."""
    wanted = re.compile(f"{re.sub('[-_.]', '[-_.]', name)}-{re.escape(version)}[-.]", re.IGNORECASE)
    found = [path for path in sorted(folder.iterdir()) if wanted.match(path.name)]
    if len(found) != 1:
        raise SystemExit(
            f"{folder}: {len(found)} archives of {name} {version}; fetch the packages first, see README.md"
        )
    return found[0]


def read_package(archive: Path, package: dict[str, Any], languages: dict[str, list[str]]) -> dict[str, list[str]]:
    """kind -> documents of one package."""
    if "licences" in package:
        return {package["licences"]: list(read_licences(archive))}
    found: dict[str, list[str]] = defaultdict(list)
    with zipfile.ZipFile(archive) as files:
        for name in sorted(files.namelist()):
            catalogue = _CATALOGUE.search(name)
            if catalogue and package.get("catalogue"):
                for kind, locales in languages.items():
                    if catalogue[1] in locales:
                        found[kind].append(catalogue_text(files.read(name)))
            elif name.endswith(".py") and not re.search("tests?/|migrations/|locale/", name):
                source = files.read(name).decode()
                if "python" in package:
                    found[package["python"]].append(source)
                if "docstrings" in package:
                    found[package["docstrings"]] += docstrings(source)
                if "descriptions" in package:
                    found[package["descriptions"]].append(descriptions(source))
    return found


def read_licences(archive: Path) -> Iterator[str]:
    with tarfile.open(archive) as files:
        for member in sorted(files.getmembers(), key=lambda member: member.name):
            if member.name.startswith("package/licenses/"):
                content = files.extractfile(member)
                assert content is not None
                yield json.load(content)["licenseText"]


def catalogue_text(content: bytes) -> str:
    """The translations of a compiled catalogue, one a line, none twice."""
    catalogue = gettext.GNUTranslations(io.BytesIO(content))._catalog  # type: ignore[attr-defined]
    texts = dict.fromkeys(text.strip() for source, text in catalogue.items() if source)
    return "\n".join(text for text in texts if text)


def docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def descriptions(source: str) -> str:
    """What a module of field definitions says: docstrings of classes and descriptions of fields, none twice."""
    texts: dict[str, None] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            texts[_DISCLAIMER.sub("", ast.get_docstring(node) or "")] = None
        elif isinstance(node, ast.keyword) and node.arg == "description" and isinstance(node.value, ast.Constant):
            texts[str(node.value.value)] = None
    return "\n".join(text for text in texts if text)


def split(documents: dict[str, list[str]]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """kind -> tokens for training, and held out. Long documents are cut, so that both get parts of large files."""
    train, held_out = {}, {}
    for kind in sorted({*documents, *WRITERS}):
        rng = random.Random(f"{kind} {SEED}")
        pieces = [piece for text in documents.get(kind, []) for piece in cut(text)]
        rng.shuffle(pieces)
        total, kept = 0, []
        for piece in pieces:
            total += len(piece.encode())
            if total > PACKAGE_BYTES:
                break
            kept.append(piece)
        for_test, for_train = kept[::HELD_OUT_EVERY], [p for n, p in enumerate(kept) if n % HELD_OUT_EVERY]
        if kind in WRITERS:
            written = WRITTEN_BYTES.get(kind, WRITTEN_LANGUAGE_BYTES)
            for_train += cut(write_text(kind, written, SEED))
            for_test += cut(write_text(kind, written // HELD_OUT_EVERY, SEED + 1))
        rng.shuffle(for_train)
        train[kind], held_out[kind] = stream(for_train), stream(for_test)
    return train, held_out


def cut(text: str, size: int = 4000) -> list[str]:
    """Pieces of about `size` characters that end where a line ends; too short texts are left out."""
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= size:
            pieces.append(piece)
            piece = ""
    return [piece for piece in (*pieces, piece) if len(piece.encode()) >= SHORTEST_DOCUMENT]


def stream(pieces: list[str]) -> np.ndarray:
    """uint16: the bytes of all pieces, END_OF_TEXT after each."""
    parts = [np.append(np.frombuffer(piece.encode(), np.uint8).astype(np.uint16), END_OF_TEXT) for piece in pieces]
    return np.concatenate(parts).astype(np.uint16)


def refuse_leaks(train: dict[str, np.ndarray]) -> None:
    """Exit if a long stretch of a demo prompt is in the training text."""
    known: dict[int, None] = {}
    prompts = [prompt.text.encode() for prompt in make_prompts(1000, seed=0)]
    stretches = {text[i : i + LEAKED_BYTES] for text in prompts for i in range(len(text) - LEAKED_BYTES + 1)}
    known = {hash(stretch): None for stretch in stretches}
    for kind, tokens in train.items():
        content = tokens.astype(np.uint8).tobytes()
        for i in range(len(content) - LEAKED_BYTES + 1):
            if hash(content[i : i + LEAKED_BYTES]) in known and content[i : i + LEAKED_BYTES] in stretches:
                raise SystemExit(f"{kind}: the training text holds {content[i : i + LEAKED_BYTES]!r} of a demo prompt")


def save(path: Path, streams: dict[str, np.ndarray]) -> None:
    np.savez_compressed(path, **streams)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
