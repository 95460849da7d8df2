"""`eldr inspect` of a trace: what it holds, and above all whether it holds prompts."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from eldr.cli.main import main
from eldr.report.trace import render_trace
from eldr.trace import Trace, TraceMeta, read_trace, write_trace
from tests.synthetic import make_trace, packed


def with_prompts() -> Trace:
    text, offsets = packed([b"four"] * 24)
    return make_trace(prompt_text=text, prompt_text_offsets=offsets)


def shown(trace: Trace) -> str:
    text = io.StringIO()
    Console(file=text, width=160).print(render_trace(trace))
    return text.getvalue()


def test_the_terminal_says_whether_there_are_prompts() -> None:
    assert "kept, 96 bytes" in shown(with_prompts())
    assert "not kept (record with --keep-prompts)" in shown(make_trace())


def test_the_terminal_shows_the_facts(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    trace = make_trace()
    write_trace(trace, path)
    read = read_trace(path)
    text = shown(read)
    for fact in ("3 layers x 16 experts, top-2", "24: kind 0 (8), kind 1 (8), kind 2 (8)", str(read.sha256)):
        assert fact in text
    assert str(len(trace.decode_experts)) in text


def test_text_of_the_file_does_not_steer_the_terminal() -> None:
    trace = make_trace()
    hostile = Trace(
        trace.prefill_counts,
        trace.prompt_tokens,
        trace.decode_experts,
        trace.decode_offsets,
        np.full(24, "\x1b[31mred"),
        TraceMeta("[bold]\x1b[0m", 3, 16, 2),
    )
    text = shown(hostile)
    assert "\x1b" not in text
    assert "[bold]" in text


def test_the_command_tells_a_trace_from_a_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.npz"
    write_trace(with_prompts(), path)
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompts"], found["prompt_bytes"], found["requests"]) == (True, 96, 24)
    assert found["labels"] == {"kind 0": 8, "kind 1": 8, "kind 2": 8}
    assert main(["inspect", str(path)]) == 0
    assert "kept, 96 bytes" in capsys.readouterr().out


@pytest.mark.parametrize("meta", ["{}", "[]", "{", '{"format": 1}', '{"format": "eldr-other-v1"}'])
def test_a_foreign_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], meta: str) -> None:
    path = tmp_path / "foreign.npz"
    np.savez(path, meta=np.array(meta))
    assert main(["inspect", str(path)]) == 2
    assert "foreign.npz" in capsys.readouterr().err
