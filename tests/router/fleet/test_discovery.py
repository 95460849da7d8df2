"""What names workers beside the admin API: a watched file, DNS."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from eldr.router.app import Router
from eldr.router.config.endpoint import Endpoint
from eldr.router.config.settings import ConfigError, RouterConfig
from eldr.router.fleet.discovery.dns import DnsSource
from tests.router.fake_worker import FakeWorker
from tests.router.harness import Scripted, on_uvloop, until

# The watched file.


def toml(workers: list[FakeWorker]) -> str:
    lists = {role: [w.url for w in workers if w.role == role] for role in ("prefill", "decode")}
    return "\n".join(f"{role} = {json.dumps(urls)}" for role, urls in lists.items()) + "\nhealth_interval_s = 0.1\n"


@on_uvloop
async def test_workers_follow_the_configuration_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    workers = [await FakeWorker(role).start() for role in ("prefill", "decode", "decode", "prefill")]
    file = tmp_path / "eldr.toml"
    file.write_text(toml(workers[:2]))
    load = partial(RouterConfig.load, file, {"port": 0})
    router = Router(load(), lambda group: Scripted(), (file, load))
    await router.start()
    try:

        def urls() -> list[str]:
            return [worker.url for worker in router.membership.workers()]

        assert urls() == [w.url for w in workers[:2]]
        file.write_text(toml(workers))
        await until(lambda: len(list(router.services.fleet.available("decode"))) == 2, "the new one is up")
        assert set(urls()) == {w.url for w in workers}
        for broken in ("prefill = [", "unknown = 1", 'decode = ["nonsense"]', 'decode = "http://x:1"', "decode = []"):
            file.write_text(broken + f"\n# {broken}")
            await until(lambda: "is unchanged" in caplog.text, "it is said")
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

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def __call__(self, host: str, port: int) -> Any:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def endpoints(*addresses: Any) -> frozenset[Endpoint]:
    return frozenset(Endpoint(f"http://{address}:8200", "decode") for address in addresses)


async def first_sets(names: Names, count: int) -> Any:
    found = []
    async for workers in DnsSource("http://decode.local:8200", "decode", 0.001, names).watch():
        found.append(workers)
        if len(found) == count:
            return found
    raise AssertionError("it must never end")


def test_addresses_of_a_name_become_workers_and_failures_keep_them() -> None:
    names = Names(["10.0.0.1", "10.0.0.2"], OSError("down"), TimeoutError(), [], ["10.0.0.2", "10.0.0.1"], ["10.0.0.3"])
    found = asyncio.run(first_sets(names, 2))
    assert found == [endpoints("10.0.0.1", "10.0.0.2"), endpoints("10.0.0.3")]
    assert names.asked == 6


def test_a_name_that_cannot_be_resolved_at_first_is_no_worker_yet() -> None:
    found = asyncio.run(first_sets(Names(OSError("down"), OSError("down"), ["fd00::1"]), 2))
    assert found == [frozenset(), frozenset({Endpoint("http://[fd00::1]:8200", "decode")})]


@on_uvloop
async def test_workers_follow_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1, 127.0.0.2, ... are all this host: one fake worker listens on each, all on one port."""
    first = await FakeWorker("decode", host="127.0.0.1").start()
    port = int(first.url.rsplit(":", 1)[1])
    second = await FakeWorker("decode", host="127.0.0.2", port=port).start()
    prefill = await FakeWorker("prefill").start()
    names = Names(["127.0.0.1"])
    monkeypatch.setattr("eldr.router.fleet.discovery.named.DnsSource", partial(DnsSource, resolve=names))
    config = RouterConfig.of(
        prefill=(prefill.url,), decode=(f"dns+http://d.local:{port}",), port=0, dns_interval_s=0.05,
        health_interval_s=0.1,
    )  # fmt: skip
    router = Router(config, lambda group: Scripted())
    await router.start()
    try:

        def up() -> set[str]:
            return {worker.url for worker in router.services.fleet.available("decode")}

        assert up() == {first.url}
        names.answers[:] = [["127.0.0.1", "127.0.0.2"]]
        await until(lambda: up() == {first.url, second.url}, "the second joins")
        names.answers[:] = [OSError("the name server is down")]
        asked = names.asked
        await until(lambda: names.asked > asked + 2, "it was asked again")
        assert up() == {first.url, second.url}
        assert router.services.metrics.discovery_failures["dns"] >= 2
        names.answers[:] = [["127.0.0.2"]]
        await until(lambda: up() == {second.url}, "the first drains")
    finally:
        for worker in (first, second, prefill):
            await worker.stop()
        await router.stop(0)


@pytest.mark.parametrize("url", ["dns+https://d:1", "dns+http://d:1#dp=2", "dns+d:1", "dns+http://d:1/x?y"])
def test_names_that_cannot_be_followed_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="decode"):
        RouterConfig.of(prefill=("http://p:1",), decode=(url,))
