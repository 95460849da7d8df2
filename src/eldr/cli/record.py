"""`eldr record`: records prompts to a trace."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from eldr.cli.arguments import positive, read_key_file
from eldr.cli.exit_codes import EXIT_FAILED

if TYPE_CHECKING:
    from eldr.record import Source

SUMMARY = "run prompts through a model and record the experts that they use"
EXAMPLES = """examples:
  eldr record prompts.jsonl --url http://p0:8100 -o trace.npz
  eldr record prompts.txt --url http://router:8000 --admin-key-file admin.key -o trace.npz
  eldr record prompts.jsonl --source routed-experts --url http://w0:8000 --geometry 48x128x8 -o trace.npz
  eldr record prompts.jsonl --source transformers --model Qwen/Qwen3-30B-A3B -o trace.npz

PROMPTS is a .txt file with one prompt per line, or a .jsonl file with one object per line:
  {"prompt": "def fib(n):", "label": "code"}
  {"messages": [{"role": "user", "content": "Hello"}], "label": "chat"}

sources:
  connector       a vLLM worker with the eldr connector, or a router with its admin key
  routed-experts  a vLLM worker started with --enable-return-routed-experts
  sglang          an SGLang server started with --enable-return-routed-experts
  transformers    a Hugging Face model in this process (needs torch and transformers)

exit codes: 0 all prompts were recorded, 1 some failed and the trace has the others, 2 nothing was recorded.
"""
SOURCES = ("connector", "routed-experts", "sglang", "transformers")
# Sources whose answers do not say how many experts there are.
NEED_GEOMETRY = ("routed-experts", "sglang")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr record`."""
    flag = parser.add_argument
    flag("prompts", type=Path, metavar="PROMPTS", help=".jsonl or .txt file with the prompts")
    flag("--source", choices=SOURCES, default="connector", help="where the experts come from (connector)")
    flag("--url", help="the worker, server or router; not for transformers")
    flag("-o", "--output", required=True, type=Path, metavar="TRACE.npz", help="the trace file to write")
    flag("--model", help="model name (the server's only model); for transformers, a folder or a name of the hub")
    flag(
        "--geometry",
        metavar="LxExK",
        help="MoE layers x experts x top-k, such as 48x128x8, for routed-experts and sglang, which do not state them",
    )
    flag("--keep-prompts", action="store_true", help="keep the texts of the prompts in the trace")
    flag("--max-tokens", type=positive, default=128, metavar="N", help="generated tokens per prompt, at most (128)")
    flag("--temperature", type=float, default=0.0, metavar="T", help="sampling temperature (0.0)")
    flag("--concurrency", type=positive, default=8, metavar="N", help="prompts in flight at a time (8)")
    flag("--timeout", type=float, default=600.0, dest="timeout_s", metavar="SECONDS", help="limit per prompt (600)")
    flag("--dtype", default="auto", help="transformers: torch's name for the numbers, such as float32 (auto)")
    flag("--api-key-file", type=Path, metavar="FILE", help="file with the worker's API key")
    flag("--admin-key-file", type=Path, metavar="FILE", help="file with the admin key, if --url is a router")


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr record` and return the exit code."""
    from rich.progress import Progress

    from eldr.record import read_prompts, record
    from eldr.trace import write_trace

    prompts = read_prompts(arguments.prompts)
    source = _source(arguments)
    with Progress(transient=True) as progress:
        task = progress.add_task("recording", total=len(prompts))
        recording = record(prompts, source, lambda: progress.advance(task), keep_prompts=arguments.keep_prompts)
    write_trace(recording.trace, arguments.output)
    for failure in recording.failures[:5]:
        print(f"eldr: {failure}", file=sys.stderr)
    print(f"{arguments.output}: {len(prompts) - len(recording.failures)} of {len(prompts)} prompts recorded")
    return EXIT_FAILED if recording.failures else 0


def _source(arguments: argparse.Namespace) -> Source:
    """Return the source that was asked for. Raises RecordError."""
    from eldr.counts import CountsError
    from eldr.record import Connector, MoeShape, RecordError, RecordOptions, RoutedExperts, Sglang
    from eldr.routed_experts import parse_geometry

    name = arguments.source
    if name == "transformers":
        if arguments.url is not None or arguments.model is None:
            raise RecordError("--source transformers runs the model itself: give --model, and no --url")
        from eldr.record.transformers import Transformers, TransformersOptions

        return Transformers(
            TransformersOptions(
                arguments.model, arguments.max_tokens, temperature=arguments.temperature, dtype=arguments.dtype
            )
        )
    if arguments.url is None:
        raise RecordError(f"--source {name} needs the server's --url")
    if arguments.admin_key_file is not None and name != "connector":
        raise RecordError("a router is recorded with --source connector; give other sources the URL of a worker")
    options = RecordOptions(
        url=arguments.url,
        model=arguments.model,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        concurrency=arguments.concurrency,
        timeout_s=arguments.timeout_s,
        api_key=read_key_file(arguments.api_key_file),
        admin_key=read_key_file(arguments.admin_key_file),
    )
    if name not in NEED_GEOMETRY:
        return Connector(options)
    if arguments.geometry is None:
        raise RecordError(f"--source {name} needs --geometry LAYERSxEXPERTSxTOP_K, such as 48x128x8")
    try:
        shape = MoeShape(*parse_geometry(arguments.geometry))
    except CountsError as error:
        raise RecordError(f"--geometry: {error}") from None
    return RoutedExperts(options, shape) if name == "routed-experts" else Sglang(options, shape)
