"""Check the distributions: complete, with nothing else in them, and the same from the sdist as from the tree.

    python tests/distributions/check.py TREE BUILT

TREE: the sources. BUILT: the sdist of eldr and the wheel built from it; BUILT/of-tree: the wheel built from the tree;
BUILT/model: the sdist and the wheel of the model; BUILT/dynamo: those of the component for Dynamo. `make dist` builds
all of them and runs this.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

# The wheel is part of every vLLM environment.
MOST_WHEEL_BYTES = 2_000_000
FOR_THE_BUILD = {
    "setup.py",
    "build_backend/eldr_build.py",
    "build_backend/compiled_modules.txt",
    "src/eldr/kernels/_compiled.pyx",
    "src/eldr/kernels/loops.h",
}


def only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder}: there must be one {pattern}, not {len(found)}")
    return found[0]


def of_wheel(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


def of_sdist(path: Path) -> set[str]:
    with tarfile.open(path) as sdist:
        return {name.partition("/")[2] for name in sdist.getnames()}


def below(folder: Path, pattern: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob(pattern)}


def compiled(names: set[str]) -> set[str]:
    return {name for name in names if name.endswith((".so", ".c", ".o", ".pyc"))}


def check(tree: Path, built: Path) -> list[str]:
    """One line for each fault."""
    wheel_path = only(built, "*.whl")
    wheel, of_tree = of_wheel(wheel_path), of_wheel(only(built / "of-tree", "*.whl"))
    sdist = of_sdist(only(built, "*.tar.gz"))
    model_wheel, model_sdist = of_wheel(only(built / "model", "*.whl")), of_sdist(only(built / "model", "*.tar.gz"))
    kernels = {name for name in wheel if name.startswith("eldr/kernels/_compiled.") and name.endswith(".so")}
    needed = below(tree / "src", "*.py") | below(tree / "src", "*.typed") | below(tree / "src", "*.html")
    model = {name for name in below(tree / "models/small-moe/src", "*.*") if ".egg-info" not in name}
    component_wheel = of_wheel(only(built / "dynamo", "*.whl"))
    component_sdist = of_sdist(only(built / "dynamo", "*.tar.gz"))
    component_source = tree / "integrations/dynamo/src"
    component = below(component_source, "*.py") | below(component_source, "*.typed")
    faults = {
        "missing from the wheel": needed - wheel.keys(),
        "of no use in the wheel": {
            name for name in wheel if name.endswith((".pyx", ".h", ".safetensors")) or not name.startswith("eldr")
        },
        "compiled besides the kernels": compiled(set(wheel)) - kernels,
        "missing from the sdist": (FOR_THE_BUILD | {f"src/{name}" for name in needed}) - sdist,
        "no source, yet in the sdist": compiled(sdist) | {name for name in sdist if "small_moe" in name},
        "in one wheel only, from the sdist or from the tree": wheel.keys() ^ of_tree.keys(),
        "different in the two wheels": {name for name in wheel.keys() & of_tree.keys() if wheel[name] != of_tree[name]},
        "missing from the model's wheel": model - model_wheel.keys(),
        "missing from the model's sdist": {f"src/{name}" for name in model} - model_sdist,
        "missing from the component's wheel": component - component_wheel.keys(),
        "missing from the component's sdist": {f"src/{name}" for name in component} - component_sdist,
    }
    found = [f"{what}: {', '.join(sorted(names))}" for what, names in faults.items() if names]
    if not kernels:
        found.append("the wheel has no compiled kernels")
    if wheel_path.stat().st_size > MOST_WHEEL_BYTES:
        found.append(f"the wheel takes {wheel_path.stat().st_size} bytes, more than {MOST_WHEEL_BYTES}")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    faults = check(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join(faults) or "the distributions are complete")
    sys.exit(1 if faults else 0)
