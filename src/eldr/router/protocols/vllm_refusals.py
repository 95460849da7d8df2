"""What vLLM refuses for members that a prefill leg does not carry, said before a prefill is paid for.

Everything else reaches the prefill worker as the client wrote it, and that refuses it at once, in its own words. What
is checked here follows vLLM 0.30 to 0.32 (entrypoints/openai/*/protocol.py, sampling_params.py, renderers/params.py).
Where vLLM has plain words, they are used.
"""

from __future__ import annotations

from eldr.kernels import JsonNames, JsonObject, JsonValue
from eldr.router.http.errors import ApiError
from eldr.router.protocols.json_text import OBJECT
from eldr.router.protocols.lenient import boolean, is_true, whole_number
from eldr.router.protocols.openai import MESSAGES, Endpoint, stream_options

# Members that put the prompt into the answer. A prefill leg goes without.
THINKING = JsonNames(("type", "budget_tokens"))
PROMPT_IN_ANSWER = ("return_token_ids", "return_prompt_text")


def refuse_early(endpoint: Endpoint, body: JsonObject, max_model_len: int | None) -> None:
    """Raise ApiError 400 for a body that the decode worker would refuse, and the prefill worker would not.

    max_model_len: the tokens that prompt and answer may have together. None if it is unknown.
    """
    limit = _limit(endpoint, body, max_model_len)
    if not endpoint.choices:
        _boolean("stream", body.get("stream"))
        if endpoint.path == MESSAGES:
            _check_messages(body, limit)
        return
    if "min_tokens" in body:
        least = _integer("min_tokens", body.get("min_tokens"))
        if least < 0:
            raise ApiError(400, f"min_tokens must be greater than or equal to 0, got {least}.", param="min_tokens")
        most = max_model_len if limit is None else limit
        if most is not None and least > most:
            raise ApiError(
                400, f"min_tokens must be less than or equal to max_tokens={most}, got {least}.", param="min_tokens"
            )
    _check_stream(body)
    for name in PROMPT_IN_ANSWER:
        if name in body:
            _boolean(name, body.get(name))


def _limit(endpoint: Endpoint, body: JsonObject, max_model_len: int | None) -> int | None:
    """The limit on generated tokens that vLLM would use. None if there is none."""
    limit, of = None, ""
    for name in endpoint.limits:
        value = body.get(name)
        if value is not None:
            number = _integer(name, value)
            if limit is None:
                limit, of = number, name
    if limit is None:
        return endpoint.default_limit
    if limit < 1:
        raise ApiError(400, f"max_tokens must be at least 1, got {limit}.", param=of)
    if max_model_len is not None and limit > max_model_len:
        raise ApiError(
            400,
            f"{of}={limit} cannot be greater than max_model_len={max_model_len}. Please request fewer output tokens.",
            param=of,
        )
    return limit


def _check_messages(body: JsonObject, limit: int | None) -> None:
    """What the limit of a prefill leg would hide from anthropic/protocol.py."""
    if limit is None:
        raise ApiError(400, "max_tokens must be an integer", param="max_tokens")
    thinking = body.inner("thinking", THINKING)
    if thinking is None or thinking.get("type") != "enabled":
        return
    budget = whole_number(thinking.get("budget_tokens"))
    if budget is not None and budget >= limit:
        raise ApiError(400, "thinking.budget_tokens must be less than max_tokens", param="thinking")


def _check_stream(body: JsonObject) -> None:
    stream = body.get("stream")
    _boolean("stream", stream)
    options = body.get("stream_options")
    if options is None:
        return
    if is_true(options) and not is_true(stream):
        raise ApiError(400, "Stream options can only be defined when `stream=True`.", param="stream_options")
    if not isinstance(options, bytes) or options[0] != OBJECT:
        raise ApiError(400, "stream_options must be an object", param="stream_options")
    known = stream_options(body)
    if known is not None:
        for name, _, _ in known.members:
            _boolean(f"stream_options.{name}", known.get(name))


def _integer(name: str, value: JsonValue) -> int:
    number = whole_number(value)
    if number is None:
        raise ApiError(400, f"{name} must be an integer", param=name)
    return number


def _boolean(name: str, value: JsonValue) -> None:
    if value is not None and boolean(value) is None:
        raise ApiError(400, f"{name} must be true or false", param=name)
