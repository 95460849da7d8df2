"""One router in front of several models: two that generate, LoRA adapters that come and go, and one for embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from eldr.demo.workers import Role, WorkerProcess
from tests.e2e.dense_model import RANK, write_adapter, write_dense_model
from tests.e2e.real_fleet import MODEL, Fleet, Router, StartRouter, call, metric, new_worker

DENSE, EMBEDDER = "dense", "embedder"
TEXT = "def area(width, height):\n    return width * height\n\ndef volume(width, height, depth):\n    return "
SAID = [{"role": "user", "content": "What is 2 + 2?"}]
NIXL = {
    "kv_connector": "NixlConnector",
    "kv_role": "kv_both",
    "kv_buffer_device": "cpu",
    "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"num_threads": 0},
}


@dataclass
class Dense:
    """Workers of the dense model, for generation and for embeddings.

    prefill, decode: both serve the adapter `always` from the start, and can load `sometimes`.
    embedder: serves the model for embeddings alone.
    folder: has the model and the adapters.
    """

    prefill: WorkerProcess
    decode: WorkerProcess
    embedder: WorkerProcess
    folder: Path

    def load(self, worker: WorkerProcess, adapter: str) -> None:
        ask = {"lora_name": adapter, "lora_path": str(self.folder / adapter)}
        assert call(worker.url, "/v1/load_lora_adapter", ask)[0] == 200

    def unload(self, worker: WorkerProcess, adapter: str) -> None:
        assert call(worker.url, "/v1/unload_lora_adapter", {"lora_name": adapter})[0] == 200


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dense]:
    folder = tmp_path_factory.mktemp("dense")
    write_dense_model(folder / DENSE)
    write_adapter(folder / "always", seed=1)
    write_adapter(folder / "sometimes", seed=2)

    def worker(role: Role) -> WorkerProcess:
        arguments = (
            "--kv-transfer-config", json.dumps(NIXL), "--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "2",
            "--lora-modules", f"always={folder / 'always'}",
        )  # fmt: skip
        spec = new_worker(folder / DENSE, folder, role, 0, arguments).spec
        return WorkerProcess(
            replace(spec, served_name=DENSE, extra_env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}),
        )

    pooling = new_worker(folder / DENSE, folder, "plain", 0, ("--runner", "pooling", "--convert", "embed")).spec
    embedder = WorkerProcess(replace(pooling, served_name=EMBEDDER))
    prefill, decode, _ = workers = worker("prefill"), worker("decode"), embedder
    try:
        for started in workers:
            started.start()
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda started: started.wait_ready(300), workers))
        yield Dense(prefill, decode, embedder, folder)
    finally:
        for started in workers:
            started.stop()


@pytest.fixture(scope="module")
def both(fleet: Fleet, dense: Dense, start_router: StartRouter) -> Iterator[Router]:
    prefill = [fleet.prefill.url, dense.prefill.url]
    decode = [*(worker.url for worker in fleet.decode), dense.decode.url, dense.embedder.url]
    with start_router("--policy", "expected-union", prefill=prefill, decode=decode) as running:
        yield running


def said(url: str, path: str, model: str | None, stream: bool) -> tuple[int, str]:
    """(status, text) of a greedy answer, or (status, message) of a refusal."""
    question = {"prompt": TEXT} if path == "/v1/completions" else {"messages": SAID}
    ask: dict[str, Any] = {**question, "max_tokens": 16, "temperature": 0, "stream": stream}
    status, headers, raw = call(url, path, ask if model is None else {**ask, "model": model})
    if headers["content-type"] == "application/json":
        chunks = [json.loads(raw)]
    else:
        events = [line.removeprefix("data: ") for line in raw.decode().splitlines() if line]
        assert events.pop() == "[DONE]"
        chunks = [json.loads(event) for event in events]
    if status != 200:
        return status, chunks[0]["error"]["message"]
    choices = [chunk["choices"][0] for chunk in chunks]
    parts = [choice.get("message") or choice.get("delta") or choice for choice in choices]
    return status, "".join(part.get("text") or part.get("content") or "" for part in parts)


def names(url: str) -> set[str]:
    return {model["id"] for model in json.loads(call(url, "/v1/models")[2])["data"]}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_each_model_answers_as_its_own_worker(
    both: Router, fleet: Fleet, dense: Dense, path: str, stream: bool
) -> None:
    texts = set()
    for model, alone in ((MODEL, fleet.plain), (DENSE, dense.decode), ("always", dense.decode)):
        handed_off = metric(both.url, "eldr_handoffs_total")
        answer = said(both.url, path, model, stream)
        assert answer == said(alone.url, path, model, stream)
        assert metric(both.url, "eldr_handoffs_total") - handed_off == 1
        texts.add(answer)
    assert len(texts) == 3, "models that answer alike show nothing"


def test_a_request_must_name_one_of_several_models(both: Router) -> None:
    assert said(both.url, "/v1/completions", None, False)[0] == 400


def test_models_are_listed_together(both: Router) -> None:
    assert names(both.url) == {MODEL, DENSE, "always", EMBEDDER}


@pytest.mark.parametrize(
    ("path", "question"),
    [
        ("/v1/embeddings", {"input": ["hello", "world"]}),
        ("/v1/embeddings", {"input": [68, 69], "encoding_format": "base64"}),
        ("/score", {"text_1": "a", "text_2": "b"}),
        ("/tokenize", {"prompt": "hello"}),
    ],
)
def test_embeddings_need_no_prefill_worker(both: Router, dense: Dense, path: str, question: dict[str, Any]) -> None:
    ask = {"model": EMBEDDER, **question}
    answers = []
    for url in (both.url, dense.embedder.url):
        status, _, raw = call(url, path, ask)
        fields = json.loads(raw)
        answers.append((status, {key: fields[key] for key in fields if key not in ("id", "created")}))
    assert answers[0] == answers[1]
    assert answers[0][0] == 200
    other = call(both.url, path, {**ask, "model": MODEL})[0]
    assert other == (200 if path == "/tokenize" else 404), "a model that generates has no embeddings"


def test_an_adapter_comes_and_goes(both: Router, dense: Dense) -> None:
    def ask() -> tuple[int, str]:
        return said(both.url, "/v1/completions", "sometimes", False)

    def handed_off() -> float:
        return metric(both.url, "eldr_handoffs_total")

    def alone() -> float:
        return metric(both.url, "eldr_passthrough_total", reason="prefill_lacks_model")

    def unknown() -> bool:
        status, message = ask()
        return status == 404 and message.startswith("The model `sometimes` does not exist.")

    assert unknown()

    dense.load(dense.prefill, "sometimes")
    dense.load(dense.decode, "sometimes")
    expected = said(dense.decode.url, "/v1/completions", "sometimes", False)
    before = handed_off()
    assert ask() == expected
    assert handed_off() - before == 1

    dense.unload(dense.prefill, "sometimes")
    before = alone()
    assert [ask(), ask()] == [expected, expected]
    assert alone() - before == 2

    dense.unload(dense.decode, "sometimes")
    assert unknown()
    assert said(both.url, "/v1/completions", "always", False)[0] == 200
    assert metric(both.url, "eldr_worker_failures_total") == 0
