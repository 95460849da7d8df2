"""What vLLM exposes of its load, word by word."""

from __future__ import annotations

from eldr.learning.step_counters import StepCounters

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


STEPS = """# TYPE vllm:inter_token_latency_seconds histogram
vllm:inter_token_latency_seconds_bucket{{engine="{engine}",le="0.01",model_name="tiny"}} 5.0
vllm:inter_token_latency_seconds_count{{engine="{engine}",model_name="tiny"}} {c.gaps}
vllm:inter_token_latency_seconds_sum{{engine="{engine}",model_name="tiny"}} {c.gaps_s}
vllm:iteration_tokens_total_count{{engine="{engine}",model_name="tiny"}} {c.steps}
vllm:iteration_tokens_total_sum{{engine="{engine}",model_name="tiny"}} 77.0
vllm:time_to_first_token_seconds_count{{engine="{engine}",model_name="tiny"}} {c.prompts}
vllm:num_preemptions_total{{engine="{engine}",model_name="tiny"}} {c.preemptions}
vllm:prompt_tokens_by_source_total{{engine="{engine}",model_name="tiny",source="external_kv_transfer"}} 5e3
vllm:prompt_tokens_by_source_total{{engine="{engine}",model_name="tiny",source="local_compute"}} {c.prompt_tokens}
vllm:eldr_active_experts_count{{engine="{engine}",model_name="tiny"}} {c.expert_steps}
vllm:eldr_active_experts_sum{{engine="{engine}",model_name="tiny"}} {c.experts}
"""


def steps_said(counted: StepCounters, engine: int = 0) -> str:
    """The exposition of an engine that has counted so much of its steps."""
    return STEPS.format(engine=engine, c=counted)
