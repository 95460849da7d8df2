"""The routers under test: how each is started, and how workers join and leave it at run time."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from contenders import API_KEY, BOOTSTRAP_PORT, CONTENDERS, Fleet
from members import Member

from eldr.demo.ports import free_ports
from eldr.lifeline import die_with

HEADERS = {"authorization": f"Bearer {API_KEY}"}
# The others get eldr's own intervals, which serve them better than theirs (60 s each): between two probes, and until a
# worker whose circuit broke is tried again.
INTERVALS = ("--health-check-interval-secs", "2", "--cb-timeout-duration-secs", "5")
END_WAIT_S = 40.0


@dataclass(frozen=True, slots=True)
class Rival:
    """A router that runs, and its worker API where it has one for prefill and decode workers."""

    name: str
    url: str
    admin_url: str

    @property
    def takes_joins(self) -> bool:
        return self.name != "vllm-router"

    async def serving(self, session: aiohttp.ClientSession) -> set[str]:
        """URLs of the workers that may get requests."""
        path = "/admin/workers" if self.name == "eldr" else "/workers"
        async with session.get(self.admin_url + path, headers=HEADERS) as answer:
            workers: list[dict[str, Any]] = (await answer.json())["workers"]
        return {worker["url"] for worker in workers if worker.get("is_healthy", worker.get("state") == "up")}

    async def join(self, session: aiohttp.ClientSession, member: Member) -> None:
        if self.name == "eldr":
            path, body = "/admin/workers", {"url": member.url, "role": member.role}
        else:
            path, body = "/workers", {"url": member.url, "worker_type": member.role, "api_key": API_KEY}
            if member.role == "prefill":
                body["bootstrap_port"] = int(BOOTSTRAP_PORT)  # type: ignore[assignment]
        async with session.post(self.admin_url + path, json=body, headers=HEADERS) as answer:
            answer.raise_for_status()

    async def leave(self, session: aiohttp.ClientSession, member: Member) -> None:
        """Take a worker out in good order."""
        if self.name == "eldr":
            body = {"url": member.url, "role": member.role}
            async with session.post(f"{self.admin_url}/admin/drain", json=body, headers=HEADERS) as answer:
                answer.raise_for_status()
            return
        async with session.get(f"{self.admin_url}/workers", headers=HEADERS) as answer:
            workers = (await answer.json())["workers"]
        for worker in workers:
            if worker["url"] == member.url:
                async with session.delete(f"{self.admin_url}/workers/{worker['id']}", headers=HEADERS) as answer:
                    answer.raise_for_status()


@contextmanager
def running(name: str, members: list[Member], folder: Path) -> Iterator[Rival]:
    """The router `name` before `members`. Its log is in `folder`."""
    port, admin_port = free_ports(2)
    ports = {role: tuple(member.port for member in members if member.role == role) for role in ("prefill", "decode")}
    command = CONTENDERS[name].command(Fleet(port, ports["prefill"], ports["decode"]), folder)
    if name == "eldr":
        key_file = folder / "admin.key"
        key_file.write_text(API_KEY)
        command += ["--admin-listen", f"127.0.0.1:{admin_port}", "--admin-key-file", str(key_file)]
    else:
        command += INTERVALS
        admin_port = port
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, process_group=0, preexec_fn=die_with(os.getpid())
        )  # fmt: skip
    try:
        yield Rival(name, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
