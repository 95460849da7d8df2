"""The page that shows the fleet, in a real browser."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Locator, Page, async_playwright, expect

from eldr.learning.step_counters import StepCounters
from eldr.policies.expected_union import ExpectedUnion
from eldr.policies.load import ShortestQueue
from tests.router.engine_metrics import said, steps_said
from tests.router.fake_worker import FakeWorker, Seen, counts_wire
from tests.router.harness import ASK, Setup, on_uvloop, running, until

KEY = "the-admin-key"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A browser of its own accord looks things up on the network and sandboxes itself, which root may not.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
# A crowded machine may take its time.
expect.set_options(timeout=25_000)
HOSTILE = "<img src=x onerror=document.title='taken'>"


def browser_path() -> str:
    found = os.environ.get("ELDR_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium: run `make browser`, install it yourself, or name it in ELDR_CHROMIUM")
    return found


@asynccontextmanager
async def shown(
    tmp_path: Path,
    policy: ExpectedUnion | None = None,
    key: str | None = KEY,
    width: int = 1400,
    fine: str = " 401 ",
    **settings: Any,
) -> AsyncIterator[Any]:
    """A router, and its page in a browser; with the key given, unless it is None.

    What the browser complains of fails the test, unless it matches `fine`.
    """
    (tmp_path / "admin").write_text(KEY + "\n")
    settings = {"admin_listen": "127.0.0.1:0", "admin_key_file": tmp_path / "admin", **settings}
    async with running(policy=policy or ShortestQueue(), **settings) as s, async_playwright() as play:
        browser = await play.chromium.launch(executable_path=browser_path(), args=FLAGS)
        page = await browser.new_page(viewport={"width": width, "height": 900}, color_scheme="light")
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        home = f"http://127.0.0.1:{s.router.admin_port}"
        await page.goto(home + "/ui")
        if key is not None:
            await enter(page, key)
        yield s, page
        await browser.close()
        assert [text for text in complaints if re.search(fine, text) is None] == []
        assert all(url.startswith((home, "data:")) for url in asked)


async def enter(page: Page, key: str) -> None:
    await page.get_by_role("textbox", name="Admin key").fill(key)
    await page.get_by_role("button", name="Show").click()


def row(page: Page, worker: FakeWorker) -> Locator:
    return page.locator("tr", has_text=worker.url.removeprefix("http://")).first


async def held(s: Setup, count: int, label: str = "code") -> Any:
    """Streams that run until the returned event is set."""
    release = asyncio.Event()

    async def hold(worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        await worker.answer(seen, writer)

    for worker in s.decode:
        worker.behaviour = hold
    headers = {"x-eldr-label": label}
    tasks = [asyncio.ensure_future(s.post({**ASK, "stream": True}, headers=headers)) for _ in range(count)]
    await until(lambda: sum(worker.running for worker in s.decode) == count, "all run")
    return release, tasks


@on_uvloop
async def test_nothing_is_shown_without_the_key(tmp_path: Path) -> None:
    async with shown(tmp_path, key=None) as (s, page):
        await expect(page.get_by_role("heading", name="Admin key")).to_be_visible()
        await expect(page.locator("#fleet")).to_be_hidden()
        assert s.decode[0].url.removeprefix("http://") not in await page.content()
        await enter(page, "wrong")
        await expect(page.get_by_role("alert")).to_have_text("This is not the admin key.")
        await enter(page, KEY)
        await expect(row(page, s.decode[0])).to_be_visible()
        await page.reload()
        await expect(row(page, s.decode[0])).to_be_visible()  # the tab remembers it
        await page.get_by_role("button", name="Forget key").click()
        await expect(page.locator("#fleet")).to_be_hidden()


@on_uvloop
async def test_the_clients_address_has_no_page(tmp_path: Path) -> None:
    async with running() as s:
        assert (await s.get("/ui")).status == 404
        assert (await s.get("/ui/state")).status == 404


@on_uvloop
async def test_a_bus_that_is_down_leaves_the_others_unknown(tmp_path: Path) -> None:
    async with shown(tmp_path, peers=("nats://127.0.0.1:1",)) as (_, page):
        await expect(page.locator(".tile", has_text="In flight")).to_contain_text("0 waiting, others unknown")


@on_uvloop
async def test_load_speed_and_decisions_are_followed(tmp_path: Path) -> None:
    async with shown(tmp_path, decode=2, max_inflight=4) as (s, page):
        for worker in s.decode:
            await expect(row(page, worker)).to_contain_text("up")
        await expect(page.get_by_text("No requests yet.")).to_be_visible()
        release, tasks = await held(s, 3)
        loads = [f"{s.router.services.fleet.workers('decode')[worker.url].in_flight} / 4" for worker in s.decode]
        assert sorted(loads) == ["1 / 4", "2 / 4"]
        for worker, load in zip(s.decode, loads, strict=True):
            await expect(row(page, worker)).to_contain_text(load)
        await expect(page.locator(".tile", has_text="In flight").locator(".value span").first).to_have_text("3")
        decisions = page.locator("#log tr")
        await expect(decisions).to_have_count(3)
        await expect(decisions.first).to_contain_text("code")
        await expect(page.locator("#why")).to_contain_text("3 (100 %)")
        release.set()
        await asyncio.gather(*tasks)
        for worker in s.decode:
            await expect(row(page, worker)).to_contain_text("0 / 4")
            await expect(row(page, worker)).to_contain_text(" ms")  # its time per output token
        await expect(page.locator(".tile", has_text="Requests").locator(".more")).to_contain_text("3, 0 failed")


@on_uvloop
async def test_workers_that_leave_and_fall_are_shown_as_such(tmp_path: Path) -> None:
    async with shown(tmp_path, decode=3) as (s, page):
        membership = s.router.membership
        release, tasks = await held(s, 3)
        membership.drain(membership.worker(s.decode[0].url, "decode"), 60)
        await expect(row(page, s.decode[0]).locator(".state")).to_have_text("draining")
        release.set()
        await asyncio.gather(*tasks)
        await expect(page.locator("#decode tr")).to_have_count(2)
        await s.decode[1].stop()
        await expect(row(page, s.decode[1]).locator(".state")).to_have_text("down")
        await expect(row(page, s.decode[1])).to_contain_text("refused")
        await expect(page.get_by_text("1 of 2 up")).to_be_visible()


@on_uvloop
async def test_each_worker_has_the_name_of_its_model_if_there_are_several(tmp_path: Path) -> None:
    def two_models(s: Setup) -> None:
        s.prefill[1].model = s.decode[1].model = HOSTILE

    async with shown(tmp_path, prefill=2, decode=2, prepare=two_models) as (s, page):
        for worker in (*s.prefill, *s.decode):
            await expect(row(page, worker).locator(".model")).to_have_text(worker.model)
    async with shown(tmp_path) as (s, page):
        await expect(row(page, s.decode[0]).locator(".state")).to_have_text("up")
        await expect(row(page, s.decode[0]).locator(".model")).to_have_text("")


@on_uvloop
async def test_learned_step_times_are_shown(tmp_path: Path) -> None:
    policy = ExpectedUnion()
    async with shown(tmp_path, policy=policy, decode=2, load_interval_s=0.05) as (s, page):
        steps = 0.0

        async def count() -> None:
            nonlocal steps
            while True:
                steps += 50
                for worker, step_s in zip(s.decode, (0.01, 0.03), strict=True):
                    counted = StepCounters(gaps=8 * steps, gaps_s=8 * steps * step_s, steps=steps)
                    worker.metrics = said() + steps_said(counted)
                await asyncio.sleep(0.02)

        counting = asyncio.create_task(count())
        try:
            await expect(row(page, s.decode[1]).locator("td").nth(4)).to_have_text(
                re.compile(r"^(29|30|31)(\.\d)? ms ×1\.(4|5)\d$")
            )
        finally:
            counting.cancel()


@on_uvloop
async def test_the_heat_map_holds_what_the_policy_expects(tmp_path: Path) -> None:
    async with shown(tmp_path, policy=ExpectedUnion(), decode=2) as (s, page):
        for worker in s.prefill:
            worker.counts = counts_wire(4)  # every token chose experts 0 and 1 of 8, in both layers
        release, tasks = await held(s, 1)
        busy = next(worker for worker in s.decode if worker.running)
        idle = next(worker for worker in s.decode if not worker.running)
        await expect(page.get_by_text("Expected active experts, layer by layer")).to_be_visible()
        await expect(row(page, busy).locator("td").nth(6)).to_have_text("2.0")
        await expect(row(page, idle).locator("td").nth(6)).to_have_text("0.0")
        pixels = "canvas => Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, 1).data)"
        dark, light = [await row(page, worker).locator("canvas").evaluate(pixels) for worker in (busy, idle)]
        assert len(dark) == len(light) == 4 * 2  # two layers
        assert dark[:3] == [18, 62, 140]  # the most that there is
        assert light[:3] == [238, 243, 250]  # nothing
        box = await row(page, busy).locator("canvas").bounding_box()
        assert box is not None
        await page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 5)
        await expect(page.locator("#tip")).to_contain_text("layer 1: 2.0")
        release.set()
        await asyncio.gather(*tasks)


@on_uvloop
async def test_what_clients_send_is_shown_as_text(tmp_path: Path) -> None:
    async with shown(tmp_path, fine="Content Security Policy") as (s, page):
        label = HOSTILE.replace(" ", "/")
        await s.post(headers={"x-eldr-label": label, "x-request-id": label})
        await expect(page.locator("#log tr").first).to_contain_text(label)
        assert await page.title() == "eldr"
        assert await page.locator("#log img").count() == 0
        # And if it were not, the policy of the page would stop it.
        await page.evaluate("html => document.querySelector('#about').innerHTML = html", HOSTILE)
        await asyncio.sleep(0)
        assert await page.title() == "eldr"
        answer = await s.session.get(f"http://127.0.0.1:{s.router.admin_port}/ui")
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy


@pytest.mark.parametrize("width", [390, 1400])
@on_uvloop
async def test_forty_workers_fit(tmp_path: Path, width: int) -> None:
    async with shown(tmp_path, policy=ExpectedUnion(), decode=40, prefill=4, width=width) as (s, page):
        await asyncio.gather(*(s.post(headers={"x-eldr-label": "chat"}) for _ in range(20)))
        await expect(page.locator("#decode tr")).to_have_count(40)
        await expect(page.locator("#log tr")).to_have_count(20)
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@on_uvloop
async def test_everybody_can_use_it(tmp_path: Path) -> None:
    async with shown(tmp_path, policy=ExpectedUnion(), decode=2) as (s, page):
        await s.post(headers={"x-eldr-label": "chat"})
        await expect(page.locator("#log tr")).to_have_count(1)
        for theme in ("dark", "light"):
            await page.get_by_role("button", name=f"Switch to {theme} colours").click()
            assert await page.evaluate("document.documentElement.dataset.theme") == theme
            found = await Axe().run(page)
            assert [(v["id"], v["nodes"][0]["html"]) for v in found.response["violations"]] == []


@on_uvloop
async def test_it_can_be_paused_and_says_when_the_router_is_gone(tmp_path: Path) -> None:
    async with shown(tmp_path, fine="INTERNET_DISCONNECTED|Failed to fetch") as (s, page):
        await expect(page.get_by_role("status")).to_have_text("live")
        await page.get_by_role("button", name="Pause").click()
        await s.post()
        await asyncio.sleep(1.5)  # longer than the page waits between two questions
        await expect(page.locator("#log tr")).to_have_count(0)
        await page.get_by_role("button", name="Resume").click()
        await expect(page.locator("#log tr")).to_have_count(1)
        await page.context.set_offline(True)
        await expect(page.get_by_role("status")).to_have_text("router not reachable")
        await page.context.set_offline(False)
        await expect(page.get_by_role("status")).to_have_text("live")
