"""Recording against a small HTTP server that answers as a worker with the connector, or misbehaves on purpose."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eldr.counts import ExpertCounts, encode_counts, encode_unavailable
from eldr.expert_rows import encode_rows
from eldr.record import Connector, Prompt, RecordError, RecordOptions, read_prompts, record

LAYERS, EXPERTS, TOP_K = 2, 4, 2


def counts_of(prompt: str) -> np.ndarray:
    """Every token of the prompt chooses the experts 0 and 1 in layer 0, 2 and 3 in layer 1."""
    return np.array([[1, 1, 0, 0], [0, 0, 1, 1]], dtype=np.uint32) * len(prompt)


def rows_of(prompt: str) -> np.ndarray:
    """As many rows as the prompt has characters, all of them different from those of other prompts."""
    return np.array([[[0, 1], [2, 3]], [[3, 2], [1, 0]]], dtype=np.uint16)[[len(prompt) % 2]].repeat(len(prompt), 0)


def good_answer(body: dict[str, Any]) -> tuple[int, Any]:
    prompt = body.get("prompt") or body["messages"][0]["content"]
    wire = encode_counts(ExpertCounts(counts_of(prompt), len(prompt), TOP_K))
    return 200, {"eldr_counts": wire, "eldr_decode_experts": encode_rows(rows_of(prompt))}


class Server:
    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], tuple[int, Any]] = good_answer
        self.models = ["m"]
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.reply(200, {"data": [{"id": name} for name in server.models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, dict(self.headers), body))
                status, found = server.answer(body)
                if isinstance(found, bytes):
                    return self.reply(status, found)
                if self.headers.get("X-Eldr-Record") == "1":
                    record = {"counts": found["eldr_counts"], "decode_experts": found["eldr_decode_experts"]}
                    return self.reply(status, {"choices": [], "eldr_record": record})
                return self.reply(status, {"choices": [], "kv_transfer_params": found})

            def reply(self, status: int, body: bytes | dict[str, Any]) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def prompts(tmp_path: Path) -> list[Prompt]:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "abc", "label": "x"}, {"messages": [{"role": "user", "content": "de"}]}, {"prompt": "fghij"}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    return read_prompts(path)


@pytest.mark.parametrize("admin_key", [None, "secret"])
def test_every_prompt_is_one_request_of_the_trace(server: Server, prompts: list[Prompt], admin_key: str | None) -> None:
    steps = []
    recording = record(
        prompts, Connector(RecordOptions(server.url + "/v1/", admin_key=admin_key)), lambda: steps.append(1)
    )
    trace = recording.trace
    assert recording.failures == []
    assert len(steps) == 3
    assert trace.label.tolist() == ["x", "", ""]
    assert trace.prompt_tokens.tolist() == [3, 2, 5]
    assert trace.decode_offsets.tolist() == [0, 3, 5, 10]
    for n, prompt in enumerate(["abc", "de", "fghij"]):
        assert np.array_equal(trace.prefill_counts[n], counts_of(prompt))
        own = slice(trace.decode_offsets[n], trace.decode_offsets[n + 1])
        assert np.array_equal(trace.decode_experts[own], rows_of(prompt))
    assert (trace.meta.model, trace.meta.layers, trace.meta.experts, trace.meta.top_k) == ("m", LAYERS, EXPERTS, TOP_K)


def test_a_worker_is_asked_in_its_body_a_router_by_header(server: Server, prompts: list[Prompt]) -> None:
    record(prompts[:1], Connector(RecordOptions(server.url, api_key="k")))
    record(prompts[:1], Connector(RecordOptions(server.url, admin_key="a")))
    (_, worker_headers, worker_body), (_, router_headers, router_body) = server.requests
    assert worker_body["kv_transfer_params"] == {"eldr_record": True}
    assert worker_headers["Authorization"] == "Bearer k"
    assert "kv_transfer_params" not in router_body
    assert router_headers["Authorization"] == "Bearer a"


def test_a_failing_prompt_is_listed_and_the_others_are_kept(server: Server, prompts: list[Prompt]) -> None:
    server.answer = lambda body: (500, b"no memory") if body.get("prompt") == "fghij" else good_answer(body)
    recording = record(prompts, Connector(RecordOptions(server.url)))
    assert recording.trace.prompt_tokens.tolist() == [3, 2]
    assert len(recording.failures) == 1
    assert recording.failures[0].startswith("prompt 3: ")
    assert "answered 500: no memory" in recording.failures[0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda _: (200, b'{"choices": []}'), "runs the eldr connector"),
        (lambda _: (200, b"[]"), "other than a JSON object"),
        (lambda _: (200, b"not json"), "/v1/completions: "),
        (lambda _: (403, b"wrong key"), "answered 403: wrong key"),
        (
            lambda body: (200, {**good_answer(body)[1], "eldr_counts": encode_unavailable("kv_load")}),
            "no exact ones: kv_load",
        ),
    ],
)
def test_a_server_that_cannot_be_recorded_is_found_out_at_once(
    server: Server, prompts: list[Prompt], answer: Callable[..., Any], message: str
) -> None:
    server.answer = answer
    with pytest.raises(RecordError, match=message):
        record(prompts, Connector(RecordOptions(server.url)))
    assert len(server.requests) == 1


def test_answers_of_two_geometries_are_refused(server: Server, prompts: list[Prompt]) -> None:
    def mixed(body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("prompt") == "fghij":
            wire = encode_counts(ExpertCounts(np.full((LAYERS, 5), 2, dtype=np.uint32), 5, 2))
            return 200, {"eldr_counts": wire, "eldr_decode_experts": encode_rows(rows_of("fghij"))}
        return good_answer(body)

    server.answer = mixed
    with pytest.raises(RecordError, match="differ in layers, experts or top-k"):
        record(prompts, Connector(RecordOptions(server.url)))


@pytest.mark.parametrize("models", [[], ["a", "b"]])
def test_the_model_must_be_named_unless_there_is_one(server: Server, prompts: list[Prompt], models: list[str]) -> None:
    server.models = models
    with pytest.raises(RecordError, match=f"serves {len(models)} models"):
        record(prompts, Connector(RecordOptions(server.url)))
    assert record(prompts, Connector(RecordOptions(server.url, model="a"))).trace.meta.model == "a"


def test_a_server_that_is_not_there(prompts: list[Prompt]) -> None:
    with pytest.raises(RecordError, match=r"127\.0\.0\.1:9"):
        record(prompts, Connector(RecordOptions("http://127.0.0.1:9")))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', r"p\.jsonl:2: not JSON"),
        ("p.jsonl", "[]", r"p\.jsonl:1: expected an object"),
        ("p.jsonl", '{"prompt": ""}', r"p\.jsonl:1: expected a non-empty"),
        ("p.jsonl", '{"prompt": "a", "messages": [1]}', r"p\.jsonl:1: expected a non-empty"),
        ("p.jsonl", '{"prompt": ["a"]}', r"p\.jsonl:1: expected a non-empty"),
        ("p.jsonl", '{"prompt": "a", "label": 1}', r"p\.jsonl:1: the label"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.csv", "a", "ends in .jsonl or .txt"),
    ],
)
def test_a_wrong_prompt_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=message):
        read_prompts(path)


def test_a_prompt_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"absent\.txt: cannot be read"):
        read_prompts(tmp_path / "absent.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match=r"binary\.txt: cannot be read"):
        read_prompts(tmp_path / "binary.txt")


def test_a_text_file_holds_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("first\n\nsecond, with spaces \n", encoding="utf-8")
    assert [prompt.body for prompt in read_prompts(path)] == [{"prompt": "first"}, {"prompt": "second, with spaces "}]
