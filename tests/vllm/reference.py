"""The routing of a model by a plain transformers forward pass in float32: what the connector must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM


class Reference:
    """One model. Every answer comes from one uncached forward pass over the whole sequence."""

    def __init__(self, model_dir: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        config = self._model.config
        self.experts = int(getattr(config, "num_local_experts", None) or config.num_experts)
        self.top_k = int(getattr(config, "num_experts_per_tok", None) or config.top_k_experts)
        self.layers = int(config.num_hidden_layers)
        self.hybrid = "sliding_attention" in getattr(config, "layer_types", [])

    @cache  # noqa: B019 (lives as long as the tests)
    def _forward(self, tokens: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        with torch.no_grad():
            out = self._model(torch.tensor([tokens]), output_router_logits=True, use_cache=False)
        assert len(out.router_logits) == self.layers
        chosen = [logits.view(len(tokens), -1).topk(self.top_k, dim=-1).indices for logits in out.router_logits]
        return torch.stack(chosen, dim=1).numpy(), out.logits[0].argmax(-1).numpy()

    def routing(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        """Experts [T, L, k] of every token."""
        return self._forward(tuple(tokens))[0]

    def counts(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        """How many tokens chose each expert: [L, E]."""
        routing = self.routing(tokens)
        return np.stack(
            [np.bincount(routing[:, layer].ravel(), minlength=self.experts) for layer in range(self.layers)]
        )

    def next_tokens(self, tokens: Sequence[int]) -> list[int]:
        """The likeliest next token after each token."""
        return [int(token) for token in self._forward(tuple(tokens))[1]]

    def generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """Greedy decoding."""
        with torch.no_grad():
            out = self._model.generate(
                torch.tensor([list(prompt)]),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                eos_token_id=None,
                use_cache=False,
            )
        return [int(token) for token in out[0, len(prompt) :]]

    def decode_sets(self, prompt: Sequence[int], generated: Sequence[int]) -> list[list[set[int]]]:
        """For the forward pass of each generated token but the last: the experts chosen in each layer."""
        rows = self.routing([*prompt, *generated])[len(prompt) : len(prompt) + len(generated) - 1]
        return [[set(map(int, layer)) for layer in row] for row in rows]
