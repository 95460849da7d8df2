"""Writes deploy/manifests: what the chart renders, for those who do not use Helm.

Run: .envs/helm/bin/python tools/manifests.py [FOLDER], which `make manifests` does. Each folder there has the values
that it is rendered with, on top of those of `base`, and a kustomization.yaml that is written by hand. Objects that
`base` has are in no other folder.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy" / "helm" / "eldr"
MANIFESTS = ROOT / "deploy" / "manifests"
HELM = Path(sys.prefix) / "bin" / "helm"
# Helm's own labels say nothing where there is no Helm.
OF_HELM = ("app.kubernetes.io/managed-by:", "helm.sh/chart:")


def rendered(values: Path) -> Iterator[tuple[str, str]]:
    """The name of a file for each object of the chart, and its text."""
    command: list[str | Path] = [
        HELM,
        "template",
        "eldr",
        CHART,
        "--values",
        MANIFESTS / "base" / "values.yaml",
        "--values",
        values,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    for document in done.stdout.removeprefix("---\n").split("\n---\n"):
        lines = [line for line in document.splitlines() if not line.startswith("# Source: ")]
        text = "\n".join(line for line in lines if not line.lstrip().startswith(OF_HELM)).strip() + "\n"
        manifest: dict[str, Any] = yaml.safe_load(text)
        yield f"{manifest['kind'].lower()}-{manifest['metadata']['name']}.yaml", text


def main() -> int:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else MANIFESTS
    base = dict(rendered(MANIFESTS / "base" / "values.yaml"))
    for values in MANIFESTS.glob("*/values.yaml"):
        folder = out / values.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*-*.yaml"):
            old.unlink()
        for name, text in rendered(values):
            if folder.name == "base" or name not in base:
                (folder / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
