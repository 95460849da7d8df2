"""The component between Dynamo's real frontend and fake workers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.dynamo.deployment import Deployment, FakeWorker, wait_until

pytest.importorskip("dynamo.runtime", reason="needs ai-dynamo: make test-dynamo")

# One letter is one token of the tests' model.
A, B = "aaaa bbbb", "bbbb aaaa"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    found = Deployment(tmp_path_factory.mktemp("dynamo"))
    try:
        found.start_component("--policy", "expected-union", "--learn", "off")
        found.start_frontend()
        found.prefill = found.worker("prefill", "p0")  # type: ignore[attr-defined]
        found.wait_ready()
        yield found
    finally:
        found.stop()


@pytest.fixture
def workers(deployment: Deployment, request: pytest.FixtureRequest) -> Iterator[list[FakeWorker]]:
    """Two decode workers of the test's own, which is also the test that they may come and go."""
    names = [f"{request.node.name}-{number}" for number in range(2)]
    found = [deployment.worker("decode", name) for name in names]
    wait_until(lambda: deployment.metric("eldr_worker_ejected", role="decode") == 0, "metrics")
    wait_until(lambda: decode_workers(deployment) == 2, "the workers do not join")
    yield found
    for worker in found:
        worker.process.terminate()
    wait_until(lambda: decode_workers(deployment) == 0, "the workers do not leave")


def decode_workers(deployment: Deployment) -> int:
    return sum(1 for labels, _ in deployment._samples("eldr_inflight") if labels["role"] == "decode")


def in_flight(deployment: Deployment) -> float:
    return deployment.metric("eldr_inflight")


def stream_in_background(deployment: Deployment, prompt: str, tokens: int) -> threading.Thread:
    def read() -> None:
        with suppress(OSError), deployment.open(prompt, tokens, stream=True) as answer:
            answer.read()

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def test_answers_and_what_workers_get(deployment: Deployment, workers: list[FakeWorker]) -> None:
    status, answer = deployment.complete(A, 6)
    assert status == 200, answer
    assert answer["choices"][0]["text"] == "a" * 6
    assert answer["choices"][0]["finish_reason"] == "length"
    with deployment.open(A, 6, stream=True) as stream:
        events = [json.loads(line[6:]) for line in stream if line.startswith(b"data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == "a" * 6
    requests = [event["request"] for worker in workers for event in worker.events("decode")]
    assert len(requests) == 2
    for request in requests:
        params = request["prefill_result"]["disaggregated_params"]["kv_transfer_params"]
        assert params == {"do_remote_prefill": True, "remote_host": "p0", "eldr_lease": {"left_s": 30.0, "unix_s": 0.0}}
        assert request["token_ids"] == list(A.encode())


def test_requests_alike_share_a_worker(deployment: Deployment, workers: list[FakeWorker]) -> None:
    """Prompts of A and B use disjoint experts. By load alone, each worker would get both."""
    expected = deployment.metric("eldr_decisions_total", reason="expected_union")
    streams = []
    for number, prompt in enumerate((A, B, A, B, B, A), 1):
        streams.append(stream_in_background(deployment, f"{prompt} {number}", 100))
        wait_until(lambda begun=number: sum(len(w.events("decode")) for w in workers) == begun, "not begun")  # type: ignore[misc]
    for stream in streams:
        stream.join(60)
    firsts = [{event["request"]["token_ids"][0] for event in worker.events("decode")} for worker in workers]
    assert sorted(map(sorted, firsts)) == [[ord("a")], [ord("b")]]
    assert deployment.metric("eldr_decisions_total", reason="expected_union") == expected + 6
    assert deployment.metric("eldr_counts_errors_total") == 0
    wait_until(lambda: in_flight(deployment) == 0, "requests do not end")


def test_a_client_that_leaves(deployment: Deployment, workers: list[FakeWorker]) -> None:
    stream = deployment.open(A, 2000, stream=True)
    stream.readline()
    assert in_flight(deployment) == 1
    stream.close()
    wait_until(lambda: in_flight(deployment) == 0, "the request does not end")
    wait_until(lambda: any(worker.events("end") for worker in workers), "the worker does not hear of it")
    [end] = [event for worker in workers for event in worker.events("end")]
    assert end["stopped"]
    assert end["sent"] < 2000
    assert deployment.metric("eldr_worker_failures_total") == 0


def test_a_worker_that_dies(deployment: Deployment, workers: list[FakeWorker]) -> None:
    """Discovery names it for a while. Requests that it would get go to the other, with their hand-off."""
    streams = [stream_in_background(deployment, prompt, 2000) for prompt in (A, B)]
    wait_until(lambda: all(worker.events("decode") for worker in workers), "not on both workers")
    died, other = workers
    broken = deployment.metric("eldr_broken_streams_total")
    died.process.kill()
    wait_until(lambda: deployment.metric("eldr_broken_streams_total") == broken + 1, "the stream does not break")
    for number in range(6):
        status, answer = deployment.complete(f"{'ab'[number % 2]} {number}", 3)
        assert (status, answer["choices"][0]["text"]) == (200, "aaa"), answer
    assert len(other.events("end")) == 6
    assert in_flight(deployment) == 1
    other.process.kill()
    for stream in streams:
        stream.join(60)
    wait_until(lambda: in_flight(deployment) == 0, "requests do not end")


def test_a_worker_that_ends_gracefully(deployment: Deployment, workers: list[FakeWorker]) -> None:
    stream = stream_in_background(deployment, A, 100)
    wait_until(lambda: any(worker.events("decode") for worker in workers), "not begun")
    [busy] = [worker for worker in workers if worker.events("decode")]
    busy.process.terminate()
    wait_until(lambda: decode_workers(deployment) == 1, "it does not leave")
    stream.join(60)
    [end] = busy.events("end")
    assert end["sent"] == 100
    assert deployment.complete(A, 3)[0] == 200


def test_a_frontend_that_dies(deployment: Deployment, workers: list[FakeWorker]) -> None:
    stream = deployment.open(A, 2000, stream=True)
    stream.readline()
    assert deployment.frontend is not None
    deployment.frontend.kill()
    wait_until(lambda: in_flight(deployment) == 0, "the request does not end")
    deployment.start_frontend()
    deployment.wait_ready()
    assert deployment.complete(A, 3)[0] == 200
