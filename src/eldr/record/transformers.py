"""Source: a Hugging Face model in this process, without a server.

transformers keeps the experts of a layer in a module of their own, whose forward pass takes the indices of the chosen
ones as an argument, after everything that an architecture does to choose: biases, groups, limits on groups. That is so
in 58 of the 63 files of transformers 5.19 with language models that have experts. A hook reads the argument.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eldr.counts import CountsError
from eldr.record.prompts import Prompt, RecordError
from eldr.record.sources import MoeShape, Sample, Source, sample_of_rows

# The argument's name: of most models, and of gpt-oss and its relatives.
INDICES = ("top_k_index", "router_indices")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class TransformersOptions:
    """How to run the model.

    model: a folder or a name of the Hugging Face hub. Code of the model's own is never run.
    max_tokens: generated tokens per request, at most.
    temperature: the sampling temperature. 0 takes the likeliest token.
    dtype: torch's name for the numbers, such as float32. auto takes the model's own.
    seed: of sampling.
    """

    model: str
    max_tokens: int = 128
    temperature: float = 0.0
    dtype: str = "auto"
    seed: int = 0


class Transformers(Source):
    """A model of transformers, loaded at once. Raises RecordError if its experts cannot be seen."""

    concurrency = 1

    def __init__(self, options: TransformersOptions) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise RecordError(f"{error}; recording in this process needs torch and transformers") from None
        self._torch = torch
        self._options = options
        self.model = Path(options.model).name or options.model
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
            loaded = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise RecordError(f"{options.model} cannot be loaded: {error}") from None
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._network = loaded.eval().to(self._device)
        self._capture = _Capture(self._network)
        torch.manual_seed(options.seed)

    def sample(self, prompt: Prompt) -> Sample:
        options = self._options
        ids = self._ids(prompt)
        sampling: dict[str, Any] = {"do_sample": options.temperature > 0}
        if options.temperature > 0:
            sampling |= {"temperature": options.temperature, "top_k": 0, "top_p": 1.0}
        self._capture.begin()
        with self._torch.inference_mode():
            answer = self._network.generate(
                ids, attention_mask=self._torch.ones_like(ids), max_new_tokens=options.max_tokens, **sampling
            )
        prompt_tokens = ids.shape[1]
        try:
            rows, experts = self._capture.rows()
            shape = MoeShape(rows.shape[1], experts, rows.shape[2])
            return sample_of_rows(rows, shape, prompt_tokens, answer.shape[1] - prompt_tokens)
        except CountsError as error:
            raise RecordError(f"{options.model}: {error}") from None

    def _ids(self, prompt: Prompt) -> Any:
        """The token ids of a prompt, [1, T], as a server would make them."""
        try:
            if "messages" in prompt.body:
                text = self._tokenizer.apply_chat_template(
                    prompt.body["messages"], add_generation_prompt=True, tokenize=False
                )
                found = self._tokenizer(text, return_tensors="pt", add_special_tokens=False)
            else:
                found = self._tokenizer(prompt.body["prompt"], return_tensors="pt")
        except Exception as error:  # templates are programs, and fail in their own ways
            raise RecordError(f"the prompt cannot be made into tokens: {error}") from None
        ids = found["input_ids"]
        if not ids.shape[1]:
            raise RecordError("the prompt has no tokens")
        return ids.to(self._device)


class _Capture:
    """Reads the experts that each MoE layer is told to use, in the order of the layers."""

    def __init__(self, network: Any) -> None:
        self._chosen: list[list[NDArray[np.int32]]] = []
        self._experts = 0
        for module in network.modules():
            names = list(inspect.signature(type(module).forward).parameters)
            found = [name for name in INDICES if name in names]
            if not found:
                continue
            # `names` begins with self.
            self._watch(module, found[0], names.index(found[0]) - 1)
            self._experts = max(self._experts, _number_of_experts(module, network.config))
        if not self._chosen:
            raise RecordError(
                f"{type(network).__name__} has no module that is given the indices of the experts to use "
                f"({' or '.join(INDICES)}): it is no MoE model, or one that this source cannot see into. "
                "Record it from a server"
            )

    def _watch(self, module: Any, name: str, position: int) -> None:
        chosen: list[NDArray[np.int32]] = []
        self._chosen.append(chosen)

        def note(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            indices = named[name] if name in named else positional[position]
            chosen.append(indices.reshape(-1, indices.shape[-1]).to("cpu").numpy().astype(np.int32))

        module.register_forward_pre_hook(note, with_kwargs=True)

    def begin(self) -> None:
        for chosen in self._chosen:
            chosen.clear()

    def rows(self) -> tuple[NDArray[np.int32], int]:
        """The experts of every token since `begin`, int32 [T, L, k], and how many experts the largest layer has.

        Raises CountsError if not all layers have seen all tokens, or if they differ in top-k.
        """
        layers = [np.concatenate(chosen) for chosen in self._chosen if chosen]
        if len(layers) != len(self._chosen) or len({len(layer) for layer in layers}) != 1:
            raise CountsError("incomplete", "the MoE layers have seen different numbers of tokens")
        if len(top_k := {layer.shape[1] for layer in layers}) != 1:
            raise CountsError(
                "geometry", f"a token chooses {' or '.join(map(str, sorted(top_k)))} experts, depending on the layer"
            )
        return np.stack(layers, axis=1), self._experts


def _number_of_experts(module: Any, config: Any) -> int:
    text = config.get_text_config()
    for holder in (module, text):
        for name in EXPERTS:
            number = getattr(holder, name, None)
            if type(number) is int and number > 0:
                return number
    raise RecordError(f"neither {type(module).__name__} nor the model's configuration says how many experts there are")
