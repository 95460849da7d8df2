"""The admin API: who may use it, and what it says of wrong requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eldr.router.config.settings import ConfigError, RouterConfig
from tests.router.admin import KEY, ask_admin, listed, until_state
from tests.router.harness import ASK, on_uvloop, running


@pytest.mark.parametrize("key", ["", "wrong", KEY + "x", KEY[:-1]])
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/admin/workers"), ("POST", "/admin/workers"), ("DELETE", "/admin/workers"), ("POST", "/admin/drain"),
     ("GET", "/anything")],
)  # fmt: skip
@on_uvloop
async def test_nothing_works_without_the_key(admin: dict[str, Any], key: str, method: str, path: str) -> None:
    async with running(**admin) as s:
        answer = await ask_admin(s, method, path, {"url": s.decode[0].url, "role": "decode"}, key=key)
        assert answer.status == 401
        assert answer.error["type"] == "AuthenticationError"
        assert len(s.router.membership.workers()) == 2


@on_uvloop
async def test_the_public_address_has_no_admin_api(admin: dict[str, Any]) -> None:
    async with running(**admin) as s:
        assert (await s.get("/admin/workers", {"authorization": f"Bearer {KEY}"})).status == 404
        assert (await ask_admin(s, "POST", "/v1/completions", ASK)).status == 404


def test_there_is_no_admin_api_without_a_key() -> None:
    with pytest.raises(ConfigError, match="admin_key_file"):
        RouterConfig.of(prefill=("http://p:1",), decode=("http://d:1",), admin_listen="127.0.0.1:0")


@pytest.mark.parametrize("listen", ["8001", ":8001", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000", "::1:8001"])
def test_a_bad_admin_address_is_refused(tmp_path: Path, listen: str) -> None:
    with pytest.raises(ConfigError, match="admin_listen"):
        RouterConfig.of(admin_listen=listen, admin_key_file=tmp_path / "key")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("POST", "/admin/workers", b"{", 400, "JSON"),
        ("POST", "/admin/workers", [], 400, "object"),
        ("POST", "/admin/workers", {"role": "decode"}, 400, "url"),
        ("POST", "/admin/workers", {"url": "http://d:1"}, 400, "role"),
        ("POST", "/admin/workers", {"url": "http://d:1", "role": "both"}, 400, "role"),
        ("POST", "/admin/workers", {"url": "http://d:1", "role": ["decode"]}, 400, "role"),
        ("POST", "/admin/workers", {"url": 7, "role": "decode"}, 400, "url"),
        ("POST", "/admin/workers", {"url": "http://d:1/v1", "role": "decode"}, 400, "URL"),
        ("POST", "/admin/workers", {"url": "http://me:secret@d:1", "role": "decode"}, 400, "URL"),
        ("POST", "/admin/workers", {"url": "http://d:1", "role": "decode", "weight": 2}, 400, "weight"),
        ("DELETE", "/admin/workers", {"url": "http://d:1"}, 404, "http://d:1"),
        ("POST", "/admin/drain", {"url": "http://d:1"}, 404, "http://d:1"),
        ("POST", "/admin/drain", {"url": "http://d:1", "timeout_s": -1}, 400, "timeout_s"),
        ("POST", "/admin/drain", {"url": "http://d:1", "timeout_s": True}, 400, "timeout_s"),
        ("GET", "/admin/drain", None, 405, "POST"),
        ("PUT", "/admin/workers", {}, 405, "GET"),
        ("GET", "/admin", None, 404, "/admin/workers"),
    ],
)
@on_uvloop
async def test_wrong_admin_requests_are_explained(
    admin: dict[str, Any], method: str, path: str, body: Any, status: int, said: str
) -> None:
    async with running(**admin) as s:
        answer = await ask_admin(s, method, path, body)
        assert answer.status == status
        assert said in answer.error["message"]
        assert len(s.router.membership.workers()) == 2


@on_uvloop
async def test_a_url_with_two_roles_must_be_told_apart(admin: dict[str, Any]) -> None:
    async with running(**admin) as s:
        url = s.decode[0].url
        await ask_admin(s, "POST", "/admin/workers", {"url": url, "role": "prefill"})
        assert (await ask_admin(s, "DELETE", "/admin/workers", {"url": url})).status == 404
        assert (await ask_admin(s, "DELETE", "/admin/workers", {"url": url, "role": "prefill"})).status == 202
        await until_state(s, "prefill", url, "gone")
        assert ("decode", url) in await listed(s)
