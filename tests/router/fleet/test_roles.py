"""Workers of one model serve it in one way: whole, or in two legs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from eldr.cost import DEFAULT_PRESET
from eldr.router.app import Router
from eldr.router.config.endpoint import Endpoint
from eldr.router.config.settings import ConfigError, RouterConfig
from eldr.router.fleet.membership import MembershipError
from tests.router.admin import ask_admin, listed, until_state
from tests.router.fake_worker import FakeWorker
from tests.router.harness import ASK, Scripted, aggregated, on_uvloop, running, until


@pytest.mark.parametrize(
    ("workers", "wrong"),
    [
        ({}, "no workers are given"),
        ({"prefill": ["http://p:1"]}, "decode is empty"),
        ({"worker": ["http://w:1"], "decode": ["http://d:1"]}, "prefill is empty"),
        ({"worker": ["http://w:1"], "prefill": ["http://p:1"], "decode": ["http://w:1/"]}, "can have one role"),
    ],
)
def test_workers_that_could_serve_nothing_are_refused(workers: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        RouterConfig.of(**workers)


def test_costs_of_aggregated_workers() -> None:
    config = RouterConfig.of(worker=["http://w:1"], worker_costs={"http://w:1": DEFAULT_PRESET})
    assert config.placement.options.worker_costs.keys() == {"http://w:1"}


def test_aggregated_workers_may_be_named_by_dns() -> None:
    config = RouterConfig.of(worker=["dns+http://w.local:8000", "http://w:1#dp=2"])
    assert config.workers.dns_names == [("http://w.local:8000", "aggregated")]
    assert config.workers.endpoints == {Endpoint(f"http://w:1#rank={rank}", "aggregated") for rank in (0, 1)}


@on_uvloop
async def test_a_mixture_is_refused_at_the_start() -> None:
    with pytest.raises(MembershipError, match="serves the same model"):
        async with running(1, 1, aggregated=1):
            pass


@pytest.mark.parametrize("role", ["prefill", "decode"])
@on_uvloop
async def test_another_kind_of_worker_is_kept_out_until_the_first_kind_drains(role: str, admin: dict[str, Any]) -> None:
    new = await FakeWorker(role).start()
    async with aggregated(1, **admin) as s:
        try:
            await ask_admin(s, "POST", "/admin/workers", {"url": new.url, "role": role})
            await until_state(s, role, new.url, "down")  # type: ignore[arg-type]
            problem = (await listed(s))[role, new.url]["problem"]
            assert s.aggregated[0].url in problem
            assert "drain" in problem
            for _ in range(3):
                assert (await s.post()).status == 200
            assert (len(new.generated), len(s.aggregated[0].generated)) == (0, 3)
            await ask_admin(s, "POST", "/admin/drain", {"url": s.aggregated[0].url})
            await until_state(s, role, new.url, "up")  # type: ignore[arg-type]
        finally:
            await new.stop()


@on_uvloop
async def test_a_fleet_changes_over_without_losing_a_request(admin: dict[str, Any]) -> None:
    new = [await FakeWorker().start() for _ in range(2)]
    async with running(1, 1, **admin) as s:
        try:
            old = [*s.prefill, *s.decode]
            for worker in new:
                await ask_admin(s, "POST", "/admin/workers", {"url": worker.url, "role": "aggregated"})
                await until_state(s, "aggregated", worker.url, "down")
            assert (await s.post()).status == 200
            for worker in old:
                await ask_admin(s, "POST", "/admin/drain", {"url": worker.url})
            for _ in range(6):
                assert (await s.post()).status == 200
            assert [len(worker.generated) for worker in old] == [1, 1]
            assert sum(len(worker.generated) for worker in new) == 6
            assert (await s.get("/ready")).status == 200
        finally:
            for worker in new:
                await worker.stop()


@on_uvloop
async def test_decode_workers_become_aggregated_and_again_decode_workers(tmp_path: Path) -> None:
    prefill = await FakeWorker("prefill").start()
    workers = [await FakeWorker().start() for _ in range(2)]
    urls = str([worker.url for worker in workers]).replace("'", '"')
    rest = "health_interval_s = 0.1\n"
    legs = f'prefill = ["{prefill.url}"]\ndecode = {urls}\n{rest}'
    whole = f"worker = {urls}\n{rest}"
    file = tmp_path / "eldr.toml"
    file.write_text(legs)
    load = partial(RouterConfig.load, file, {"port": 0})
    router = Router(load(), lambda group: Scripted(), (file, load))
    await router.start()
    try:
        fleet = router.services.fleet
        assert (len(fleet.groups), fleet.groups[0].legs) == (1, ("prefill", "decode"))
        objects = list(fleet.workers("decode").values())
        for text, roles, group_legs in (
            (whole, {"aggregated"}, ("decode",)),
            (legs, {"decode", "prefill"}, ("prefill", "decode")),
        ):
            file.write_text(text)
            router.reload()
            await until(lambda: {w.role for w in router.membership.workers()} == roles, "the roles change")  # noqa: B023
            await until(lambda: fleet.ready, "they are in service")
            assert fleet.groups[0].legs == group_legs
            # The workers themselves never left.
            assert list(fleet.workers("decode").values()) == objects
            assert all(worker.available for worker in objects)
    finally:
        for worker in (prefill, *workers):
            await worker.stop()
        await router.stop(0)


@on_uvloop
async def test_a_worker_that_is_of_two_models_at_once_serves_whole(admin: dict[str, Any]) -> None:
    """A list that makes a mixture of workers in service. Requests run whole then, which every decode worker can do."""
    async with running(
        1, 1, aggregated=1, prepare=lambda s: setattr(s.aggregated[0], "model", "big"), health_interval_s=60, **admin
    ) as s:
        s.aggregated[0].aliases = ["tiny"]
        fleet = s.router.services.fleet
        worker = next(fleet.of_role("aggregated"))
        await s.router.services.lists.look_at(worker)
        assert len(fleet.groups) == 1
        for _ in range(4):
            assert (await s.post({**ASK, "model": "tiny"})).status == 200
        assert len(s.prefill[0].generated) == 0
        assert [len(each.generated) > 0 for each in (*s.decode, *s.aggregated)] == [True, True]
