"""What requests leave behind: nothing that only the garbage collector could free."""

from __future__ import annotations

import gc

import pytest

from tests.router.harness import ASK, on_uvloop, ours, running


@pytest.mark.parametrize("keepalive_s", [0, 0.001])
@pytest.mark.parametrize("body", [ASK, {**ASK, "stream": True}, {**ASK, "n": 2}, {**ASK, "prompt": ""}])
@pytest.mark.usefixtures("collector")
@on_uvloop
async def test_a_request_leaves_no_cycle(body: dict[str, object], keepalive_s: float) -> None:
    """Its bodies and counts would stay in memory until the collector comes, which is rare on purpose."""
    async with running(stream_keepalive_s=keepalive_s) as s:
        await s.post(body)
        gc.collect()
        gc.garbage.clear()  # of the start
        for _ in range(5):
            await s.post(body)
        gc.collect()
        assert ours(gc.garbage) == []
