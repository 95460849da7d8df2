"""One router of several processes: what it shares, how it ends, and what happens when one of them dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from tests.router.experts.test_connector_reports import wire
from tests.router.fake_worker import FakeWorker
from tests.router.process.test_process import Clients, Workers, end, port_of, serve, successor_of, wait_for

# Nobody listens there.
DEAD = "http://127.0.0.1:1"
SUM = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")


@contextmanager
def machine(workers: Workers, *flags: Any, count: int = 3) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A router of that many processes, and its port."""
    process = serve(workers, "--processes", str(count), *flags)
    try:
        yield process, port_of(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        end_all(process, [process.pid])


def end_all(process: subprocess.Popen[str], pids: list[int]) -> None:
    """End these processes, of which `process` is the first, with all that they have started."""
    for pid in pids:
        for child in children(pid):
            end(child)
        end(pid)
    assert process.stderr is not None
    process.stderr.close()
    process.wait()


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def get(port: int, path: str, key: str = "", timeout_s: float = 10, **options: Any) -> Any:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers, **options)
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return answer.read().decode()


def samples(text: str, name: str, **labels: str) -> dict[str, float]:
    """Process -> the sum of its samples of a metric."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        match = SUM.match(line)
        if match is not None and match[1] == name:
            of = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            if all(of.get(key) == value for key, value in labels.items()):
                found[of["process"]] = found.get(of["process"], 0.0) + float(match[3])
    return found


def ask(port: int, count: int) -> None:
    """Send that many requests, each on a connection of its own."""
    body = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 4}).encode()
    for _ in range(count):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200
            answer.read()


def test_every_process_serves_and_any_shows_what_all_do() -> None:
    with Workers() as workers, machine(workers) as (_, port):
        ask(port, 60)
        for _ in range(5):
            requests = samples(get(port, "/metrics"), "eldr_request_total", status="200")
            assert requests.keys() == {"0", "1", "2"}
            assert sum(requests.values()) == 60
        assert all(count > 0 for count in requests.values())
        text = get(port, "/metrics")
        assert set(samples(text, "eldr_peers", state="synced").values()) == {2.0}
        types = [line for line in text.splitlines() if line.startswith("# TYPE ")]
        assert len(types) == len(set(types))
        assert json.loads(get(port, "/load")) == {"server_load": 0}


async def open_streams(port: int, count: int) -> list[aiohttp.ClientResponse]:
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 5000, "stream": True}
    return [await session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) for _ in range(count)]


class Streams:
    """Endless streams, all open at once, on an event loop of their own."""

    def __init__(self, port: int, count: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._answers = self._loop.run_until_complete(open_streams(port, count))
        assert all(answer.status == 200 for answer in self._answers)

    def close(self) -> None:
        for answer in self._answers:
            answer.close()
        self._loop.run_until_complete(asyncio.sleep(0.1))
        self._loop.close()


def slow(worker: FakeWorker) -> None:
    worker.tokens, worker.token_gap_s = ["x"] * 5000, 0.05


def running(port: int) -> dict[str, float]:
    """Process -> the requests that it runs on decode workers."""
    return samples(get(port, "/metrics"), "eldr_inflight", role="decode")


def everywhere(port: int) -> set[float]:
    """What each process believes of the requests of all."""
    text = get(port, "/metrics")
    own, others = samples(text, "eldr_inflight", role="decode"), samples(text, "eldr_inflight_elsewhere")
    return {own[process] + others[process] for process in own}


def test_processes_decide_as_one_and_a_dead_ones_requests_are_forgotten() -> None:
    with Workers() as workers:
        for worker in workers.all[1:]:
            slow(worker)
        with machine(workers) as (process, port):
            streams = Streams(port, 24)
            wait_for(lambda: sum(running(port).values()) == 24 and everywhere(port) == {24.0}, "all know all")
            loads = [worker.running for worker in workers.all[1:]]
            assert max(loads) - min(loads) <= 2
            victim = children(process.pid)[0]
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda: victim not in children(process.pid), "it is gone")
            wait_for(lambda: len(running(port)) == 3, "another has taken its place")
            left = sum(running(port).values())
            assert left < 24
            wait_for(lambda: everywhere(port) == {left}, "all know what is left")
            streams.close()
            wait_for(lambda: everywhere(port) == {0.0}, "nothing is left")


def test_a_process_that_dies_costs_no_request_but_its_own() -> None:
    with Workers() as workers, machine(workers, count=2) as (process, port):
        clients = Clients(port)
        try:
            wait_for(lambda: all(n > 3 for n in clients.answered), "everybody is served")
            os.kill(children(process.pid)[0], signal.SIGKILL)
            before = list(clients.answered)
            wait_for(lambda: all(n > b + 5 for n, b in zip(clients.answered, before, strict=True)), "all are served")
        finally:
            clients.join()
        assert len(clients.failed) <= 6  # one for each client, at most


def test_a_parent_without_descriptors_tries_again_until_it_has_some() -> None:
    with Workers() as workers, machine(workers, count=2) as (process, port):
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, hard))
        victim = children(process.pid)[0]
        os.kill(victim, signal.SIGKILL)
        said = []
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if "is tried again in 2 s" in line:  # twice the time of the first failure
                break
        assert any("cannot be started: [Errno 24] Too many open files" in line for line in said)
        assert len(children(process.pid)) == 1
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)
        wait_for(lambda: len(running(port)) == 2, "another has taken its place")


def test_the_admin_api_changes_all_processes_and_those_that_start_later(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret")
    with Workers() as workers:
        late = workers.all[2]
        flags = ("--admin-listen", "127.0.0.1:0", "--admin-key-file", str(key))
        process = subprocess_with_one_decode(workers, *flags)
        try:
            admin = admin_port_of(process)
            port = port_of(process)

            def change(method: str, path: str, **fields: Any) -> Any:
                data = json.dumps(fields).encode()
                return json.loads(get(admin, path, "secret", method=method, data=data))

            def known() -> dict[str, list[float]]:
                """Worker -> whether it is up, as each process sees it."""
                text, found = get(port, "/metrics"), {}
                for each in workers.all:
                    found[each.url] = list(samples(text, "eldr_worker_up", worker=each.url).values())
                return found

            change("POST", "/admin/workers", url=late.url, role="decode")
            wait_for(lambda: known()[late.url] == [1.0, 1.0], "it is up in both")
            victim = children(process.pid)[0]
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda: victim not in children(process.pid), "one is gone")
            wait_for(lambda: known()[late.url] == [1.0, 1.0], "the next process learns of it")
            for _ in range(4):
                listed = json.loads(get(admin, "/admin/workers", "secret"))["workers"]
                assert sorted(each["url"] for each in listed) == sorted(each.url for each in workers.all)
                assert json.loads(get(admin, "/ui/state", "secret"))["peers"]["processes"] == 2
            change("DELETE", "/admin/workers", url=late.url, role="decode")
            wait_for(lambda: known()[late.url] == [], "it is gone from both")
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            end_all(process, [process.pid])


def test_a_worker_that_came_back_is_not_let_go_again_by_a_process_that_starts_later(tmp_path: Path) -> None:
    key, file = tmp_path / "key", tmp_path / "eldr.toml"
    key.write_text("secret")
    with Workers() as workers:
        prefill, stays, returns = (worker.url for worker in workers.all)

        def write(*decode: str) -> None:
            file.write_text(f"prefill = {json.dumps([prefill])}\ndecode = {json.dumps(decode)}\n")

        write(stays, returns)
        flags = ("--config", file, "--admin-listen", "127.0.0.1:0", "--admin-key-file", key)
        process = serve_without_workers("--processes", "2", *flags)
        try:
            admin, port = admin_port_of(process), port_of(process)

            def up(url: str) -> list[float]:
                return list(samples(get(port, "/metrics"), "eldr_worker_up", worker=url).values())

            def drain(url: str) -> None:
                get(admin, "/admin/drain", "secret", method="POST", data=json.dumps({"url": url}).encode())
                wait_for(lambda: up(url) == [], "it has left")

            drain(returns)
            write(stays, DEAD)
            wait_for(lambda: up(DEAD) == [0.0, 0.0], "both have read that it is no longer listed")
            write(stays, returns)
            wait_for(lambda: up(returns) == [1.0, 1.0] and up(DEAD) == [], "it is back in both")
            drain(stays)
            victim = children(process.pid)[0]
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda: victim not in children(process.pid), "one is gone")
            # What was kept is told as soon as the next process is ready, and its own lists name both.
            wait_for(lambda: len(up(returns)) == 2 and up(stays) == [], "the next one has let the other go")
            assert up(returns) == [1.0, 1.0]
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            end_all(process, [process.pid])


def serve_without_workers(*flags: Any) -> subprocess.Popen[str]:
    """A router whose workers are not named by flags."""
    return serve(Workers(), *flags)


def subprocess_with_one_decode(workers: Workers, *flags: str) -> subprocess.Popen[str]:
    all_workers, workers.all = workers.all, workers.all[:2]
    try:
        return serve(workers, "--processes", "2", *flags)
    finally:
        workers.all = all_workers


def admin_port_of(process: subprocess.Popen[str]) -> int:
    for line in process.stderr:
        if "admin API on " in line:
            return int(line.rsplit(":", 1)[1].split("/")[0])
    raise AssertionError("it did not start")


def test_a_machine_hands_over_without_losing_a_request() -> None:
    with Workers() as workers:
        process = serve(workers, "--processes", "2")
        pids = [process.pid]
        clients = None
        try:
            clients = Clients(port_of(process))
            wait_for(lambda: all(n > 3 for n in clients.answered), "everybody is served")
            old = children(process.pid)
            process.send_signal(signal.SIGUSR2)
            pids.append(successor_of(process))
            assert process.wait(60) == 0
            assert not any(Path(f"/proc/{pid}").exists() for pid in old)
            before = list(clients.answered)
            wait_for(lambda: all(n > b + 3 for n, b in zip(clients.answered, before, strict=True)), "all are served")
            clients.join()
            assert clients.failed == []
        finally:
            if clients is not None:
                clients.join()
            end_all(process, pids)


def test_new_connections_are_refused_while_a_machine_ends() -> None:
    with Workers() as workers:
        for worker in workers.all[1:]:
            slow(worker)
        with machine(workers, count=2) as (process, port):
            streams = Streams(port, 4)
            try:
                process.send_signal(signal.SIGTERM)
                wait_for(lambda: refuses(port), "connections are refused", 15)
                assert process.poll() is None
            finally:
                streams.close()
            assert process.wait(30) == 0


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_machine_hands_over_the_one_socket_of_systemd() -> None:
    with Workers() as workers, socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        process = serve(
            workers, "--processes", "2", env={**os.environ, "LISTEN_FDS": "1"}, pass_fds=(3,),
            preexec_fn=lambda: os.dup2(listening.fileno(), 3),
        )  # fmt: skip
        pids = [process.pid]
        try:
            port = port_of(process)
            assert port == listening.getsockname()[1]
            process.send_signal(signal.SIGUSR2)
            pids.append(successor_of(process))
            assert process.wait(60) == 0
            ask(port, 4)
        finally:
            end_all(process, pids)


def test_settings_that_cannot_be_used_are_said_once() -> None:
    with Workers() as workers:
        done = subprocess.run(
            serve_arguments(workers, "--processes", "2", "--policy", "locality-band"), capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1


def serve_arguments(workers: Workers, *flags: str) -> list[str]:

    return [sys.executable, "-m", "eldr", "serve", "--port", "0", *workers.flags, *flags]


def test_processes_end_when_their_parent_is_killed() -> None:
    with Workers() as workers:
        process = serve(workers, "--processes", "2")
        try:
            port_of(process)
            old = children(process.pid)
            assert len(old) == 2
            end(process.pid)
            process.wait()
            wait_for(lambda: not any(alive(pid) for pid in old), "they end")
        finally:
            for pid in old:
                end(pid)
            process.stderr.close()


def alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_each_process_has_a_decision_log_and_reloads(tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    with Workers() as workers, machine(workers, "--decision-log", str(log), count=2) as (process, port):
        ask(port, 30)
        files = [tmp_path / f"decisions.jsonl.{index}" for index in range(2)]
        wait_for(lambda: all(file.exists() and '"choose"' in file.read_text() for file in files), "both write")
        for file in files:
            file.rename(f"{file}.old")
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: all(file.exists() for file in files), "both have opened it again")
        ask(port, 1)


def test_a_report_reaches_the_process_whose_request_it_is(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("of-reports")
    with Workers() as workers, machine(workers, "--report-key-file", str(key), count=2) as (_, port):
        ask(port, 20)
        names = [seen.headers["x-request-id"] for worker in workers.all[1:] for seen in worker.generated]
        reports = [{"id": f"cmpl-{name}-0-0123abcd", "counts": wire()} for name in [*names, "stranger"]]
        body = json.dumps({"v": 1, "reports": reports}).encode()
        answer = json.loads(get(port, "/eldr/experts", "of-reports", method="POST", data=body))
        assert answer == {"accepted": 20, "refused": {"unknown_request": 1}}
        accepted = samples(get(port, "/metrics"), "eldr_expert_reports_total", outcome="accepted")
        assert sum(accepted.values()) == 20
        assert len(accepted) == 2


def test_a_process_that_hangs_is_forgotten_and_known_again_when_it_goes_on() -> None:
    with Workers() as workers:
        for worker in workers.all[1:]:
            slow(worker)
        with machine(workers, count=3) as (process, port):
            streams = Streams(port, 18)
            wait_for(lambda: everywhere(port) == {18.0}, "all know all")
            victim = children(process.pid)[1]
            os.kill(victim, signal.SIGSTOP)
            try:
                wait_for(lambda: forgotten(port) == {1.0}, "the other two have forgotten it")
            finally:
                os.kill(victim, signal.SIGCONT)
            wait_for(lambda: everywhere(port) == {18.0} and len(running(port)) == 3, "all know all again")
            streams.close()
            wait_for(lambda: everywhere(port) == {0.0}, "nothing is left")


def forgotten(port: int) -> set[float]:
    """How many others each process has forgotten. Empty if nobody who goes on could be asked."""
    try:
        found = samples(get(port, "/metrics", timeout_s=2), "eldr_peers_expired_total")
    except OSError:
        return set()
    return set(found.values()) if len(found) == 2 else set()
