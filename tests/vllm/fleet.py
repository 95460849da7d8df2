"""Worker processes for the tests and the requests they get."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from eldr.demo.workers import WorkerProcess
from tests.vllm.engine import BLOCK_SIZE, PREFILL

MODEL_NAME = "tiny"


@dataclass
class Reply:
    status: int
    body: dict[str, Any]

    @property
    def tokens(self) -> list[int]:
        return list(self.body["choices"][0]["token_ids"])

    @property
    def params(self) -> dict[str, Any]:
        return self.body.get("kv_transfer_params") or {}


def complete(
    worker: WorkerProcess, prompt: Sequence[int], max_tokens: int, params: dict[str, Any] | None = None
) -> Reply:
    """One completion of a prompt of token ids."""
    body: dict[str, Any] = {
        "model": MODEL_NAME,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if params is not None:
        body["kv_transfer_params"] = params
    request = urllib.request.Request(
        f"{worker.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return Reply(answer.status, json.load(answer))
    except urllib.error.HTTPError as error:
        return Reply(error.code, json.load(error))


def hand_off(worker: WorkerProcess, prompt: Sequence[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prefill `prompt` as a router does; returns what the decode worker gets and the counts on the wire."""
    reply = complete(worker, prompt, 1, dict(PREFILL))
    assert reply.status == 200, reply.body
    params = dict(reply.params)
    return params, params.pop("eldr_counts")


def metric(worker: WorkerProcess, name: str, **labels: str) -> float:
    """The sum of the worker's samples of that name and those labels."""
    with urllib.request.urlopen(f"{worker.url}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


@contextmanager
def in_background(worker: WorkerProcess, *args: Any) -> Iterator[list[Reply]]:
    """A completion that runs while the block does; its reply is in the list after the block."""
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(complete(worker, *args)))
    thread.start()
    try:
        yield replies
    finally:
        thread.join(120)


def sleep_until(unix_s: float) -> None:
    time.sleep(max(0.0, unix_s - time.time()))


def cache_arguments(blocks: int) -> tuple[str, ...]:
    return (
        "--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(blocks), "--max-model-len", "512",
    )  # fmt: skip


@dataclass
class Fleet:
    """A prefill and a decode worker of one model."""

    prefill: WorkerProcess
    decode: WorkerProcess
