"""Workers that join, drain and leave while the router runs, and what names them: the admin API, a file, DNS."""

from __future__ import annotations

import asyncio
import json
import time
from functools import partial

import pytest
from fake_worker import FakeWorker
from harness import ASK, Reply, Scripted, on_uvloop, running, until
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.router.app import Router
from eldr.router.config.endpoint import Endpoint, UrlError, rank_of, worker_url, worker_urls
from eldr.router.config.settings import ConfigError, RouterConfig
from eldr.router.fleet.discovery.dns import DnsSource

KEY = "an-admin-key"


@pytest.fixture
def admin(tmp_path):
    """Settings that turn the admin API on."""
    key = tmp_path / "admin.key"
    key.write_text(KEY + "\n")
    return {"admin_listen": "127.0.0.1:0", "admin_key_file": key}


async def ask_admin(s, method, path, body=None, key=KEY):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    url = f"http://127.0.0.1:{s.router.admin_port}{path}"
    async with s.session.request(method, url, data=data, headers=headers) as answer:
        return Reply(answer.status, answer.headers, await answer.read())


async def listed(s):
    workers = (await ask_admin(s, "GET", "/admin/workers")).json()["workers"]
    return {(worker["role"], worker["url"]): worker for worker in workers}


async def until_state(s, role, url, state):
    async with asyncio.timeout(20):
        while (await listed(s)).get((role, url), {"state": "gone"})["state"] != state:
            await asyncio.sleep(0.01)


# Joining.


@on_uvloop
async def test_a_worker_joins_and_gets_requests_once_it_was_probed(admin):
    policy = Scripted(lambda request, in_flight: list(in_flight)[-1])
    new = await FakeWorker("decode").start()
    async with running(policy=policy, **admin) as s:
        try:
            answer = await ask_admin(s, "POST", "/admin/workers", {"url": new.url + "/", "role": "decode"})
            assert (answer.status, answer.json()["url"], answer.json()["source"]) == (202, new.url, "admin")
            await until(lambda: ("joined", new.url) in policy.heard, "it joins")
            assert (await s.post()).status == 200
            assert len(new.generated) == 1
            assert [seen.path for seen in new.seen][:2] == ["/health", "/v1/models"]
            worker = (await listed(s))["decode", new.url]
            assert (worker["state"], worker["models"], worker["in_flight"]) == ("up", ["tiny"], 0)
            again = await ask_admin(s, "POST", "/admin/workers", {"url": new.url, "role": "decode"})
            assert again.status == 409
        finally:
            await new.stop()


@on_uvloop
async def test_a_prefill_worker_that_joins_takes_its_share_of_the_ring(admin):
    new = await FakeWorker("prefill").start()
    async with running(**admin) as s:
        try:
            await ask_admin(s, "POST", "/admin/workers", {"url": new.url, "role": "prefill"})
            await until_state(s, "prefill", new.url, "up")
            for n in range(40):
                assert (await s.post({**ASK, "prompt": f"prompt {n}"})).status == 200
            assert 5 < len(new.generated) < 35
        finally:
            await new.stop()


@pytest.mark.parametrize("settings", [{}, {"model": "tiny"}])
@on_uvloop
async def test_a_worker_with_another_model_gets_nothing_until_it_serves_the_right_one(admin, settings):
    policy = Scripted()
    new = await FakeWorker("decode", model="another").start()
    async with running(policy=policy, **admin, **settings) as s:
        try:
            await ask_admin(s, "POST", "/admin/workers", {"url": new.url, "role": "decode"})
            await until_state(s, "decode", new.url, "down")
            assert "another" in (await listed(s))["decode", new.url]["problem"]
            assert "tiny" in (await listed(s))["decode", new.url]["problem"]
            for _ in range(4):
                assert (await s.post()).status == 200
            assert new.generated == []
            assert ("joined", new.url) not in policy.heard
            new.model = "tiny"
            await until_state(s, "decode", new.url, "up")
            assert ("joined", new.url) in policy.heard
        finally:
            await new.stop()


@on_uvloop
async def test_a_worker_that_is_not_there_yet_joins_when_it_comes(admin):
    new = await FakeWorker("decode").start()
    await new.stop()
    async with running(policy=Scripted(), **admin) as s:
        await ask_admin(s, "POST", "/admin/workers", {"url": new.url, "role": "decode"})
        await until_state(s, "decode", new.url, "down")
        assert (await s.post()).status == 200
        await new.start()
        await until_state(s, "decode", new.url, "up")
        await new.stop()


