"""The demo's model: a small trained Mixture-of-Experts language model over bytes, shipped with the package.

It is a Qwen3-MoE in Hugging Face form, which stock vLLM loads. docs/model.md says what it was trained on and how its
experts follow the kind of text; training/ holds the scripts that made it.
"""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path

MODEL = files("eldr.demo") / "small_moe"
# What vLLM needs of it; provenance.json and NOTICE.md are for people.
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def write_model(folder: Path) -> None:
    """Copy the model to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        with as_file(MODEL / name) as path:
            shutil.copyfile(path, folder / name)
