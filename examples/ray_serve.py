"""Ray Serve LLM with a policy of eldr: which replica gets a request is decided by the words of its prompt.

    eldr fit trace.npz --workers 2 -o model.eldr.npz      # of a trace recorded with --keep-prompts
    MODEL=Qwen/Qwen3-30B-A3B CALIBRATION=model.eldr.npz REPLICAS=2 serve run examples.ray_serve:app

For Ray Serve LLM 2.60, in an environment with `ray[llm]` and eldr. See docs/integrations.md for what this costs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from eldr.calibration import load_calibration
from eldr.policies import PolicyOptions, make_policy
from eldr.policies.base import DecodeRequest
from eldr.prompt.words import words_of_text

log = logging.getLogger("ray.serve")

BYTES_PER_TOKEN = 4


class EldrRequestRouter(RequestRouter):
    """Chooses replicas by a policy of eldr. It knows the requests that were sent through the handle that it belongs to.

    Nothing but the prompt is known before prefill, so the policy should be expected-union or locality-band with the
    signature "prompt", and the calibration must hold a prompt model.
    """

    def initialize_state(self, policy: str = "expected-union", calibration: str | None = None, seed: int = 0) -> None:
        """Called by Ray with the `request_router_kwargs`."""
        fitted = None if calibration is None else load_calibration(calibration)
        self._policy = make_policy(policy, PolicyOptions(signature="prompt"), calibration=fitted, seed=seed)
        self._running: dict[str, tuple[DecodeRequest, str]] = {}
        self._in_flight: dict[str, int] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Replicas came or went."""
        super().update_replicas(replicas)
        names = {replica.replica_id.unique_id for replica in replicas}
        for name in sorted(names - self._in_flight.keys()):
            self._in_flight[name] = 0
            self._policy.joined(name)
        for name in sorted(self._in_flight.keys() - names):
            for request_id in [key for key, (_, worker) in self._running.items() if worker == name]:
                self._finish(request_id)
            del self._in_flight[name]
            self._policy.left(name)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the chosen replica, and then the others, which get the request if that one is full."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        in_flight = {name: self._in_flight[name] for name in by_name if name in self._in_flight}
        if pending_request is None or not in_flight:
            return [candidate_replicas]
        try:
            chosen = by_name.pop(self._policy.choose(_known(pending_request), in_flight).worker)
        except Exception:  # a failing policy never fails a request
            log.exception("eldr's policy failed; the least loaded replica gets the request")
            chosen = by_name.pop(min(in_flight, key=lambda name: in_flight[name]))
        others = sorted(by_name, key=lambda name: in_flight.get(name, 0))
        return [[chosen], *([by_name[name]] for name in others)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A replica has accepted the request."""
        name, request = replica_id.unique_id, _known(pending_request)
        self._finish(request.request_id)
        if name in self._in_flight:
            self._in_flight[name] += 1
            self._policy.started(request, name)
            request.forget_counts()
            self._running[request.request_id] = request, name

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """A request has ended, for whatever reason."""
        self._finish(internal_request_id)

    def _finish(self, request_id: str) -> None:
        request, name = self._running.pop(request_id, (None, ""))
        if request is not None:
            self._in_flight[name] -= 1
            self._policy.finished(request, name)


def _known(pending: PendingRequest) -> DecodeRequest:
    """What the policy knows of a request."""
    text, most = b"", None
    for argument in (*pending.args, *pending.kwargs.values()):
        prompt = getattr(argument, "messages", None) or getattr(argument, "prompt", None)
        if prompt is not None:
            text = _text(prompt).encode()
            most = getattr(argument, "max_tokens", None)
    tokens = len(text) // BYTES_PER_TOKEN + 1
    return DecodeRequest(pending.metadata.internal_request_id, tokens, max_tokens=most, words=words_of_text(text))


def _text(prompt: Any) -> str:
    """The text of a prompt or of a conversation. System messages in front say nothing about one request."""
    if isinstance(prompt, str):
        return prompt
    messages = [message if isinstance(message, dict) else message.model_dump() for message in prompt]
    while len(messages) > 1 and messages[0].get("role") == "system":
        del messages[0]
    return "\n".join(text for message in messages for text in _texts(message.get("content")))


def _texts(content: Any) -> Iterable[str]:
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content or () if isinstance(part, dict) and isinstance(part.get("text"), str)]


def app(arguments: dict[str, str]) -> Any:
    """Build the application. One ingress replica, because each would have a router that knows only its own requests."""
    from ray.serve.llm import LLMConfig, ModelLoadingConfig, build_openai_app

    model = os.environ["MODEL"]
    router = RequestRouterConfig(
        request_router_class=EldrRequestRouter,
        request_router_kwargs={"calibration": os.environ.get("CALIBRATION")},
    )
    config = LLMConfig(
        model_loading_config=ModelLoadingConfig(model_id=model, model_source=model),
        deployment_config={"num_replicas": int(os.environ.get("REPLICAS", "2")), "request_router_config": router},
    )
    return build_openai_app({"llm_configs": [config], "ingress_deployment_config": {"num_replicas": 1}})