@on_uvloop
async def test_a_router_may_start_empty_and_be_filled(admin):
    config = RouterConfig.of(port=0, health_interval_s=0.1, **admin)
    router = Router(config, Scripted())
    workers = [await FakeWorker(role).start() for role in ("prefill", "decode")]
    await router.start()
    try:
        assert not router.services.fleet.ready
        for worker in workers:
            router.membership.join(Endpoint(worker.url, worker.role), "admin")
        await until(lambda: router.services.fleet.ready, "both are up")
    finally:
        for worker in workers:
            await worker.stop()
        await router.stop(0)


# Draining and leaving.


@on_uvloop
async def test_a_draining_worker_finishes_what_it_runs_and_then_is_gone(admin):
    policy = Scripted(lambda request, in_flight: next(iter(in_flight)))
    async with running(decode=2, policy=policy, **admin) as s:
        first, second = s.decode
        first.tokens, first.token_gap_s = ["x"] * 8, 0.1
        slow = asyncio.create_task(s.post({**ASK, "max_tokens": 8, "stream": True}))
        await until(lambda: first.running == 1, "it runs")
        answer = await ask_admin(s, "POST", "/admin/drain", {"url": first.url})
        assert (answer.status, answer.json()["state"], answer.json()["in_flight"]) == (202, "draining", 1)
        for _ in range(3):
            assert (await s.post()).status == 200
        assert (len(first.generated), len(second.generated)) == (1, 3)
        assert ("left", first.url) not in policy.heard
        assert [event["choices"][0]["text"] for event in (await slow).events[:-1]] == ["x"] * 8
        await until_state(s, "decode", first.url, "gone")
        assert policy.heard[-1] == ("left", first.url)
        assert policy.heard.index(("finished", first.url)) < policy.heard.index(("left", first.url))
        await until(lambda: first.open_connections == 0, "no connection to it is kept")
        assert await s.metric("eldr_worker_up", worker=first.url) == 0


@pytest.mark.parametrize("by", ["drain", "delete"])
@on_uvloop
async def test_what_does_not_finish_in_time_is_cut_off(admin, by):
    async with running(decode=2, policy=Scripted(lambda r, in_flight: next(iter(in_flight))), **admin) as s:
        first, second = s.decode
        first.tokens, first.token_gap_s = ["x"] * 1000, 0.05
        stream = asyncio.create_task(s.post({**ASK, "max_tokens": 1000, "stream": True}))
        whole = asyncio.create_task(s.post({**ASK, "max_tokens": 1000}))
        await until(lambda: first.running == 2, "both run")
        await until(lambda: sum(s.router.services.metrics.ttft.counts) > 0, "a token came")
        if by == "drain":
            body = {"url": first.url, "role": "decode", "timeout_s": 0.2}
            assert (await ask_admin(s, "POST", "/admin/drain", body)).status == 202
        else:
            assert (await ask_admin(s, "DELETE", "/admin/workers", {"url": first.url})).status == 202
        with pytest.raises(Exception, match="payload"):  # the stream ends short of its end
            await stream
        # What had not begun to answer runs again elsewhere.
        assert (await whole).status == 200
        assert len(second.generated) == 1
        await until_state(s, "decode", first.url, "gone")
        assert s.router.services.admission.admitted == 0


@on_uvloop
async def test_a_prefill_worker_stays_until_nobody_may_pull_from_it(admin):
    async with running(prefill=2, **admin) as s:
        for worker in s.prefill:
            worker.lease = {"left_s": 1.5}
        while not all(worker.generated for worker in s.prefill):
            assert (await s.post({**ASK, "prompt": str(len(s.decode[0].generated))})).status == 200
        worker = s.prefill[0]
        first_s = worker.generated[-1].at_s
        await ask_admin(s, "POST", "/admin/drain", {"url": worker.url})
        await until_state(s, "prefill", worker.url, "gone")
        assert time.monotonic() - first_s > 1.4


