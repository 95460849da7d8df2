"""Runs prompts through a source, and makes a trace of what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np

import eldr
from eldr.record.prompts import Prompt, RecordError, prompt_text
from eldr.record.sources import Sample, Source
from eldr.trace import Trace, TraceMeta


@dataclass(frozen=True, slots=True)
class Recording:
    """The outcome of a recording.

    trace: the requests that could be recorded.
    failures: one line of text for each request that could not.
    """

    trace: Trace
    failures: list[str]


def record(
    prompts: Sequence[Prompt],
    source: Source,
    progress: Callable[[], None] = lambda: None,
    *,
    keep_prompts: bool = False,
) -> Recording:
    """Run every prompt once and return the trace, in the order of the prompts.

    The first prompt runs alone, so that a source that cannot be recorded fails at once. Later prompts that fail are
    listed in the recording.

    prompts: what to run.
    source: what runs it.
    progress: called after each prompt.
    keep_prompts: whether the trace holds the texts of the prompts.
    Raises RecordError if the first prompt fails, or if answers disagree on the model's geometry.
    """
    samples: dict[int, Sample] = {0: source.sample(prompts[0])}
    progress()
    failures: list[str] = []
    with ThreadPoolExecutor(source.concurrency) as pool:
        pending = {pool.submit(source.sample, prompt): n for n, prompt in enumerate(prompts) if n > 0}
        try:
            for future in as_completed(pending):
                try:
                    samples[pending[future]] = future.result()
                except RecordError as error:
                    failures.append(f"prompt {pending[future] + 1}: {error}")
                progress()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    kept = sorted(samples)
    trace = _build_trace(
        [samples[n] for n in kept], [prompts[n] for n in kept], source.model, keep_prompts=keep_prompts
    )
    return Recording(trace, failures)


def _build_trace(samples: list[Sample], prompts: list[Prompt], model: str, *, keep_prompts: bool) -> Trace:
    first = samples[0].counts
    geometry = (first.layers, first.experts, first.top_k)
    for sample in samples:
        if (sample.counts.layers, sample.counts.experts, sample.counts.top_k) != geometry:
            raise RecordError("the server's answers differ in layers, experts or top-k: several models behind one URL?")
        if sample.rows.shape[1:] != (first.layers, first.top_k) or (sample.rows >= first.experts).any():
            raise RecordError("the experts of generated tokens do not match the geometry of the prompt's counts")
    texts = [prompt_text(prompt.body).encode("utf-8", "replace") for prompt in prompts] if keep_prompts else None
    rows = np.concatenate([sample.rows for sample in samples])
    return Trace(
        prefill_counts=np.stack([sample.counts.counts for sample in samples]),
        prompt_tokens=np.array([sample.counts.prompt_tokens for sample in samples], dtype=np.int32),
        decode_experts=rows.astype(np.uint8) if first.experts <= 256 else rows,
        decode_offsets=np.cumsum([0, *(len(sample.rows) for sample in samples)], dtype=np.int64),
        label=np.array([prompt.label for prompt in prompts], dtype=np.str_),
        meta=TraceMeta(
            model=model,
            layers=first.layers,
            experts=first.experts,
            top_k=first.top_k,
            note=f"recorded by eldr {eldr.__version__}",
        ),
        prompt_text=None if texts is None else np.frombuffer(b"".join(texts), dtype=np.uint8),
        prompt_text_offsets=None if texts is None else np.cumsum([0, *map(len, texts)], dtype=np.int64),
    )
