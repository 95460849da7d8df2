"""A small trained Mixture-of-Experts model in Hugging Face form. NOTICE.md says what it was trained on."""

from __future__ import annotations

from pathlib import Path


def folder() -> Path:
    """Where the model's files are: config.json, model.safetensors, the tokenizer, provenance.json and NOTICE.md."""
    return Path(__file__).parent