@on_uvloop
async def test_a_worker_that_is_taken_back_while_it_is_cut_off_serves_again(admin):
    async with running(**admin) as s:
        worker = s.decode[0]
        worker.tokens, worker.token_gap_s = ["x"] * 1000, 0.05
        stream = asyncio.create_task(s.post({**ASK, "max_tokens": 1000, "stream": True}))
        await until(lambda: worker.running == 1, "it runs")
        await ask_admin(s, "DELETE", "/admin/workers", {"url": worker.url})
        s.router.membership.join(Endpoint(worker.url, "decode"), "admin")
        worker.tokens, worker.token_gap_s = ["a"], 0.0
        await asyncio.wait([stream])
        await until_state(s, "decode", worker.url, "up")
        assert (await s.post()).status == 200


@on_uvloop
async def test_a_draining_worker_can_be_taken_back(admin):
    async with running(decode=1, worker_wait_s=0, **admin) as s:
        worker = s.decode[0]
        worker.tokens, worker.token_gap_s = ["x"] * 4, 0.1
        task = asyncio.create_task(s.post())
        await until(lambda: worker.running == 1, "it runs")
        await ask_admin(s, "POST", "/admin/drain", {"url": worker.url})
        assert (await s.post()).status == 503
        assert (await ask_admin(s, "POST", "/admin/workers", {"url": worker.url, "role": "decode"})).status == 202
        assert (await task).status == 200
        assert (await s.post()).status == 200
        assert (await listed(s))["decode", worker.url]["state"] == "up"


@on_uvloop
async def test_a_worker_may_leave_and_come_back_as_often_as_it_likes(admin):
    async with running(decode=2, **admin) as s:
        worker = s.decode[0]
        for _ in range(5):
            await ask_admin(s, "POST", "/admin/drain", {"url": worker.url})
            await until_state(s, "decode", worker.url, "gone")
            await ask_admin(s, "POST", "/admin/workers", {"url": worker.url, "role": "decode"})
            await until_state(s, "decode", worker.url, "up")
            assert (await s.post()).status == 200
        assert len(s.router.services.legs.pools) == 3


@on_uvloop
async def test_under_load_workers_come_and_go_and_no_request_is_lost(admin):
    spare = [await FakeWorker("decode").start() for _ in range(3)]
    async with running(decode=3, max_inflight=4, **admin) as s:
        for worker in (*s.decode, *spare):
            worker.token_gap_s = 0.005
        statuses = []

        async def client(n):
            for k in range(25):
                answer = await s.post({**ASK, "prompt": f"{n} {k}", "stream": k % 2 == 0})
                statuses.append((answer.status, b"d" in answer.body))

        load = asyncio.gather(*(client(n) for n in range(8)))
        for old, new in zip(s.decode, spare, strict=True):
            await ask_admin(s, "POST", "/admin/workers", {"url": new.url, "role": "decode"})
            await until_state(s, "decode", new.url, "up")
            await ask_admin(s, "POST", "/admin/drain", {"url": old.url})
            await until_state(s, "decode", old.url, "gone")
        await load
        assert statuses == [(200, True)] * 200
        assert all(worker.generated for worker in spare)
        assert s.router.services.fleet.workers("decode").keys() == {worker.url for worker in spare}
        for worker in spare:
            await worker.stop()


# The admin API's manners.


@pytest.mark.parametrize("key", ["", "wrong", KEY + "x", KEY[:-1]])
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/admin/workers"), ("POST", "/admin/workers"), ("DELETE", "/admin/workers"), ("POST", "/admin/drain"),
     ("GET", "/anything")],
)  # fmt: skip
@on_uvloop
async def test_nothing_works_without_the_key(admin, key, method, path):
    async with running(**admin) as s:
        answer = await ask_admin(s, method, path, {"url": s.decode[0].url, "role": "decode"}, key=key)
        assert answer.status == 401
        assert answer.error["type"] == "AuthenticationError"
        assert len(s.router.membership.workers()) == 2


@on_uvloop
async def test_the_public_address_has_no_admin_api(admin):
    async with running(**admin) as s:
        assert (await s.get("/admin/workers", {"authorization": f"Bearer {KEY}"})).status == 404
        assert (await ask_admin(s, "POST", "/v1/completions", ASK)).status == 404


