"""Sources of experts without the connector: a model in this process, and stock vLLM. Both must say what it says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import vllm
from transformers import AutoTokenizer

from eldr.counts import decode_counts
from eldr.demo.model import write_model
from eldr.demo.ports import free_ports
from eldr.demo.prompts import make_prompts
from eldr.demo.workers import WorkerProcess, WorkerSpec
from eldr.expert_rows import decode_rows
from eldr.record import MoeShape, Prompt, RecordError, RecordOptions, RoutedExperts, record
from eldr.record.transformers import Transformers, TransformersOptions
from eldr.routed_experts import decode_npy
from eldr.trace import Trace
from eldr.workloads.kinds import KINDS
from tests.vllm import tiny_models
from tests.vllm.engine import running
from tests.vllm.reference import Reference

TOKENS = 24
CHAT = Prompt({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]}, "")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [Prompt({"prompt": prompt.text}, prompt.kind) for prompt in make_prompts(2 * len(KINDS), seed=6)]


@pytest.fixture(scope="module")
def in_process(model_dir: Path, prompts: list[Prompt]) -> Trace:
    source = Transformers(TransformersOptions(str(model_dir), TOKENS, dtype="float32"))
    recording = record(prompts, source, keep_prompts=True)
    assert recording.failures == []
    return recording.trace


def test_transformers_records_what_the_connector_records(
    model_dir: Path, prompts: list[Prompt], in_process: Trace
) -> None:
    with running(model_dir) as engine:
        tokenizer = engine.llm.get_tokenizer()
        tokens = [tokenizer(prompt.body["prompt"])["input_ids"] for prompt in prompts]
        answers = engine.record(*tokens, max_tokens=TOKENS)
    for n, answer in enumerate(answers):
        counts = decode_counts(answer.params["eldr_counts"])
        np.testing.assert_array_equal(in_process.prefill_counts[n], counts.counts)
        assert in_process.prompt_tokens[n] == counts.prompt_tokens
        own = in_process.decode_experts[in_process.decode_offsets[n] : in_process.decode_offsets[n + 1]]
        rows = decode_rows(answer.params["eldr_decode_experts"])[: len(own)]  # the engine ignores the end of text
        # As sets: the order within a token's top-k carries no meaning.
        np.testing.assert_array_equal(np.sort(own, axis=-1), np.sort(rows, axis=-1))
    assert np.diff(in_process.decode_offsets).max() == TOKENS - 1
    assert in_process.prompt(0).decode() == prompts[0].body["prompt"]


# vLLM 0.32 has routed experts with its second model runner alone, which needs Triton.
@pytest.mark.skipif(not vllm.__version__.startswith("0.30."), reason="only vLLM 0.30 states experts on the CPU")
def test_stock_vllm_states_what_transformers_records(
    model_dir: Path, prompts: list[Prompt], in_process: Trace, tmp_path: Path
) -> None:
    port, unused = free_ports(2)
    worker = WorkerProcess(
        WorkerSpec(
            role="plain",
            port=port,
            side_channel_port=unused,
            model_dir=model_dir,
            served_name="small",
            python=Path(sys.executable),
            log_path=tmp_path / "worker.log",
            kv_cache_bytes=64 * 2**20,
            extra_args=("--enable-return-routed-experts",),
        )
    )
    worker.start()
    try:
        worker.wait_ready(300)
        options = RecordOptions(worker.url, max_tokens=TOKENS)
        recording = record(prompts, RoutedExperts(options, MoeShape(4, 32, 4)), keep_prompts=True)
        chat = record([CHAT], RoutedExperts(options, MoeShape(4, 32, 4)))
    finally:
        worker.stop()
    assert recording.failures == []
    stock = recording.trace
    for field in ("prefill_counts", "prompt_tokens", "decode_offsets", "label", "prompt_text", "prompt_text_offsets"):
        np.testing.assert_array_equal(getattr(stock, field), getattr(in_process, field), field)
    np.testing.assert_array_equal(np.sort(stock.decode_experts, axis=2), np.sort(in_process.decode_experts, axis=2))
    assert chat.trace.prompt_tokens[0] > len("Hello")


def test_the_names_on_the_wire_are_vllms() -> None:
    """For versions whose experts cannot be had on a CPU: the fields exist, and vLLM's own encoder is understood."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponseChoice
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponseChoice
    from vllm.utils.serial_utils import numpy2base64

    for choice in (ChatCompletionResponseChoice, CompletionResponseChoice):
        assert "routed_experts" in choice.model_fields
    for request in (ChatCompletionRequest, CompletionRequest):
        assert "routed_experts_prompt_start" in request.model_fields
    rows = np.random.default_rng(0).integers(0, 200, (7, 3, 2))
    for dtype in (np.uint8, np.uint16, np.int32):
        np.testing.assert_array_equal(decode_npy(numpy2base64(rows.astype(dtype)).encode()), rows)


@pytest.mark.parametrize("make", [tiny_models.make_moe, tiny_models.make_gpt_oss, tiny_models.make_gemma])
def test_other_architectures_are_seen_into(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """Against the choices that follow from the router logits of one uncached pass."""
    folder = make(tmp_path / "model")
    recording = record(
        [Prompt({"prompt": "The quick brown fox"}, ""), CHAT],
        Transformers(TransformersOptions(str(folder), 8, dtype="float32")),
        keep_prompts=True,
    )
    trace = recording.trace
    tokenizer = AutoTokenizer.from_pretrained(folder)
    told = tokenizer.apply_chat_template(CHAT.body["messages"], add_generation_prompt=True, tokenize=False)
    reference = Reference(folder)
    for n, text in enumerate(["The quick brown fox", told]):
        prompt = tokenizer(text)["input_ids"]
        np.testing.assert_array_equal(trace.prefill_counts[n], reference.counts(prompt))
        own = trace.decode_experts[trace.decode_offsets[n] : trace.decode_offsets[n + 1]]
        generated = reference.generate(prompt, len(own) + 1)
        assert [[set(map(int, layer)) for layer in row] for row in own] == reference.decode_sets(prompt, generated)
    assert trace.meta.experts == reference.experts
    assert trace.prompt(1) == b"Hello"


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    """With a true reason, and before any prompt runs."""
    with pytest.raises(RecordError, match="cannot be loaded"):
        Transformers(TransformersOptions(str(tmp_path / "absent")))
    dense = tiny_models.make_dense(tmp_path / "dense")
    with pytest.raises(RecordError, match="no module that is given the indices of the experts"):
        Transformers(TransformersOptions(str(dense)))
