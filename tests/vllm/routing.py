"""Two independent observers of a model's routing, for models that do not fit `Reference`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.vllm.engine import Engine


class HookedReference:
    """What the layers of a plain transformers forward pass in float32 hand to their experts."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._seen: dict[str, NDArray[np.int64]] = {}
        for name, module in model.named_modules():
            # vLLM's Transformers backend decorates the classes of the model, and so this object as well.
            module.do_not_compile = True
            kind = type(module).__name__
            if kind == "Llama4Router":
                module.register_forward_hook(lambda _, __, out, name=name: self._note(name, out[1].topk(1)[1]))
            elif kind.endswith("Experts"):
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: self._find_ids(name, (*args, *kwargs.values())), with_kwargs=True
                )

    def _find_ids(self, name: str, arguments: Sequence[Any]) -> None:
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and not argument.dtype.is_floating_point:
                self._note(name, argument)

    def _note(self, name: str, ids: torch.Tensor) -> None:
        assert name not in self._seen
        self._seen[name] = ids.view(-1, ids.shape[-1]).numpy().copy()

    @cache  # noqa: B019 (lives as long as the test)
    def _forward(self, tokens: tuple[int, ...]) -> tuple[NDArray[np.int64], int]:
        self._seen.clear()
        with torch.no_grad():
            out = self._model(input_ids=torch.tensor([tokens]), use_cache=False)
        return np.stack(list(self._seen.values()), axis=1), int(out.logits[0, -1].argmax())

    def routing(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        """Experts [T, L, k] of every token."""
        return self._forward(tuple(tokens))[0]

    def next_token(self, tokens: Sequence[int]) -> int:
        """The likeliest token after `tokens`."""
        return self._forward(tuple(tokens))[1]


class GateReference:
    """The largest router logits of the layers inside vLLM, for models that vLLM runs in bfloat16 only.

    Another implementation would choose other experts on near ties. Prompts must run one at a time.
    """

    def __init__(self, engine: Engine, top_k: int) -> None:
        self._steps: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
        self._rows: dict[tuple[int, ...], NDArray[np.int64]] = {}
        self._top_k = top_k
        engine.llm.apply_model(self._observe)

    def _observe(self, model: torch.nn.Module) -> None:
        for name, module in model.named_modules():
            if name.endswith(".mlp.gate"):
                module.register_forward_hook(lambda _, __, out, name=name: self._note(name, out[0]))

    def _note(self, layer: str, logits: torch.Tensor) -> None:
        self._steps[layer].append(logits.topk(self._top_k, dim=-1).indices.numpy().copy())

    def forget(self) -> None:
        """Forget what ran before the next prompt."""
        self._steps.clear()

    def learn(self, tokens: Sequence[int], cached_tokens: int) -> None:
        """The steps since `forget` computed the forward passes of `tokens` but the first `cached_tokens`."""
        rows = np.stack([np.concatenate(steps) for steps in self._steps.values()], axis=1)
        assert len(rows) == len(tokens) - cached_tokens
        for row, end in zip(rows, range(cached_tokens + 1, len(tokens) + 1), strict=True):
            self._rows[tuple(tokens[:end])] = row

    def routing(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        """Experts [T, L, k] of every token, as computed when its block was filled."""
        return np.stack([self._rows[tuple(tokens[: end + 1])] for end in range(len(tokens))])
