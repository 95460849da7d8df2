"""Put the trained model into its package, with a note of where it comes from.

    python training/ship.py --data build/training

copies build/training/model to models/small-moe/src/eldr_small_moe and writes provenance.json (for programs) and
NOTICE.md (for people) beside it, from what corpus.py and train.py noted down.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
from network import Geometry, SmallMoe

PACKAGE = Path(__file__).parents[1] / "models/small-moe/src/eldr_small_moe"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/training"))
    args = parser.parse_args()
    text = json.loads((args.data / "corpus.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (args.data / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    training = log[-1]
    # A run that was stopped and continued with another number of steps changed its learning rate on the way.
    training["steps_by_plan"] = {str(entry["planned_steps"]): entry["steps"] for entry in log}
    PACKAGE.mkdir(parents=True, exist_ok=True)
    for path in (args.data / "model").iterdir():
        shutil.copyfile(path, PACKAGE / path.name)
    provenance = {
        "weights": {
            "file": "model.safetensors",
            "sha256": hashlib.sha256((PACKAGE / "model.safetensors").read_bytes()).hexdigest(),
            "parameters": sum(parameter.numel() for parameter in SmallMoe(Geometry()).parameters()),
            "licence": "Apache-2.0",
        },
        "training": training | {"torch": torch.__version__, "python": platform.python_version()},
        "text": text,
    }
    dump = json.dumps(provenance, indent=1, ensure_ascii=False)
    (PACKAGE / "provenance.json").write_text(dump + "\n", encoding="utf-8")
    (PACKAGE / "NOTICE.md").write_text(notice(provenance), encoding="utf-8")
    print(f"{PACKAGE}: {provenance['weights']['sha256']}")


def notice(provenance: dict[str, Any]) -> str:
    training, text = provenance["training"], provenance["text"]
    millions = provenance["weights"]["parameters"] / 1e6
    kinds = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in text["training_bytes"].items())
    rows = [
        f"| {package['package']} {package['version']} | {package['licence']} | {', '.join(sorted(package['bytes']))} |"
        for package in text["packages"]
    ]
    return "\n".join(
        [
            "# eldr's small trained model",
            "",
            f"A byte-level Qwen3-MoE of {millions:.1f} million parameters, trained from scratch by `training/train.py`",
            f"for {training['steps']} steps. The weights are licensed under Apache-2.0, like the rest of eldr.",
            "They serve the demo and the tests: the model writes text that looks like its kind, and knows nothing.",
            "",
            f"Training text: {kinds}.",
            "It comes from templates written for eldr (`training/written.py`) and from these packages:",
            "",
            "| package | licence | kinds |",
            "|---|---|---|",
            *rows,
            "",
            "provenance.json has the SHA-256 of every file and of the weights, and the losses.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
