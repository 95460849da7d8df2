"""Worker processes: started, watched, paused and never left behind. A small server stands in for vLLM."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eldr.demo.ports import free_ports
from eldr.demo.workers import WorkerError, WorkerProcess, WorkerSpec

# Ignores the module it is asked to run; answers /health and has a child, as an API server has its engine.
ROOT = Path(__file__).parents[2]
SERVER = """
import http.server, json, os, pathlib, subprocess, sys
child = subprocess.Popen(["sleep", "1000"])
pathlib.Path(os.environ["PIDS"]).write_text(json.dumps([os.getpid(), child.pid]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
print("environment", os.environ.get("VLLM_CPU_KVCACHE_SPACE"), flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
FAILURE = """
import sys
print("(EngineCore pid=1) ERROR [core.py:1] ValueError: the real cause")
print("\\n".join(f"line {i}" for i in range(100)))
print("RuntimeError: see above")
sys.exit(3)
"""


def stand_in(folder: Path, program: str) -> Path:
    """An executable that runs `program` whatever its arguments are."""
    script = folder / "python"
    script.write_text(f"#!{sys.executable}\n{program}")
    script.chmod(0o755)
    return script


def spec(folder: Path, program: str) -> WorkerSpec:
    return WorkerSpec(
        role="decode",
        port=free_ports(1)[0],
        side_channel_port=free_ports(1)[0],
        model_dir=folder,
        served_name="m",
        python=stand_in(folder, program),
        log_path=folder / "logs" / "worker.log",
        extra_config={"eldr_lease_margin_s": 3},
        extra_env={"PIDS": str(folder / "pids")},
    )


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerProcess]:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    worker = WorkerProcess(spec(tmp_path, SERVER))
    worker.start()
    worker.wait_ready(30)
    yield worker
    worker.stop()


def pids(folder: Path) -> list[int]:
    return list(json.loads((folder / "pids").read_text()))


def state(pid: int) -> str:
    """The letter of the kernel's process state, empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_stop_leaves_nothing_behind(worker: WorkerProcess, tmp_path: Path) -> None:
    assert worker.healthy()
    assert worker.url == f"http://127.0.0.1:{worker.spec.port}"
    worker.stop()
    worker.stop()
    assert not worker.healthy()
    assert worker.pid is None
    eventually(lambda: all(state(pid) in ("", "Z") for pid in pids(tmp_path)))


def test_pause_and_resume_reach_every_process(worker: WorkerProcess, tmp_path: Path) -> None:
    worker.pause()
    eventually(lambda: [state(pid) for pid in pids(tmp_path)] == ["T", "T"])
    assert not worker.healthy(timeout_s=0.5)
    worker.resume()
    assert worker.healthy()
    worker.pause()  # and a paused worker can be stopped


def test_the_environment_does_not_override_the_cache_size(worker: WorkerProcess) -> None:
    assert "environment None" in worker.spec.log_path.read_text()


def test_a_worker_that_dies_is_explained(tmp_path: Path) -> None:
    worker = WorkerProcess(spec(tmp_path, FAILURE))
    worker.start()
    with pytest.raises(WorkerError) as caught:
        worker.wait_ready(30)
    text = str(caught.value)
    assert f"decode worker on port {worker.spec.port} exited with status 3" in text
    assert "ValueError: the real cause" in text
    assert str(worker.spec.log_path) in text
    assert text.endswith("| line 99\n  | RuntimeError: see above")
    assert "line 10\n" not in text


def test_a_worker_that_is_never_ready(tmp_path: Path) -> None:
    worker = WorkerProcess(spec(tmp_path, "import time; time.sleep(1000)"))
    worker.start()
    with pytest.raises(WorkerError, match="not ready within 1 s"):
        worker.wait_ready(1)
    worker.stop()


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    worker = WorkerProcess(spec(tmp_path, SERVER))
    worker.spec.python.unlink()
    with pytest.raises(WorkerError, match=r"cannot be started.*python"):
        worker.start()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_die_with_their_owner(tmp_path: Path, number: signal.Signals) -> None:
    """However the owner ends: killed, terminated or interrupted."""
    owner = f"""
    import signal, sys, time
    from pathlib import Path
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may have started us with it ignored
    from tests.vllm.test_workers import SERVER, spec
    from eldr.demo.workers import WorkerProcess
    worker = WorkerProcess(spec(Path({str(tmp_path)!r}), SERVER))
    worker.start()
    worker.wait_ready(30)
    print("ready", flush=True)
    time.sleep(1000)
    """
    command = [sys.executable, "-c", textwrap.dedent(owner)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            running = pids(tmp_path)
            assert all(state(pid) not in ("", "Z") for pid in running)
            process.send_signal(number)
            process.wait(30)
            eventually(lambda: all(state(pid) in ("", "Z") for pid in running))
        finally:
            process.kill()


def test_a_port_that_is_taken(worker: WorkerProcess) -> None:
    with pytest.raises(WorkerError, match="cannot use its port: Address already in use"):
        WorkerProcess(worker.spec).start()
    assert worker.healthy()


def test_command_line(tmp_path: Path) -> None:
    command = spec(tmp_path, SERVER).command()
    transfer = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert transfer["kv_role"] == "kv_consumer"
    assert transfer["kv_connector_extra_config"] == {"num_threads": 0, "eldr_lease_margin_s": 3}
    assert command[command.index("--dtype") + 1] == "float32"
