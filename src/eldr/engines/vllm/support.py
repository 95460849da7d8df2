"""Checks, when an engine starts, that the connector can work with it."""

from __future__ import annotations

import logging
import re
from functools import cache
from typing import Any

import vllm
from vllm.config import CompilationMode, VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig, is_full_attention_spec

from eldr.errors import EldrError

# Older ones are known not to work. Newer ones than the last may work: they were not tried.
FIRST_VERSION, LAST_VERIFIED_VERSION = (0, 30), (0, 32)

# Options that are not numbers, and are read elsewhere (reports.py).
OWN_FORM = ("eldr_reports",)

# A child of vLLM's own logger, which writes to the worker's log.
logger = logging.getLogger("vllm.eldr")


class UnsupportedError(EldrError):
    """Raised when the connector cannot count in an engine. The message says why and what to do."""


def check_engine(config: VllmConfig, version: str = vllm.__version__) -> None:
    """Raise UnsupportedError unless the connector can count exactly in an engine with this configuration."""
    check_version(version)
    parallel = config.parallel_config
    for setting, value in (
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size),
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size),
    ):
        if value > 1:
            raise UnsupportedError(
                f"{setting} {value} is not supported: no rank would see every layer and KV block. "
                f"Use {setting} 1; tensor, expert and data parallelism are possible"
            )
    if parallel.use_ubatching:
        raise UnsupportedError("dual-batch overlap is not supported: drop --enable-dbo and --ubatch-size")
    if current_platform.is_cpu() and config.compilation_config.mode != CompilationMode.NONE:
        raise UnsupportedError("on CPU the compiled model hides the routing: add --enforce-eager")


@cache
def check_version(version: str) -> None:
    """Raise UnsupportedError if the connector cannot work with vLLM `version`. Warn, once, if nobody has tried."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    found = (int(numbers[1]), int(numbers[2])) if numbers else None
    if found is not None and FIRST_VERSION <= found <= LAST_VERIFIED_VERSION:
        return
    first, last = (".".join(map(str, v)) for v in (FIRST_VERSION, LAST_VERIFIED_VERSION))
    if found is not None and found < FIRST_VERSION:
        raise UnsupportedError(
            f"vLLM {version} is not supported: it lacks what this eldr builds on. Install vLLM {first} to {last}"
        )
    logger.warning(
        "eldr is verified with vLLM %s to %s, and not with this vLLM %s. It may fail to start or leave prompts without "
        "expert counts. Compare answers and counts with those of a verified version before you rely on them",
        first,
        last,
        version,
    )


def full_attention_group(kv_cache: KVCacheConfig) -> int:
    """Index of the KV cache group whose blocks keep every token. Sliding-window groups free theirs.

    Raises UnsupportedError if there is none, or if a prefix found in the cache is partly computed again.
    """
    # DeepSeek-V4.1 on vLLM 0.32. Earlier versions have no such attribute.
    if any(getattr(group.kv_cache_spec, "prefix_replay_tokens", 0) for group in kv_cache.kv_cache_groups):
        raise UnsupportedError(
            "--swa-bounded-replay computes the end of a cached prefix again, and runs the last layers on the end of a "
            "prompt alone, so the counts would be wrong: start vLLM with --no-swa-bounded-replay"
        )
    for index, group in enumerate(kv_cache.kv_cache_groups):
        if is_full_attention_spec(group.kv_cache_spec):
            return index
    raise UnsupportedError("the model has no full-attention layer, so no KV block keeps a whole prompt")


def options(extra: dict[str, Any]) -> dict[str, float]:
    """Return eldr's own numbers in kv_connector_extra_config, with defaults filled in.

    eldr_lease_margin_s: the decode side stops trusting a lease this long before it ends. The margin covers the
        difference between the clocks of two workers. eldr_nixl_delay_us: how long NIXL's progress thread sleeps on CPU
        workers.
    """
    known: dict[str, float] = {"eldr_lease_margin_s": 2.0, "eldr_nixl_delay_us": 1000}
    for key, value in extra.items():
        if not key.startswith("eldr_") or key in OWN_FORM:
            continue
        if key not in known:
            raise UnsupportedError(
                f"kv_connector_extra_config has an unknown key {key!r}; known: {', '.join((*known, *OWN_FORM))}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise UnsupportedError(f"kv_connector_extra_config: {key} is {value!r}, expected a number of at least 0")
        known[key] = value
    return known
