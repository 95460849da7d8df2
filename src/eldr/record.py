"""Records traces: sends prompts through a worker or a router and keeps the experts that served them.

A worker with the eldr connector returns the expert counts of the prompt and the experts of every generated token, if
the request asks for them. A router does the same for a client that has its admin key.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import eldr
from eldr.counts import CountsError, ExpertCounts, decode_counts
from eldr.errors import EldrError
from eldr.expert_rows import decode_rows
from eldr.trace import Trace, TraceMeta

ERROR_BODY_CHARS = 300


class RecordError(EldrError):
    """Raised when a prompt file cannot be read or a server cannot be recorded."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt file.

    body: the part of the request body that holds the prompt or the messages.
    label: the kind of the prompt, empty if the file gives none.
    """

    body: dict[str, Any]
    label: str

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if "messages" in self.body else "/v1/completions"


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """Where and how to record.

    url: a worker with the eldr connector, or a router.
    model: the model name. None asks the server, which must then serve exactly one model.
    max_tokens: generated tokens per request, at most.
    temperature: the sampling temperature.
    concurrency: requests in flight at a time.
    timeout_s: the time limit of each request.
    api_key: the worker's API key, if it has one.
    admin_key: the router's admin key. If given, the server is taken to be a router.
    """

    url: str
    model: str | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    concurrency: int = 8
    timeout_s: float = 600.0
    api_key: str | None = None
    admin_key: str | None = None

    def headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self.admin_key is not None:
            headers |= {"X-Eldr-Record": "1", "Authorization": f"Bearer {self.admin_key}"}
        elif self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers


@dataclass(frozen=True, slots=True)
class Recording:
    """The outcome of a recording.

    trace: the requests that could be recorded.
    failures: one line of text for each request that could not.
    """

    trace: Trace
    failures: list[str]


@dataclass(frozen=True, slots=True)
class _Sample:
    counts: ExpertCounts
    rows: NDArray[np.uint16]
    label: str


def read_prompts(path: Path) -> list[Prompt]:
    """Read the prompts of a file. Empty lines are skipped.

    path: a .jsonl file of objects {"prompt": text} or {"messages": [...]} with an optional "label", or a .txt file with
        one prompt per line.
    Raises RecordError with the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read: {error}") from None
    if path.suffix == ".txt":
        prompts = [Prompt({"prompt": line}, "") for line in lines if line.strip()]
    elif path.suffix == ".jsonl":
        prompts = [_parse_line(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    else:
        raise RecordError(f"{path}: a prompt file ends in .jsonl or .txt")
    if not prompts:
        raise RecordError(f"{path}: holds no prompts")
    return prompts


def _parse_line(path: Path, number: int, line: str) -> Prompt:
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecordError(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(item, dict):
        raise RecordError(f'{path}:{number}: expected an object like {{"prompt": "...", "label": "..."}}')
    label = item.get("label", "")
    if not isinstance(label, str):
        raise RecordError(f"{path}:{number}: the label is not a string")
    if isinstance(item.get("prompt"), str) and item["prompt"] and "messages" not in item:
        return Prompt({"prompt": item["prompt"]}, label)
    if isinstance(item.get("messages"), list) and item["messages"] and "prompt" not in item:
        return Prompt({"messages": item["messages"]}, label)
    raise RecordError(f'{path}:{number}: expected a non-empty "prompt" (a string) or "messages" (a list)')


def record(prompts: list[Prompt], options: RecordOptions, progress: Callable[[], None] = lambda: None) -> Recording:
    """Send every prompt once and return the trace, in the order of the prompts.

    The first prompt is sent alone, so that a server that cannot be recorded fails at once. Later prompts that fail are
    listed in the recording.

    prompts: what to send.
    options: where and how to send it.
    progress: called after each prompt.
    Raises RecordError if the first prompt fails, or if answers disagree on the model's geometry.
    """
    model = options.model if options.model is not None else only_model(options)
    samples: dict[int, _Sample] = {0: _record_one(prompts[0], model, options)}
    progress()
    failures: list[str] = []
    with ThreadPoolExecutor(options.concurrency) as pool:
        pending = {pool.submit(_record_one, prompt, model, options): n for n, prompt in enumerate(prompts) if n > 0}
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
    return Recording(_build_trace([samples[n] for n in sorted(samples)], model), failures)


def _record_one(prompt: Prompt, model: str, options: RecordOptions) -> _Sample:
    body = {
        **prompt.body,
        "model": model,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "stream": False,
    }
    if options.admin_key is None:
        body["kv_transfer_params"] = {"eldr_record": True}
    answer = _call(options, prompt.path, body)
    if options.admin_key is None:
        found = answer.get("kv_transfer_params") or {}
        counts, rows = found.get("eldr_counts"), found.get("eldr_decode_experts")
    else:
        found = answer.get("eldr_record") or {}
        counts, rows = found.get("counts"), found.get("decode_experts")
    if counts is None or rows is None:
        raise RecordError(
            f"{options.url} answered without expert counts; record from a vLLM worker that runs the eldr connector, "
            "or from a router with its admin key"
        )
    try:
        return _Sample(decode_counts(counts), decode_rows(rows), prompt.label)
    except CountsError as error:
        raise RecordError(f"{options.url} answered with unusable expert counts: {error}") from None


def only_model(options: RecordOptions) -> str:
    """Return the name of the server's only model. Raises RecordError if it serves none or several."""
    models = [model.get("id") for model in _call(options, "/v1/models").get("data", []) if isinstance(model, dict)]
    if len(models) != 1 or not isinstance(models[0], str):
        raise RecordError(f"{options.url} serves {len(models)} models ({models}); name one with --model")
    return models[0]


def _call(options: RecordOptions, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    base = options.url.rstrip("/").removesuffix("/v1")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data, options.headers())
    try:
        with urllib.request.urlopen(request, timeout=options.timeout_s) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        text = error.read(ERROR_BODY_CHARS).decode(errors="replace")
        raise RecordError(f"{base + path} answered {error.code}: {text}") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"{base + path}: {error}") from None
    if not isinstance(answer, dict):
        raise RecordError(f"{base + path} answered something other than a JSON object")
    return answer


def _build_trace(samples: list[_Sample], model: str) -> Trace:
    first = samples[0].counts
    geometry = (first.layers, first.experts, first.top_k)
    for sample in samples:
        if (sample.counts.layers, sample.counts.experts, sample.counts.top_k) != geometry:
            raise RecordError("the server's answers differ in layers, experts or top-k: several models behind one URL?")
        if sample.rows.shape[1:] != (first.layers, first.top_k) or (sample.rows >= first.experts).any():
            raise RecordError("the experts of generated tokens do not match the geometry of the prompt's counts")
    rows = np.concatenate([sample.rows for sample in samples])
    return Trace(
        prefill_counts=np.stack([sample.counts.counts for sample in samples]),
        prompt_tokens=np.array([sample.counts.prompt_tokens for sample in samples], dtype=np.int32),
        decode_experts=rows.astype(np.uint8) if first.experts <= 256 else rows,
        decode_offsets=np.cumsum([0, *(len(sample.rows) for sample in samples)], dtype=np.int64),
        label=np.array([sample.label for sample in samples], dtype=np.str_),
        meta=TraceMeta(
            model=model,
            layers=first.layers,
            experts=first.experts,
            top_k=first.top_k,
            note=f"recorded by eldr {eldr.__version__}",
        ),
    )
