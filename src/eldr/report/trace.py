"""Shows what a trace holds: a table for the terminal, or JSON."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from eldr.report.terminal import printable
from eldr.trace import Trace


def trace_as_json(trace: Trace) -> dict[str, Any]:
    """Return everything that `render_trace` shows, as JSON-serialisable values."""
    meta = trace.meta
    labels, counts = np.unique(trace.label, return_counts=True)
    return {
        "model": meta.model,
        "geometry": {"layers": meta.layers, "experts": meta.experts, "top_k": meta.top_k},
        "requests": trace.requests,
        "labels": dict(zip(labels.tolist(), counts.tolist(), strict=True)),
        "prompt_tokens": int(trace.prompt_tokens.sum()),
        "decode_rows": len(trace.decode_experts),
        "prompts": trace.has_prompts,
        "prompt_bytes": 0 if trace.prompt_text is None else len(trace.prompt_text),
        "arrivals": trace.arrival_s is not None,
        "gate_scores": trace.prefill_gate_prob is not None or trace.prefill_gate_logit is not None,
        "note": meta.note,
        "sha256": trace.sha256,
    }


def render_trace(trace: Trace) -> RenderableType:
    """Render the facts about a trace for a terminal."""
    found = trace_as_json(trace)
    geometry = found["geometry"]
    kinds = ", ".join(f"{label or 'no label'} ({count})" for label, count in found["labels"].items())
    prompts = f"kept, {found['prompt_bytes']} bytes" if trace.has_prompts else "not kept (record with --keep-prompts)"
    facts = {
        "model": found["model"] or "an unnamed model",
        "geometry": f"{geometry['layers']} layers x {geometry['experts']} experts, top-{geometry['top_k']}",
        "requests": f"{found['requests']}: {kinds}",
        "prompt tokens": str(found["prompt_tokens"]),
        "decode rows": str(found["decode_rows"]),
        "texts of prompts": prompts,
        "arrivals": "recorded" if found["arrivals"] else "not recorded",
        "gate scores": "recorded" if found["gate_scores"] else "not recorded",
        "recording": found["note"],
        "sha256": found["sha256"],
    }
    table = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        if fact:
            table.add_row(Text(name, style="bold"), Text(printable(fact)))
    return table