def test_there_is_no_admin_api_without_a_key():
    with pytest.raises(ConfigError, match="admin_key_file"):
        RouterConfig.of(prefill=("http://p:1",), decode=("http://d:1",), admin_listen="127.0.0.1:0")


@pytest.mark.parametrize("listen", ["8001", ":8001", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000", "::1:8001"])
def test_a_bad_admin_address_is_refused(tmp_path, listen):
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
async def test_wrong_admin_requests_are_explained(admin, method, path, body, status, said):
    async with running(**admin) as s:
        answer = await ask_admin(s, method, path, body)
        assert answer.status == status
        assert said in answer.error["message"]
        assert len(s.router.membership.workers()) == 2


@on_uvloop
async def test_a_url_with_two_roles_must_be_told_apart(admin):
    async with running(**admin) as s:
        url = s.decode[0].url
        await ask_admin(s, "POST", "/admin/workers", {"url": url, "role": "prefill"})
        assert (await ask_admin(s, "DELETE", "/admin/workers", {"url": url})).status == 404
        assert (await ask_admin(s, "DELETE", "/admin/workers", {"url": url, "role": "prefill"})).status == 202
        await until_state(s, "prefill", url, "gone")
        assert ("decode", url) in await listed(s)


# URLs.


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://d:1", "http://d:1"),
        ("https://d.example:8443/", "https://d.example:8443"),
        ("http://[::1]:8000", "http://[::1]:8000"),
        ("http://10.0.0.1", "http://10.0.0.1"),
        ("http://d:1#rank=3", "http://d:1#rank=3"),
    ],
)
def test_urls_of_workers(text, url):
    assert worker_url(text) == url
    assert worker_urls(text) == (url,)


@pytest.mark.parametrize(
    "text",
    [
        "", "d:1", "http://", "http:///x", "//d:1", "ftp://d:1", "file:///etc/passwd", "unix:///run/x", "HTTP//d",
        "http://d:1/v1", "http://d:1/..", "http://d:1//", "http://d:1?x=y", "http://u@d:1", "http://u:p@d:1",
        "http://:p@d:1", "http://@d:1", "http://d:1@e:2", "http://d\\@e", "http://d:0", "http://d:99999", "http://d:+1",
        "http://d:1:2", "http://d :1", "http://d\r\nx: y", "http://d\x00", "http://dä:1", "http://[::1", "http://d%2e:1",
        "http://d:1#", "http://d:1#rank=-1", "http://d:1#rank=", "http://d:1#rank=01", "http://d:1#dp=0", "http://d:1#x",
        "http://d:1#rank=1#rank=2",
    ],
)  # fmt: skip
def test_what_is_no_url_of_a_worker(text):
    with pytest.raises(UrlError):
        worker_urls(text)


def test_ranks_of_one_url():
    assert worker_urls("http://d:1#dp=2") == ("http://d:1#rank=0", "http://d:1#rank=1")
    assert [rank_of(url) for url in (*worker_urls("http://d:1#dp=2"), "http://d:1")] == [0, 1, None]
    config = RouterConfig.of(prefill=["http://p:1"], decode=["http://d:1#dp=3"])
    assert config.workers.decode == tuple(f"http://d:1#rank={rank}" for rank in range(3))
    with pytest.raises(UrlError):
        worker_url("http://d:1#dp=2")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40).map("http://".__add__) | st.text(max_size=40))
def test_any_text_is_a_url_or_an_error(text):
    try:
        urls = worker_urls(text)
    except UrlError:
        return
    for url in urls:
        assert worker_url(url) == url
        assert not set(url) & set("@\\?% \r\n\x00")


# The watched file.


def toml(workers):
    lists = {role: [w.url for w in workers if w.role == role] for role in ("prefill", "decode")}
    return "\n".join(f"{role} = {json.dumps(urls)}" for role, urls in lists.items()) + "\nhealth_interval_s = 0.1\n"


