"""The component between Dynamo's real frontend and fake workers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.dynamo.deployment import Deployment, FakeWorker, wait_until

pytest.importorskip("dynamo.runtime", reason="needs ai-dynamo: make test-dynamo")

# One letter is one token of the tests' model.
A, B = "aaaa bbbb", "bbbb aaaa"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    found = Deployment(tmp_path_factory.mktemp("dynamo"))
    try:
        log = str(found.folder / "decisions")
        found.start_component("--policy", "expected-union", "--learn", "off", "--decision-log", log)
        found.start_frontend()
        found.worker("prefill", "p0")
        found.wait_ready()
        yield found
    finally:
        found.stop()


@pytest.fixture
def workers(deployment: Deployment, request: pytest.FixtureRequest) -> Iterator[list[FakeWorker]]:
    """Two decode workers of the test's own, which is also the test that they may come and go."""
    names = [f"{request.node.name}-{number}" for number in range(2)]
    found = [deployment.worker("decode", name) for name in names]
    wait_until(lambda: decode_workers(deployment) == 2, "the workers do not join")
    yield found
    for worker in found:
        worker.process.terminate()
    wait_until(lambda: decode_workers(deployment) == 0, "the workers do not leave")


def decode_workers(deployment: Deployment) -> int:
    return sum(1 for labels, _ in deployment.samples("eldr_inflight") if labels["role"] == "decode")


def in_flight(deployment: Deployment) -> float:
    return deployment.metric("eldr_inflight")


class Stream:
    """A stream that is read in the background."""

    def __init__(self, deployment: Deployment, prompt: str, tokens: int) -> None:
        self.text = ""
        self._thread = threading.Thread(target=self._read, args=(deployment, prompt, tokens))
        self._thread.start()

    def _read(self, deployment: Deployment, prompt: str, tokens: int) -> None:
        with deployment.open(prompt, tokens, stream=True) as answer:
            events = [json.loads(line[6:]) for line in answer if line.startswith(b"data: {")]
        self.text = "".join(event["choices"][0]["text"] for event in events if "choices" in event)

    def join(self) -> str:
        self._thread.join(60)
        return self.text


def test_answers_and_what_workers_get(deployment: Deployment, workers: list[FakeWorker]) -> None:
    status, answer = deployment.complete(A, 6)
    assert status == 200, answer
    assert answer["choices"][0]["text"] == "a" * 6
    assert answer["choices"][0]["finish_reason"] == "length"
    assert Stream(deployment, A, 6).join() == "a" * 6
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
        streams.append(Stream(deployment, f"{prompt} {number}", 100))
        wait_until(lambda begun=number: sum(len(w.events("decode")) for w in workers) == begun, "not begun")  # type: ignore[misc]
    assert all(stream.join() == "a" * 100 for stream in streams)
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
    """Its stream breaks, which the frontend mends: it has the rest generated elsewhere.

    Discovery names the worker for a while. What it would get goes to the other, with its hand-off.
    """
    streams = [Stream(deployment, prompt, 200) for prompt in (A, B)]
    wait_until(lambda: all(worker.events("decode") for worker in workers), "not on both workers")
    died, other = workers
    broken = deployment.metric("eldr_broken_streams_total")
    died.process.kill()
    wait_until(lambda: deployment.metric("eldr_broken_streams_total") == broken + 1, "the stream does not break")
    prefills = deployment.metric("eldr_handoffs_total")
    for number in range(6):
        status, answer = deployment.complete(f"{'ab'[number % 2]} {number}", 3)
        assert status == 200, answer
        assert answer["choices"][0]["text"] == "aaa"
    assert deployment.metric("eldr_handoffs_total") == prefills + 6
    assert [stream.join() for stream in streams] == ["a" * 200] * 2
    assert len(other.events("end")) == 8
    wait_until(lambda: in_flight(deployment) == 0, "requests do not end")


def test_a_worker_that_ends_gracefully(deployment: Deployment, workers: list[FakeWorker]) -> None:
    stream = Stream(deployment, A, 100)
    wait_until(lambda: any(worker.events("decode") for worker in workers), "not begun")
    [busy] = [worker for worker in workers if worker.events("decode")]
    busy.process.terminate()
    assert stream.join() == "a" * 100
    [end] = busy.events("end")
    assert end["sent"] == 100
    wait_until(lambda: decode_workers(deployment) == 1, "it does not leave")
    assert deployment.complete(A, 3)[0] == 200


@pytest.mark.parametrize(
    ("error", "status", "failures"),
    [
        ("ValueError", 400, {}),
        ("InvalidArgument", 400, {}),
        ("RuntimeError", 500, {"status": 1}),
        ("EngineShutdown", 503, {"failed": 2}),
        ("+EngineShutdown", 503, {"failed": 2}),
    ],
)
def test_the_error_of_a_worker(deployment: Deployment, error: str, status: int, failures: dict[str, int]) -> None:
    """The frontend tries once more what another worker may do better, and tells the client of the rest."""
    worker = deployment.worker("decode", f"error-{error}", error)
    wait_until(lambda: decode_workers(deployment) == 1, "it does not join")
    try:
        answered, answer = deployment.complete(A, 3)
        assert answered == status, answer
        found = deployment.samples("eldr_worker_failures_total")
        assert {labels["reason"]: value for labels, value in found if labels["role"] == "decode"} == failures
        assert in_flight(deployment) == 0
    finally:
        worker.process.terminate()
        wait_until(lambda: decode_workers(deployment) == 0, "it does not leave")


def test_no_decode_worker(deployment: Deployment) -> None:
    assert deployment.complete(A, 3)[0] == 503
    assert in_flight(deployment) == 0


def test_a_prefill_worker_without_counts(deployment: Deployment, workers: list[FakeWorker]) -> None:
    """Both prefill workers get prompts, each those that begin alike."""
    another = deployment.worker("prefill", "p1", "no-counts")
    try:
        wait_until(lambda: len(list(deployment.samples("eldr_inflight"))) == 4, "it does not join")
        for number in range(20):
            assert deployment.complete(f"{number} {A}", 2)[0] == 200
        prompts = [event["request"]["token_ids"] for event in another.events("prefill")]
        assert 0 < len(prompts) < 20
        assert deployment.metric("eldr_counts_errors_total", reason="missing") == len(prompts)
        again = bytes(prompts[0]).decode()
        for _ in range(3):
            assert deployment.complete(again, 2)[0] == 200
        assert len(another.events("prefill")) == len(prompts) + 3
    finally:
        another.process.terminate()
        wait_until(lambda: len(list(deployment.samples("eldr_inflight"))) == 3, "it does not leave")


def test_a_frontend_that_dies(deployment: Deployment, workers: list[FakeWorker]) -> None:
    stream = deployment.open(A, 2000, stream=True)
    stream.readline()
    assert deployment.frontend is not None
    deployment.frontend.kill()
    wait_until(lambda: in_flight(deployment) == 0, "the request does not end")
    deployment.start_frontend()
    deployment.wait_ready()
    assert deployment.complete(A, 3)[0] == 200


def test_the_decisions_so_far_are_repeated(deployment: Deployment) -> None:
    log = deployment.folder / "decisions"
    decisions = deployment.metric("eldr_decisions_total")
    wait_until(lambda: log.read_text().count('"event":"choose"') == decisions, "not all decisions are written")
    repeated = subprocess.run(
        [sys.executable, "-m", "eldr", "decisions", str(log)], capture_output=True, text=True, check=False
    )
    assert repeated.returncode == 0, repeated.stdout + repeated.stderr
