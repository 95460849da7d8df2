"""Who may ask."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eldr.router.api.keys import ApiKeys
from eldr.router.config.settings import ConfigError
from tests.router.harness import bearer, interpreted, on_uvloop, running
from tests.router.wire import exchange, status_of

KEYS = b"# clients\nsecret-of-alice alice\n\nsecret-of-bob\n"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_bytes(KEYS)
    return path


@on_uvloop
async def test_only_clients_with_a_key_may_ask(key_file: Path) -> None:
    async with running(api_key_file=key_file) as s:
        for headers in ({}, bearer("secret-of-carol"), {"authorization": "Basic secret-of-bob"}, bearer("")):
            answer = await s.post(headers=headers)
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.error["type"] == "AuthenticationError"
        for path in ("/v1/models", "/metrics", "/nothing"):
            assert (await s.get(path)).status == 401
        for path in ("/health", "/ready"):
            assert (await s.get(path)).status == 200
        assert s.prefill[0].generated == s.decode[0].generated == []
        for key in ("secret-of-alice", "secret-of-bob"):
            assert (await s.post(headers=bearer(key))).status == 200
            assert (await s.get("/v1/models", headers=bearer(key))).status == 200
        assert (await s.post(headers={"authorization": "bearer secret-of-bob"})).status == 200


@pytest.mark.parametrize("header", ["X-Api-Key", "api-key"])
@on_uvloop
async def test_a_key_may_come_in_the_headers_of_other_apis(key_file: Path, tmp_path: Path, header: str) -> None:
    (tmp_path / "admin").write_text("the-admin-key\n")
    async with running(api_key_file=key_file, admin_key_file=tmp_path / "admin") as s:
        for given in ("secret-of-alice", "secret-of-bob", "the-admin-key"):
            assert (await s.post(headers={header: given})).status == 200
            assert (await s.post(headers={header: given, **bearer("EMPTY")})).status == 200
            assert (await s.post(headers={header: "EMPTY", **bearer(given)})).status == 200
            assert (await s.post(headers={header: given, **bearer(given)})).status == 200
        for given in ("", "secret-of-carol", "Bearer secret-of-bob", "secret-of-bob, secret-of-bob"):
            assert (await s.post(headers={header: given})).status == 401
        both = await s.post(headers={header: "secret-of-alice", **bearer("secret-of-bob")})
        assert (both.status, "two clients" in both.error["message"]) == (400, True)
        recorded = {"x-eldr-record": "1"}
        assert (await s.post(headers={header: "the-admin-key", **recorded})).status == 200
        assert (await s.post(headers={header: "secret-of-bob", **recorded})).status == 403
        for worker in (*s.prefill, *s.decode):
            assert not any(re.search("secret|admin-key", str(seen.headers)) for seen in worker.seen)


@pytest.mark.parametrize("header", ["authorization", "x-api-key", "api-key"])
@on_uvloop
async def test_a_key_that_the_router_does_not_check_goes_to_the_workers(tmp_path: Path, header: str) -> None:
    (tmp_path / "admin").write_text("the-admin-key\n")
    async with running(admin_key_file=tmp_path / "admin") as s:
        assert (await s.post(headers={header: "Bearer x"})).status == 200
        assert [worker.generated[-1].headers.get(header) for worker in (*s.prefill, *s.decode)] == ["Bearer x"] * 2
        for other in ("authorization", "x-api-key", "api-key"):
            given = {header: "x", other: "Bearer the-admin-key" if other == "authorization" else "the-admin-key"}
            assert (await s.post(headers=given)).status == 200
            for worker in (*s.prefill, *s.decode):
                assert not {header, other} & worker.generated[-1].headers.keys()
    (tmp_path / "worker").write_text("of-workers\n")
    async with running(worker_api_key_file=tmp_path / "worker") as s:
        assert (await s.post(headers={header: "Bearer x"})).status == 200
        for worker in (*s.prefill, *s.decode):
            headers = worker.generated[-1].headers
            assert headers["authorization"] == "Bearer of-workers"
            assert not {"x-api-key", "api-key"} & headers.keys()


@on_uvloop
async def test_a_body_is_not_read_from_whoever_has_no_key(key_file: Path) -> None:
    async with running(api_key_file=key_file) as s:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 30000000\r\nexpect: 100-continue\r\n\r\n"
        assert status_of(await exchange(s, head)) == 401


@on_uvloop
async def test_the_clients_key_reaches_no_worker(key_file: Path) -> None:
    async with running(api_key_file=key_file) as s:
        await s.post(headers=bearer("secret-of-alice"))
        await s.get("/v1/models", headers=bearer("secret-of-alice"))
        for worker in (*s.prefill, *s.decode):
            assert worker.generated
            assert all("authorization" not in seen.headers for seen in worker.seen)
            assert not any(b"secret" in seen.raw or "secret" in str(seen.headers) for seen in worker.seen)


@on_uvloop
async def test_the_admin_key_is_a_key_too(key_file: Path, tmp_path: Path) -> None:
    (tmp_path / "admin").write_text("the-admin-key\n")
    async with running(api_key_file=key_file, admin_key_file=tmp_path / "admin") as s:
        assert (await s.post(headers={**bearer("the-admin-key"), "x-eldr-record": "1"})).status == 200
        assert (await s.post(headers={**bearer("secret-of-bob"), "x-eldr-record": "1"})).status == 403
        assert all("authorization" not in seen.headers for seen in (*s.prefill[0].seen, *s.decode[0].seen))


@pytest.mark.parametrize("header", ["Bearer the-admin-key", "bearer the-admin-key", "Bearer  the-admin-key"])
@on_uvloop
async def test_the_admin_key_reaches_no_worker_where_no_keys_are_asked_for(tmp_path: Path, header: str) -> None:
    (tmp_path / "admin").write_text("the-admin-key\n")
    async with running(admin_key_file=tmp_path / "admin") as s:
        assert (await s.post(headers={"authorization": header})).status == 200
        assert (await s.get("/v1/models", headers={"authorization": header})).status == 200
        for worker in (*s.prefill, *s.decode):
            assert worker.generated
            assert not any("the-admin-key" in str(seen.headers) for seen in worker.seen)


@interpreted
def test_keys_are_known_by_name_and_can_be_replaced(key_file: Path) -> None:
    keys = ApiKeys(key_file)
    assert keys.client({b"authorization": b"Bearer secret-of-alice"}) == "alice"
    assert keys.client({b"authorization": b"Bearer secret-of-bob"}) == "client-4"
    assert keys.client({}) is None
    for wrong in (
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer secret-of-alice alice",
        b"secret-of-alice",
        b"Bearer \xff",
    ):
        assert keys.client({b"authorization": wrong}) is None
    assert b"secret-of-alice" not in repr(vars(keys)).encode()
    key_file.write_bytes(b"another zoe\n")
    keys.reload()
    assert keys.client({b"authorization": b"Bearer secret-of-alice"}) is None
    assert keys.client({b"authorization": b"Bearer another"}) == "zoe"
    key_file.write_bytes(b"")
    with pytest.raises(ConfigError, match="it has no keys"):
        keys.reload()
    assert keys.client({b"authorization": b"Bearer another"}) == "zoe"


@pytest.mark.parametrize(
    ("text", "why"),
    [(b"# none\n", "no key"), (b"a\nb b\na\n", ":3: the same key"), (b"a b c\n", ":1: expected"), (b"\xff\n", ":1:")],
)
def test_a_bad_key_file_is_refused_without_showing_a_key(key_file: Path, text: bytes, why: str) -> None:
    key_file.write_bytes(text.replace(b"a", b"hidden"))
    with pytest.raises(ConfigError, match=why) as raised:
        ApiKeys(key_file)
    assert "hidden" not in str(raised.value).replace(str(key_file), "")
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys(key_file.with_name("missing"))


@on_uvloop
async def test_metrics_show_no_key_and_no_name_of_a_client(key_file: Path) -> None:
    async with running(api_key_file=key_file) as s:
        await s.post(headers=bearer("secret-of-alice"))
        text = (await s.get("/metrics", headers=bearer("secret-of-alice"))).body
        assert b"secret" not in text
        assert b"alice" not in text
