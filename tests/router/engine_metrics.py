"""What vLLM exposes of its load, word by word."""

from __future__ import annotations

METRICS = """# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="{engine}",model_name="tiny"}} {waiting}
vllm:num_requests_waiting_by_reason{{engine="{engine}",model_name="tiny",reason="capacity"}} {capacity}
vllm:num_requests_waiting_by_reason{{engine="{engine}",model_name="tiny",reason="deferred"}} 9.0
vllm:kv_cache_usage_perc{{engine="{engine}",model_name="tiny"}} {kv}
vllm:e2e_request_latency_seconds_bucket{{engine="{engine}",le="0.3",model_name="tiny"}} 12.0
"""


def said(waiting: int = 0, kv: float = 0.5, engine: int = 0) -> str:
    """The exposition of an engine with `waiting` requests that wait for room, and 9 that wait for something else."""
    return METRICS.format(engine=engine, waiting=waiting + 9, capacity=waiting, kv=kv)
