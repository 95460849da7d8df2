"""A vLLM engine with the connector inside the test process, driven step by step."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
from vllm.lora.request import LoRARequest

from eldr.counts import decode_counts
from eldr.demo.ports import free_ports
from eldr.expert_rows import decode_rows

BLOCK_SIZE = 32
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
RECORD = {"eldr_record": True}


@dataclass
class Answer:
    """What one request got."""

    tokens: list[int] = field(default_factory=list)
    params: dict[str, Any] = field(default_factory=dict)
    cached_tokens: int = 0
    finish_reason: str | None = None

    @property
    def counts(self) -> NDArray[np.uint32]:
        return decode_counts(self.params["eldr_counts"]).counts

    @property
    def unavailable(self) -> str | None:
        return self.params["eldr_counts"].get("unavailable")

    def decode_sets(self) -> list[list[set[int]]]:
        rows = decode_rows(self.params["eldr_decode_experts"])
        return [[set(map(int, layer)) for layer in row] for row in rows]


class Engine:
    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._ids = 0

    @property
    def prefix_caching(self) -> bool:
        """vLLM leaves it out for some models on the CPU."""
        return bool(self.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching)

    @property
    def block_size(self) -> int:
        """Tokens per KV block. vLLM chooses its own for some models."""
        return int(self.llm.llm_engine.vllm_config.cache_config.block_size)

    def submit(
        self,
        tokens: Sequence[int],
        params: Mapping[str, Any] | None,
        max_tokens: int = 1,
        adapter: LoRARequest | None = None,
    ) -> str:
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=0,
            ignore_eos=True,
            extra_args={"kv_transfer_params": dict(params)} if params is not None else None,
        )
        self._ids += 1
        request_id = f"r{self._ids}"
        self.llm.llm_engine.add_request(request_id, {"prompt_token_ids": list(tokens)}, sampling, lora_request=adapter)
        return request_id

    def steps(self, answers: dict[str, Answer]) -> Iterator[dict[str, int]]:
        """Run until all is done; yields how many tokens each request generated in each step that had any."""
        engine = self.llm.llm_engine
        while engine.has_unfinished_requests():
            grown: dict[str, int] = {}
            for output in engine.step():
                answer = answers.setdefault(output.request_id, Answer())
                tokens = list(output.outputs[0].token_ids)
                if len(tokens) > len(answer.tokens):
                    grown[output.request_id] = len(tokens) - len(answer.tokens)
                answer.tokens = tokens
                answer.cached_tokens = output.num_cached_tokens or 0
                answer.params = output.kv_transfer_params or answer.params
                answer.finish_reason = output.outputs[0].finish_reason
            if grown:
                yield grown

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        params: Mapping[str, Any] | None,
        max_tokens: int = 1,
        adapters: Sequence[LoRARequest | None] | None = None,
    ) -> list[Answer]:
        """All `prompts` at once, each for its adapter."""
        answers: dict[str, Answer] = {}
        of = adapters or [None] * len(prompts)
        ids = [self.submit(prompt, params, max_tokens, adapter) for prompt, adapter in zip(prompts, of, strict=True)]
        for _ in self.steps(answers):
            pass
        return [answers[request_id] for request_id in ids]

    def prefill(self, *prompts: Sequence[int], adapters: Sequence[LoRARequest | None] | None = None) -> list[Answer]:
        """As a prefill worker gets them. The hand-offs are left to expire."""
        return self.run(prompts, PREFILL, adapters=adapters)

    def record(self, *prompts: Sequence[int], max_tokens: int) -> list[Answer]:
        return self.run(prompts, RECORD, max_tokens)

    def metric(self, name: str) -> Counter[str]:
        """Values of the counter or histogram `name`, summed over its labels."""
        values: Counter[str] = Counter()
        for metric in self.llm.get_metrics():
            if metric.name == name:
                for key in ("value", "count", "sum"):
                    values[key] += getattr(metric, key, 0)
        return values


@contextmanager
def running(
    model_dir: Path,
    *,
    role: str = "kv_producer",
    policy: str = "recompute",
    connector: bool = True,
    extra_config: Mapping[str, Any] | None = None,
    around: Callable[[dict[str, Any]], dict[str, Any]] = lambda own: own,
    **arguments: Any,
) -> Iterator[Engine]:
    """An engine of the model, gone when the block ends. `arguments` are vLLM's.

    around: makes the engine's kv_transfer_config out of the connector's.
    """
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(free_ports(1)[0])
    if connector:
        own = {
            "kv_connector": "EldrConnector",
            "kv_role": role,
            "kv_buffer_device": "cpu",
            "kv_load_failure_policy": policy,
            "kv_connector_extra_config": {"num_threads": 0, **(extra_config or {})},
        }
        arguments["kv_transfer_config"] = around(own)
    defaults = {
        "dtype": "float32",
        "max_model_len": 1024,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": 16 * 2**20,
        "disable_log_stats": False,
    }
    try:
        llm = LLM(model=str(model_dir), **{**defaults, **arguments})
        try:
            yield Engine(llm)
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
    finally:
        ensure_kv_transfer_shutdown()
        cleanup_dist_env_and_memory()
        gc.collect()
