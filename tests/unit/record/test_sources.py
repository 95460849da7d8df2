"""Stock engines that state the experts of all tokens, played by a server: the same trace comes out of each."""

import base64
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eldr.cli.main import main
from eldr.record import MoeShape, Prompt, RecordError, RecordOptions, RoutedExperts, Sglang, Source, record
from eldr.record.transformers import Transformers, TransformersOptions
from eldr.trace import read_trace
from tests.unit.record.test_record import Server, server

__all__ = ["server"]

SHAPE = MoeShape(2, 8, 2)
GENERATED = 4
Answer = Callable[[dict[str, Any]], tuple[int, bytes]]


def rows_of(prompt: str) -> np.ndarray:
    """The experts of each token but the last, drawn from the prompt's own numbers. Characters are tokens."""
    rng = np.random.default_rng([ord(character) for character in prompt])
    tokens = len(prompt) + GENERATED - 1
    return np.argsort(rng.random((tokens, SHAPE.layers, SHAPE.experts)), axis=-1)[..., : SHAPE.top_k]


def with_dense_layer(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(rows[:, :1]), rows], axis=1)


def answer_with(body: dict[str, Any], **members: Any) -> tuple[int, bytes]:
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": GENERATED}
    return 200, json.dumps({"choices": [{"text": "x"}], "usage": usage} | members).encode()


def vllm(body: dict[str, Any]) -> tuple[int, bytes]:
    file = io.BytesIO()
    np.save(file, with_dense_layer(rows_of(body["prompt"])).astype(np.uint8))
    return answer_with(body, choices=[{"text": "x", "routed_experts": base64.b64encode(file.getvalue()).decode()}])


def ids_of(body: dict[str, Any]) -> dict[str, str]:
    assert body["return_routed_experts"] is True
    return {"routed_experts": base64.b64encode(rows_of(body["prompt"]).astype("<i4").tobytes()).decode()}


def sglang(body: dict[str, Any]) -> tuple[int, bytes]:
    return answer_with(body, sglext=ids_of(body))


def sglang_meta(body: dict[str, Any]) -> tuple[int, bytes]:
    return answer_with(body, choices=[{"text": "x", "meta_info": ids_of(body)}])


PROMPTS = [Prompt({"prompt": "abc"}, "x"), Prompt({"prompt": "defgh"}, ""), Prompt({"prompt": "i"}, "y")]


@pytest.mark.parametrize(("kind", "answer"), [(RoutedExperts, vllm), (Sglang, sglang), (Sglang, sglang_meta)])
def test_every_source_makes_the_same_trace(
    server: Server, kind: Callable[[RecordOptions, MoeShape], Source], answer: Answer
) -> None:
    server.answer = answer
    recording = record(PROMPTS, kind(RecordOptions(server.url), SHAPE), keep_prompts=True)
    trace = recording.trace
    assert recording.failures == []
    assert trace.prompt_tokens.tolist() == [3, 5, 1]
    assert np.diff(trace.decode_offsets).tolist() == [GENERATED - 1] * 3
    assert trace.label.tolist() == ["x", "", "y"]
    assert (trace.meta.layers, trace.meta.experts, trace.meta.top_k) == (2, 8, 2)
    for n, prompt in enumerate(["abc", "defgh", "i"]):
        rows = rows_of(prompt)
        assert trace.prompt(n) == prompt.encode()
        own = slice(trace.decode_offsets[n], trace.decode_offsets[n + 1])
        assert np.array_equal(trace.decode_experts[own], rows[len(prompt) :])
        for layer in range(SHAPE.layers):
            counts = np.bincount(rows[: len(prompt), layer].ravel(), minlength=SHAPE.experts)
            assert np.array_equal(trace.prefill_counts[n, layer], counts)


def without_usage(body: dict[str, Any]) -> tuple[int, bytes]:
    return 200, json.dumps(json.loads(vllm(body)[1]) | {"usage": None}).encode()


def with_other_usage(body: dict[str, Any]) -> tuple[int, bytes]:
    usage = {"prompt_tokens": 3, "completion_tokens": 9}
    return 200, json.dumps(json.loads(vllm(body)[1]) | {"usage": usage}).encode()


@pytest.mark.parametrize(
    ("kind", "answer", "message"),
    [
        (RoutedExperts, answer_with, "--enable-return-routed-experts"),
        (Sglang, answer_with, "--enable-return-routed-experts"),
        (RoutedExperts, without_usage, "usage"),
        (RoutedExperts, with_other_usage, "6 rows of experts for 11 tokens"),
        (RoutedExperts, lambda body: answer_with(body, choices=[{"routed_experts": "AAAA"}]), "no readable .npy"),
        (RoutedExperts, lambda body: answer_with(body, choices=[{"routed_experts": "\udcff"}]), "cannot be decoded"),
        (RoutedExperts, lambda body: answer_with(body, choices=["x"]), "without routed experts"),
        (Sglang, lambda body: answer_with(body, sglext={"routed_experts": "AAAA"}), "not 6 rows of top-2"),
        (Sglang, lambda body: answer_with(body, sglext=[]), "without routed experts"),
    ],
)
def test_a_server_that_states_none_or_nonsense_is_found_out(
    server: Server, kind: Callable[[RecordOptions, MoeShape], Source], answer: Answer, message: str
) -> None:
    server.answer = answer
    with pytest.raises(RecordError, match=message):
        record(PROMPTS, kind(RecordOptions(server.url), SHAPE))


def test_another_geometry_is_refused(server: Server) -> None:
    server.answer = vllm
    for shape in (MoeShape(2, 4, 2), MoeShape(4, 8, 2), MoeShape(2, 8, 3)):
        with pytest.raises(RecordError, match="routed experts"):
            record(PROMPTS, RoutedExperts(RecordOptions(server.url), shape))


def test_the_command_records_and_keeps_prompts(server: Server, tmp_path: Path) -> None:
    server.answer = vllm
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\nde\n", encoding="utf-8")
    trace = tmp_path / "trace.npz"
    command = ["record", str(prompts), "--source", "routed-experts", "--url", server.url, "-o", str(trace)]
    assert main([*command, "--geometry", "2x8x2"]) == 0
    assert not read_trace(trace).has_prompts
    assert main([*command, "--geometry", "2x8x2", "--keep-prompts"]) == 0
    assert [read_trace(trace).prompt(n) for n in range(2)] == [b"abc", b"de"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs the server's --url"),
        (["--source", "sglang", "--url", "http://127.0.0.1:9"], "needs --geometry"),
        (["--source", "sglang", "--url", "http://127.0.0.1:9", "--geometry", "1x2x3"], "is no geometry"),
        (["--source", "sglang", "--url", "http://127.0.0.1:9", "--admin-key-file", "k"], "--source connector"),
        (["--source", "transformers"], "give --model, and no --url"),
        (["--source", "transformers", "--model", "m", "--url", "http://127.0.0.1:9"], "give --model, and no --url"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\n", encoding="utf-8")
    assert main(["record", str(prompts), "-o", str(tmp_path / "t.npz"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RecordError, match="needs torch and transformers"):
        Transformers(TransformersOptions("m"))
