"""vLLM's hand-off over NIXL: first the prefill, then the decode with the addresses of its blocks.

The lists of fields follow vLLM 0.30 to 0.32 (vllm/entrypoints/openai/*/protocol.py).
"""

from __future__ import annotations

from typing import Any, ClassVar

import orjson

from eldr.router.fleet.workers import Worker
from eldr.router.http.errors import ApiError
from eldr.router.protocols.base import LegProtocol
from eldr.router.protocols.handoff import HandOff
from eldr.router.protocols.openai import CHAT

# Fields that name hosts, blocks or caches of other workers. Only the router may send them.
TRANSFER_FIELDS = ("kv_transfer_params", "ec_transfer_params")

# Fields that only control sampling, stopping or the format of the answer. The one token of a prefill is discarded, so
# they do not matter there. Fields that can change the prompt's tokens are kept: messages, tools, tool_choice,
# response_format and reasoning_effort (templates may render them), chat_template and its arguments, truncation,
# cache_salt, ...
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


class VllmNixl(LegProtocol):
    """The prefill worker keeps the blocks for the time of a lease, and the decode worker pulls them once."""

    reserved: ClassVar[tuple[str, ...]] = TRANSFER_FIELDS

    def why_whole(self, path: bytes, body: dict[str, Any]) -> str | None:
        """See the base class.

        A hand-off is one prompt's blocks, pulled once. Several children of one request would pull them again after they
        were freed. Prompt logprobs need the prompt's forward pass on the worker that answers.
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
            # Truncation to the context leaves room for max_tokens. The prefill changes max_tokens, and so the tokens.
            return "truncate_to_context"
        return _why_whole_chat(body) if path == CHAT else _why_whole_completion(body)

    def prefill_body(self, body: dict[str, Any], record: bool) -> bytes:
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

    def read_handoff(self, fields: object, source: Worker, sent_s: float) -> HandOff | None:
        if not isinstance(fields, dict):
            return None
        params = fields.get("kv_transfer_params")
        if not isinstance(params, dict) or params.get("do_remote_prefill") is not True:
            return None
        usage = fields.get("usage")
        tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        name = params.get("remote_request_id")
        return HandOff(params, source, name, tokens if type(tokens) is int else 0, sent_s)

    def decode_body(self, body: dict[str, Any], handoff: HandOff | None, record: bool) -> bytes:
        if handoff is not None:
            return _to_json({**body, "kv_transfer_params": handoff.spend(record)})
        return _to_json({**body, "kv_transfer_params": {"eldr_record": True}} if record else body)

    def is_named_after(self, name: object, leg_name: str) -> bool:
        """vLLM appends the X-Request-Id that it got to its own prefix."""
        return isinstance(name, str) and name.endswith("-" + leg_name)

    def event_is_named_after(self, start: bytes, leg_name: str) -> bool:
        return b"-" + orjson.dumps(leg_name)[1:] in start

    def handoff_is_named_after(self, handoff: HandOff, leg_name: str) -> bool:
        """vLLM's internal id is the id of the answer followed by a random part."""
        return isinstance(handoff.name, str) and f"-{leg_name}-" in handoff.name

    def for_client(self, answer: bytes) -> bytes:
        """The answer of a plain worker has transfer parameters of null."""
        # A quotation mark inside a JSON string is escaped, so this can only be a key with the value null.
        if answer.count(b"_transfer_params") == answer.count(b'_transfer_params":null'):
            return answer
        fields = orjson.loads(answer)
        if isinstance(fields, dict):
            for key in TRANSFER_FIELDS:
                if key in fields:
                    fields[key] = None
        return orjson.dumps(fields)

    def recorded(self, answer: bytes, handoff: HandOff | None) -> bytes:
        fields = orjson.loads(answer)
        params = fields.get("kv_transfer_params")
        params = params if isinstance(params, dict) else {}
        counts = params.get("eldr_counts") if handoff is None else handoff.counts_wire
        fields["kv_transfer_params"] = None
        fields["eldr_record"] = {"counts": counts, "decode_experts": params.get("eldr_decode_experts")}
        return orjson.dumps(fields)


def _why_whole_completion(body: dict[str, Any]) -> str | None:
    if body.get("prompt_embeds") is not None:
        return "prompt_embeds"
    if body.get("suffix") is not None:
        return "suffix"
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        return "prompt_list"
    return None


def _why_whole_chat(body: dict[str, Any]) -> str | None:
    for message in body["messages"]:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            for part in content:
                if isinstance(part, dict) and part.get("type") not in TEXT_PARTS:
                    return "multimodal"
    return None


def _to_json(fields: dict[str, Any]) -> bytes:
    """Encode a body for a worker.

    Raises ApiError 400 if it is nested too deeply for orjson to write (it reads deeper).
    """
    try:
        return orjson.dumps(fields)
    except orjson.JSONEncodeError as error:
        raise ApiError(400, f"the request body cannot be passed on: {error}") from None