@on_uvloop
async def test_workers_follow_the_configuration_file(tmp_path, caplog):
    workers = [await FakeWorker(role).start() for role in ("prefill", "decode", "decode", "prefill")]
    file = tmp_path / "eldr.toml"
    file.write_text(toml(workers[:2]))
    load = partial(RouterConfig.load, file, {"port": 0})
    router = Router(load(), Scripted(), (file, load))
    await router.start()
    try:
        urls = lambda: [w.url for w in router.membership.workers()]  # noqa: E731
        assert urls() == [w.url for w in workers[:2]]
        file.write_text(toml(workers))
        await until(lambda: len(list(router.services.fleet.available("decode"))) == 2, "the new one is up")
        assert set(urls()) == {w.url for w in workers}
        for broken in ("prefill = [", "unknown = 1", 'decode = ["nonsense"]', 'decode = "http://x:1"', "decode = []"):
            file.write_text(broken + f"\n# {broken}")
            await until(lambda broken=broken: caplog.text.count("is unchanged") > 0, "it is said")
            caplog.clear()
            assert set(urls()) == {w.url for w in workers}
        file.unlink()
        await until(lambda: caplog.text.count("is unchanged") > 0, "it is said")
        assert set(urls()) == {w.url for w in workers}
        # Replaced by renaming, as careful tools do, one worker of each role left out.
        other = tmp_path / "new.toml"
        other.write_text(toml(workers[2:]))
        other.rename(file)
        await until(lambda: set(urls()) == {w.url for w in workers[2:]}, "the others are gone")
    finally:
        for worker in workers:
            await worker.stop()
        await router.stop(0)


# Names.


class Names:
    """A name server's answers, one after the other; the last one stays."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = 0

    async def __call__(self, host, port):
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def endpoints(*addresses):
    return frozenset(Endpoint(f"http://{address}:8200", "decode") for address in addresses)


async def first_sets(names, count):
    found = []
    async for workers in DnsSource("http://decode.local:8200", "decode", 0.001, names).watch():
        found.append(workers)
        if len(found) == count:
            return found
    raise AssertionError("it must never end")


def test_addresses_of_a_name_become_workers_and_failures_keep_them():
    names = Names(["10.0.0.1", "10.0.0.2"], OSError("down"), TimeoutError(), [], ["10.0.0.2", "10.0.0.1"], ["10.0.0.3"])
    found = asyncio.run(first_sets(names, 2))
    assert found == [endpoints("10.0.0.1", "10.0.0.2"), endpoints("10.0.0.3")]
    assert names.asked == 6


def test_a_name_that_cannot_be_resolved_at_first_is_no_worker_yet():
    found = asyncio.run(first_sets(Names(OSError("down"), OSError("down"), ["fd00::1"]), 2))
    assert found == [frozenset(), frozenset({Endpoint("http://[fd00::1]:8200", "decode")})]


@on_uvloop
async def test_workers_follow_a_name(monkeypatch):
    """127.0.0.1, 127.0.0.2, ... are all this host: one fake worker listens on each, all on one port."""
    first = await FakeWorker("decode", host="127.0.0.1").start()
    port = int(first.url.rsplit(":", 1)[1])
    second = await FakeWorker("decode", host="127.0.0.2", port=port).start()
    prefill = await FakeWorker("prefill").start()
    names = Names(["127.0.0.1"])
    monkeypatch.setattr("eldr.router.app.DnsSource", partial(DnsSource, resolve=names))
    config = RouterConfig.of(
        prefill=(prefill.url,), decode=(f"dns+http://d.local:{port}",), port=0, dns_interval_s=0.05,
        health_interval_s=0.1,
    )  # fmt: skip
    router = Router(config, Scripted())
    await router.start()
    try:
        up = lambda: {w.url for w in router.services.fleet.available("decode")}  # noqa: E731
        assert up() == {first.url}
        names.answers[:] = [["127.0.0.1", "127.0.0.2"]]
        await until(lambda: up() == {first.url, second.url}, "the second joins")
        names.answers[:] = [OSError("the name server is down")]
        asked = names.asked
        await until(lambda: names.asked > asked + 2, "it was asked again")
        assert up() == {first.url, second.url}
        names.answers[:] = [["127.0.0.2"]]
        await until(lambda: up() == {second.url}, "the first drains")
    finally:
        for worker in (first, second, prefill):
            await worker.stop()
        await router.stop(0)


@pytest.mark.parametrize("url", ["dns+https://d:1", "dns+http://d:1#dp=2", "dns+d:1", "dns+http://d:1/x"])
def test_names_that_cannot_be_followed_are_refused(url):
    with pytest.raises(ConfigError, match="decode"):
        RouterConfig.of(prefill=("http://p:1",), decode=(url,))
