"""The demo's model: a small trained Mixture-of-Experts language model over bytes, a distribution of its own.

It is a Qwen3-MoE in Hugging Face form, which stock vLLM loads. docs/model.md says what it was trained on and how its
experts follow the kind of text; training/ holds the scripts that made it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from eldr.errors import EldrError

# What vLLM needs of it; provenance.json and NOTICE.md are for people.
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class ModelMissingError(EldrError):
    """The model is not installed."""


def write_model(folder: Path) -> None:
    """Copy the model to `folder`. Raises ModelMissingError where it is not installed."""
    try:
        import eldr_small_moe
    except ModuleNotFoundError:
        raise ModelMissingError(
            "the demo's model is not installed: install eldr[demo], or models/small-moe of a checkout of eldr"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        shutil.copyfile(eldr_small_moe.folder() / name, folder / name)
