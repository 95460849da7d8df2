"""Unpacks the demo's model, a small trained Mixture-of-Experts language model over bytes.

It is a Qwen3-MoE in Hugging Face's format, which stock vLLM loads, and is installed as a distribution of its own
(models/small-moe). docs/model.md describes its training data, and how its experts follow the kind of text. training/
holds the scripts that made it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from eldr.errors import EldrError

# The files that vLLM needs. provenance.json and NOTICE.md are for people.
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_FILES = (CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json")


class ModelMissingError(EldrError):
    """The model is not installed."""


def write_model(folder: Path) -> None:
    """Copy the model to `folder`. Raises ModelMissingError if it is not installed."""
    try:
        import eldr_small_moe
    except ModuleNotFoundError:
        raise ModelMissingError(
            "the demo's model is not installed: install eldr[demo], or models/small-moe from a checkout of eldr"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        shutil.copyfile(eldr_small_moe.folder() / name, folder / name)
