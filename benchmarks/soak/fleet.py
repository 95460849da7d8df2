"""The soak's fleet: worker processes that are killed, stopped, added and drained, and the router in front of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
from members import Member

from eldr.demo.ports import free_ports
from eldr.lifeline import die_with

ADMIN_KEY = "soak-admin-key"
CONFIG = """
policy = "{policy}"
max_inflight = 16
health_interval_s = 1
load_interval_s = 1
prefill_timeout_s = 5
decode_first_byte_timeout_s = 10
decode_idle_timeout_s = 15
decode_answer_timeout_s = 15
queue_timeout_s = 30
drain_timeout_s = 10
eject_base_s = 2
"""


class SoakFleet:
    """Starts and ends every process. members: workers that are in the fleet or were; their ports are used once."""

    def __init__(self, folder: Path, policy: str, prefill: int, decode: int) -> None:
        self._folder = folder
        self._policy = policy
        self.used = folder / "used.txt"
        self.members = [Member(role) for role in ["prefill"] * prefill + ["decode"] * decode]
        self.gone: list[Member] = []
        self.port, self.admin_port = free_ports(2)
        self.router: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self.used.write_bytes(b"")
        for member in self.members:
            member.launch(self.used)
        config, key = self._folder / "eldr.toml", self._folder / "admin.key"
        lists = {
            role: json.dumps([member.url for member in self.members if member.role == role])
            for role in ("prefill", "decode")
        }
        text = "".join(f"{role} = {urls}\n" for role, urls in lists.items()) + CONFIG.format(policy=self._policy)
        config.write_text(text)
        key.write_text(ADMIN_KEY)
        key.chmod(0o600)
        await asyncio.sleep(2)
        with (self._folder / "router.log").open("wb") as log:
            self.router = subprocess.Popen(
                [
                    sys.executable, "-m", "eldr", "serve", "--config", str(config), "--port", str(self.port),
                    "--admin-listen", f"127.0.0.1:{self.admin_port}", "--admin-key-file", str(key),
                ],
                stderr=log,
                process_group=0,
                preexec_fn=die_with(os.getpid()),
            )  # fmt: skip
        await self.until_ready()

    async def until_ready(self) -> None:
        deadline_s = time.monotonic() + 60
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < deadline_s:
                try:
                    async with session.get(f"{self.url}/ready") as answer:
                        if answer.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.1)
        raise SystemExit(f"the router did not get ready, see {self._folder / 'router.log'}")

    async def add(self, role: str) -> Member:
        member = Member(role)
        member.launch(self.used)
        self.members.append(member)
        await self.admin("POST", "/admin/workers", {"url": member.url, "role": role})
        return member

    async def drain(self, member: Member, at_once: bool = False) -> None:
        member.faults.append((time.monotonic(), "taken out" if at_once else "drained"))
        self.members.remove(member)
        self.gone.append(member)
        body = {"url": member.url, "role": member.role}
        await self.admin(*(("DELETE", "/admin/workers") if at_once else ("POST", "/admin/drain")), body)

    async def admin(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, f"http://127.0.0.1:{self.admin_port}{path}", json=body, headers=headers) as answer,
        ):
            return await answer.json()

    def end(self) -> int | None:
        """Stop everything; the router's exit code after SIGTERM."""
        code = None
        if self.router is not None:
            self.router.send_signal(signal.SIGTERM)
            try:
                code = self.router.wait(40)
            except subprocess.TimeoutExpired:
                self.router.kill()
                self.router.wait()
        for member in (*self.members, *self.gone):
            member.kill()
        return code
