"""Record the trace that ships with eldr: `eldr record` of demo prompts on a vLLM worker with the shipped model.

    .envs/dev/bin/python training/record_trace.py --vllm-python .envs/vllm-0.32/bin/python

Some of the prompts may come up in a run of the demo with another seed; none is training text.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from eldr.demo.model import write_model
from eldr.demo.ports import free_ports
from eldr.demo.prompts import make_prompts
from eldr.demo.workers import WorkerProcess, WorkerSpec
from eldr.workloads.kinds import KINDS

NAME = "eldr-small-moe"
READY_TIMEOUT_S = 600.0
SEED = 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, required=True)
    parser.add_argument("--per-kind", type=int, default=100)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="greedy text of so small a model goes in circles"
    )
    parser.add_argument("--out", type=Path, default=Path("data/small-moe.npz"))
    parser.add_argument("--work", type=Path, default=Path("build/training/record"))
    args = parser.parse_args()
    write_model(args.work / "model")
    prompts = make_prompts(args.per_kind * len(KINDS), seed=SEED)
    lines = [json.dumps({"prompt": prompt.text, "label": prompt.kind}, ensure_ascii=False) for prompt in prompts]
    (args.work / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    port, side_channel_port = free_ports(2)
    worker = WorkerProcess(
        WorkerSpec(
            role="prefill",
            port=port,
            side_channel_port=side_channel_port,
            model_dir=args.work / "model",
            served_name=NAME,
            python=args.vllm_python.absolute(),
            log_path=args.work / "worker.log",
        )
    )
    worker.start()
    try:
        worker.wait_ready(READY_TIMEOUT_S)
        command = [sys.executable, "-m", "eldr", "record", str(args.work / "prompts.jsonl"), "--url", worker.url]
        command += ["--max-tokens", str(args.max_tokens), "--temperature", str(args.temperature)]
        command += ["--concurrency", "32", "--keep-prompts", "--output", str(args.out)]
        return subprocess.run(command, check=False).returncode
    finally:
        worker.stop()


if __name__ == "__main__":
    sys.exit(main())
