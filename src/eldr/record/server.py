"""A server to record from, over HTTP: a worker or a router."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from eldr.record.prompts import Prompt, RecordError
from eldr.record.sources import MoeShape, Sample, Source, sample_of_rows

ERROR_BODY_CHARS = 300


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """Where and how to record.

    url: a worker, or a router.
    model: the model name. None asks the server, which must then serve exactly one model.
    max_tokens: generated tokens per request, at most.
    temperature: the sampling temperature.
    concurrency: requests in flight at a time.
    timeout_s: the time limit of each request.
    api_key: the worker's API key, if it has one.
    admin_key: the router's admin key. If given, the server is taken to be a router.
    """

    url: str
    model: str | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    concurrency: int = 8
    timeout_s: float = 600.0
    api_key: str | None = None
    admin_key: str | None = None

    def headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self.admin_key is not None:
            headers |= {"X-Eldr-Record": "1", "Authorization": f"Bearer {self.admin_key}"}
        elif self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers


def only_model(options: RecordOptions) -> str:
    """Return the name of the server's only model. Raises RecordError if it serves none or several."""
    models = [model.get("id") for model in call(options, "/v1/models").get("data", []) if isinstance(model, dict)]
    if len(models) != 1 or not isinstance(models[0], str):
        raise RecordError(f"{options.url} serves {len(models)} models ({models}); name one with --model")
    return models[0]


def call(options: RecordOptions, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Send one request, a POST if it has a body, and return the JSON object of its answer. Raises RecordError."""
    base = options.url.rstrip("/").removesuffix("/v1")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data, options.headers())
    try:
        with urllib.request.urlopen(request, timeout=options.timeout_s) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        text = error.read(ERROR_BODY_CHARS).decode(errors="replace")
        raise RecordError(f"{base + path} answered {error.code}: {text}") from None
    except (OSError, ValueError) as error:
        raise RecordError(f"{base + path}: {error}") from None
    if not isinstance(answer, dict):
        raise RecordError(f"{base + path} answered something other than a JSON object")
    return answer


class ServerSource(Source):
    """A source behind a URL. Subclasses say what they ask for and where it is in the answer."""

    def __init__(self, options: RecordOptions) -> None:
        self.options = options
        self.model = options.model if options.model is not None else only_model(options)
        self.concurrency = options.concurrency

    def ask(self, prompt: Prompt, **members: Any) -> dict[str, Any]:
        """Send the prompt, with `members` added to its body, and return the answer. Raises RecordError."""
        options = self.options
        body = {
            **prompt.body,
            "model": self.model,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "stream": False,
            **members,
        }
        return call(options, prompt.path, body)


def usage_of(answer: dict[str, Any]) -> tuple[int, int]:
    """The tokens of prompt and answer. Raises RecordError if the server does not state them."""
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    prompt, generated = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is not int or type(generated) is not int or prompt < 1 or generated < 1:
        raise RecordError("the answer does not state the tokens of prompt and answer in its usage")
    return prompt, generated


def sample_of(rows: Any, shape: MoeShape, answer: dict[str, Any]) -> Sample:
    """Split `rows` by the usage of the answer. Raises RecordError or CountsError."""
    return sample_of_rows(rows, shape, *usage_of(answer))
