"""Bodies of /v1/completions and /v1/chat/completions: what is refused, what cannot be handed off, and the prefill body.

The lists follow vLLM 0.30 to 0.32 (vllm/entrypoints/openai/*/protocol.py).
"""

from __future__ import annotations

from typing import Any

import orjson

from eldr.router.http.errors import ApiError

COMPLETIONS = b"/v1/completions"
CHAT = b"/v1/chat/completions"

# Fields that name hosts, blocks or caches of other workers. Only the router may send them.
TRANSFER_FIELDS = ("kv_transfer_params", "ec_transfer_params")

# Fields that only say how tokens are sampled, when to stop, or how the answer is written: the one token of a prefill
# is thrown away. Whatever can change the prompt's tokens stays: messages, tools, tool_choice, response_format and
# reasoning_effort (templates may render them), chat_template and its arguments, truncation, cache_salt, ...
# fmt: off
NOT_FOR_PREFILL = frozenset((
    "stream", "stream_options", "stream_interval", "min_tokens", "ignore_eos", "stop", "stop_token_ids",
    "include_stop_str_in_output", "temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty",
    "presence_penalty", "repetition_penalty", "length_penalty", "repetition_detection", "watermarking",
    "logit_bias", "bad_words", "allowed_token_ids", "thinking_token_budget", "logprobs", "top_logprobs",
    "logprob_token_ids", "prompt_logprobs", "echo", "best_of", "use_beam_search", "structured_outputs",
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend",
    "guided_whitespace_pattern", "skip_special_tokens", "spaces_between_special_tokens",
    "return_tokens_as_token_ids", "return_token_ids", "return_prompt_text", "return_token_offsets",
    "routed_experts_prompt_start", "user",
))
# fmt: on

TEXT_PARTS = frozenset(("text", "input_text", "output_text", "refusal", "thinking"))


def parse_body(path: bytes, raw: bytes) -> dict[str, Any]:
    """The body as an object. Duplicate keys are resolved here, to the last one, once for all who read it.

    Raises ApiError 400 for what is not a JSON object, carries fields that only the router may set, or has no prompt.
    """
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the request body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the request body must be a JSON object")
    _refuse_router_fields(body, "")
    extra = body.get("vllm_xargs")
    if isinstance(extra, dict):
        _refuse_router_fields(extra, "vllm_xargs.")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise ApiError(400, "model must be a string", param="model")
    if path == CHAT:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ApiError(400, "messages must be a non-empty array", param="messages")
    elif not body.get("prompt") and not body.get("prompt_embeds"):
        raise ApiError(400, "prompt must be given and not empty", param="prompt")
    return body


def _refuse_router_fields(fields: dict[str, Any], where: str) -> None:
    for key in fields:
        if key in TRANSFER_FIELDS or key.startswith("eldr_"):
            raise ApiError(400, f"{where}{key} is set by the router, not by a client", param=f"{where}{key}")


def why_not_handed_off(path: bytes, body: dict[str, Any]) -> str | None:
    """Why this request must run whole on one worker, as a snake_case word; None if its prefill can be handed off.

    A hand-off is one prompt's blocks, pulled once: children of one request would pull them again after they were
    freed. Prompt logprobs need the prompt's forward pass on the worker that answers.
    """
    if body.get("n") not in (None, 1):
        return "n"
    if body.get("best_of") not in (None, 1):
        return "best_of"
    if body.get("use_beam_search"):
        return "beam_search"
    if body.get("echo"):
        return "echo"
    if body.get("prompt_logprobs") is not None:
        return "prompt_logprobs"
    if body.get("truncate_prompt_tokens") == -1:
        # Truncation to the context leaves room for max_tokens, which the prefill changes: other tokens than here.
        return "truncate_to_context"
    return _why_not_chat(body) if path == CHAT else _why_not_completion(body)


def _why_not_completion(body: dict[str, Any]) -> str | None:
    if body.get("prompt_embeds") is not None:
        return "prompt_embeds"
    if body.get("suffix") is not None:
        return "suffix"
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        return "prompt_list"
    return None


def _why_not_chat(body: dict[str, Any]) -> str | None:
    for message in body["messages"]:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            for part in content:
                if isinstance(part, dict) and part.get("type") not in TEXT_PARTS:
                    return "multimodal"
    return None


def prefill_body(body: dict[str, Any], record: bool) -> bytes:
    """The request to a prefill worker: the same prompt, one token, no stream, and the promise to fetch the blocks.

    Raises ApiError for what is nested too deeply.
    """
    fields = {key: value for key, value in body.items() if key not in NOT_FOR_PREFILL}
    fields["max_tokens"] = 1
    fields["max_completion_tokens"] = 1
    fields["n"] = 1
    fields["stream"] = False
    params: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
    if record:
        params["eldr_record"] = True
    fields["kv_transfer_params"] = params
    return _to_json(fields)


def decode_body(body: dict[str, Any], params: dict[str, Any] | None) -> bytes:
    """The client's request with the hand-off, or without one if `params` is None. Raises ApiError as `prefill_body`."""
    return _to_json(body if params is None else {**body, "kv_transfer_params": params})


def _to_json(fields: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(fields)
    except orjson.JSONEncodeError as error:  # nested deeper than orjson writes, though not than it reads
        raise ApiError(400, f"the request body cannot be passed on: {error}") from None


def max_tokens(path: bytes, body: dict[str, Any]) -> int | None:
    """The client's limit on generated tokens, None if there is none."""
    value = body.get("max_completion_tokens") if path == CHAT else None
    if value is None:
        value = body.get("max_tokens")
    return value if type(value) is int else None


def wants_usage(body: dict[str, Any]) -> bool:
    """Whether a stream shall end with the usage."""
    options = body.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


def without_transfer_params(answer: bytes) -> bytes:
    """A worker's JSON answer without what it says about transfers. A plain worker's answer says null there."""
    # A quotation mark inside a JSON string is escaped, so this can only be a key with the value null.
    if answer.count(b"_transfer_params") == answer.count(b'_transfer_params":null'):
        return answer
    fields = orjson.loads(answer)
    if isinstance(fields, dict):
        for key in TRANSFER_FIELDS:
            if key in fields:
                fields[key] = None
    return orjson.dumps(fields)
