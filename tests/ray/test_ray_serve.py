"""examples/ray_serve.py in a real Ray Serve, with replicas that hold their requests instead of a model."""

from __future__ import annotations

import asyncio
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="needs ray[serve]: docs/integrations.md")
serve = pytest.importorskip("ray.serve")

from eldr.calibration import fit_calibration  # noqa: E402
from tests.synthetic import make_trace, prompts_of_kinds  # noqa: E402

KINDS, REQUESTS = 2, 80
TRACE = make_trace(requests=REQUESTS, layers=3, experts=16, top_k=2, kinds=KINDS, **prompts_of_kinds(REQUESTS, KINDS))


@pytest.fixture(scope="module")
def handles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """By policy, the handle of two replicas."""
    from ray.serve.config import RequestRouterConfig

    from examples.ray_serve import EldrRequestRouter

    calibration = tmp_path_factory.mktemp("ray") / "calibration.npz"
    fit_calibration(TRACE, 2, compare=False).save(calibration)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    found = {}
    try:
        for policy, fitted in (("expected-union", str(calibration)), ("jsq", None)):
            options = {"policy": policy, "calibration": fitted}
            router = RequestRouterConfig(request_router_class=EldrRequestRouter, request_router_kwargs=options)
            replica = serve.deployment(
                Replica, name=policy, num_replicas=2, max_ongoing_requests=100, request_router_config=router
            )
            found[policy] = serve.run(replica.bind(), name=policy, route_prefix=None)
        yield found
    finally:
        serve.shutdown()
        ray.shutdown()


class Replica:
    """Notes in the request's folder that it has begun, and ends when the folder has a file `end`."""

    async def __call__(self, request: Any) -> str:
        name = str(serve.get_replica_context().replica_id.unique_id)
        folder = Path(request.folder)
        (folder / f"begun-{uuid.uuid4()}").touch()
        while not (folder / "end").exists():
            await asyncio.sleep(0.02)
        if request.prompt == "fail":
            raise ValueError("as asked")
        return name


def ask(handle: Any, folder: Path, prompt: str) -> Any:
    """Send a request, and wait until it has begun."""
    folder.mkdir(exist_ok=True)
    begun = len(list(folder.glob("begun-*")))
    answer = handle.remote(SimpleNamespace(prompt=prompt, messages=None, max_tokens=5, folder=str(folder)))
    deadline_s = time.monotonic() + 30
    while len(list(folder.glob("begun-*"))) == begun:
        assert time.monotonic() < deadline_s, "the request does not begin"
        time.sleep(0.02)
    time.sleep(0.1)  # the router hears of it at about the same time
    return answer


def test_prompts_alike_share_a_replica(handles: dict[str, Any], tmp_path: Path) -> None:
    """By turns, each replica would get both kinds."""
    order = [0, 1, 3, 2, 4, 5, 7, 6]  # kinds 0 1 1 0 0 1 1 0
    answers = [ask(handles["expected-union"], tmp_path, TRACE.prompt(request).decode()) for request in order]
    (tmp_path / "end").touch()
    replicas = [answer.result(timeout_s=30) for answer in answers]
    of_kinds = [{replica for replica, at in zip(replicas, order, strict=True) if at % KINDS == kind} for kind in (0, 1)]
    assert [len(used) for used in of_kinds] == [1, 1]
    assert of_kinds[0] != of_kinds[1]


def test_every_request_ends_once(handles: dict[str, Any], tmp_path: Path) -> None:
    """Of two requests at a time, each replica gets one, as long as no other request is counted."""
    handle = handles["jsq"]
    cancelled = ask(handle, tmp_path / "cancelled", "anything")
    cancelled.cancel()
    failing = ask(handle, tmp_path / "failing", "fail")
    (tmp_path / "failing/end").touch()
    with pytest.raises(Exception, match="as asked"):
        failing.result(timeout_s=30)
    for number in range(8):
        folder = tmp_path / str(number)
        answers = [ask(handle, folder, "") for _ in range(2)]
        (folder / "end").touch()
        assert len({answer.result(timeout_s=30) for answer in answers}) == 2
        time.sleep(0.1)
