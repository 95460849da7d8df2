"""The replicas of one fleet: what each tells, what each hears, and the bus between them."""

from __future__ import annotations

import asyncio
import logging
import os
import time

from eldr.router.fleet.workers import Fleet
from eldr.router.peers.bus import Bus
from eldr.router.peers.others import HEARTBEAT_S, Others, PeerCounters
from eldr.router.peers.own import Own
from eldr.router.placement.admission import Admission
from eldr.router.placement.elsewhere import Elsewhere
from eldr.router.placement.lanes import Lanes

log = logging.getLogger("eldr.router")


class Peers:
    """Lets this replica and the others decide as one.

    elsewhere: what the others run. It must hear of the fleet's changes after `lanes`.
    """

    def __init__(self, bus: Bus, fleet: Fleet, lanes: Lanes, admission: Admission) -> None:
        self._bus = bus
        self.counters = PeerCounters()
        self.elsewhere = Elsewhere(fleet, lanes, admission)
        self.origin = int.from_bytes(os.urandom(8), "little")
        self._own = Own(self.origin, bus, fleet, admission, self.counters)
        self.others = Others(self.origin, self.elsewhere, self._own.ask, self._own.asked, self.counters)
        self._beating: asyncio.Task[None] | None = None
        lanes.sharing = admission.sharing = self._own

    @property
    def up(self) -> bool:
        """Whether the bus is believed to carry frames. If not, nothing is known of others."""
        return self._bus.up

    async def start(self) -> None:
        """Begin to tell and to hear. It waits for nobody. Raises EldrError for settings that cannot be used."""
        await self._bus.start(self.origin, self._hear, self._connected)
        self._beating = asyncio.get_running_loop().create_task(self._beat())

    def _connected(self) -> None:
        """Nothing that the others said before was heard here, and the other way round."""
        self._own.beat()
        self._own.ask(None)

    def _hear(self, frame: bytes) -> None:
        self.others.hear(frame, time.monotonic())

    async def _beat(self) -> None:
        up = False
        while True:
            if self._bus.up != up:
                up = self._bus.up
                if up:
                    log.info("other replicas can be heard")
                else:
                    log.warning("other replicas cannot be heard; this one works alone")
            self._own.beat()
            self.others.look(time.monotonic())
            await asyncio.sleep(HEARTBEAT_S)

    async def close(self) -> None:
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)
        self._own.close()
        await self._bus.close()
