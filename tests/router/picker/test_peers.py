"""Two pickers that decide as one, over a real NATS server."""

from __future__ import annotations

from typing import Any

from eldr.router.app import Router
from eldr.router.config.picker import PickerConfig
from eldr.router.placement.making import policy_maker
from tests.router.harness import until
from tests.router.peers.replicas import nats_server
from tests.router.picker.client import picking
from tests.router.picker.test_choice import all_over


async def test_what_one_picks_the_other_counts() -> None:
    nats = await nats_server()
    try:
        settings: dict[str, Any] = {"peers": (nats.url,), "health_interval_s": 0.1}
        async with picking(aggregated=1, policy="jsq", **settings) as g:
            url = g.setup.aggregated[0].url
            config = PickerConfig.of(worker=(url,), port=0, grpc_listen="127.0.0.1:0", **settings)
            other = Router(config, policy_maker(config.placement))
            await other.start()
            try:
                worker = other.services.fleet.workers("decode")[url]
                exchange, _ = await g.ask()
                await until(lambda: worker.busy == 1, "the other counts it")
                await exchange.answer()
                await exchange.trailers()
                await until(lambda: worker.busy == 0, "it has ended there too")
                await all_over(g)
            finally:
                await other.stop(0)
    finally:
        nats.stop()
