"""A client of the admin API."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from eldr.router.config.endpoint import Role
from tests.router.harness import Reply, Setup

KEY = "an-admin-key"


async def ask_admin(s: Setup, method: str, path: str, body: Any = None, key: str = KEY) -> Reply:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    url = f"http://127.0.0.1:{s.router.admin_port}{path}"
    async with s.session.request(method, url, data=data, headers=headers) as answer:
        return Reply(answer.status, answer.headers, await answer.read())


async def listed(s: Setup) -> dict[tuple[str, str], dict[str, Any]]:
    """The fleet as the admin API shows it, by role and URL."""
    workers = (await ask_admin(s, "GET", "/admin/workers")).json()["workers"]
    return {(worker["role"], worker["url"]): worker for worker in workers}


async def until_state(s: Setup, role: Role, url: str, state: str) -> None:
    async with asyncio.timeout(20):
        while (await listed(s)).get((role, url), {"state": "gone"})["state"] != state:
            await asyncio.sleep(0.01)
