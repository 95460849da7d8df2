"""What is done to the fleet during the soak, at random."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections import Counter

from fleet import SoakFleet
from members import Member

LEAST = {"prefill": 2, "decode": 3}
MOST = {"prefill": 4, "decode": 8}
DOWN_S = (1.0, 8.0)
STOPPED_S = (0.5, 12.0)


class Chaos:
    """Every `period_s` seconds one act; acts that need time run beside the next ones.

    done: act -> how often.
    """

    def __init__(self, fleet: SoakFleet, period_s: float, seed: int) -> None:
        self._fleet = fleet
        self._period_s = period_s
        self._rng = random.Random(seed)
        self._under_way: set[asyncio.Task[None]] = set()
        self._busy: set[Member] = set()
        self.done: Counter[str] = Counter()

    async def run(self, stop: asyncio.Event) -> None:
        acts = {"kill": 4, "stall": 4, "add": 3, "drain": 3, "take_out": 1, "reload": 1}
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._rng.expovariate(1 / self._period_s)):
                    await stop.wait()
                break
            act = self._rng.choices(list(acts), list(acts.values()))[0]
            task = asyncio.create_task(self._do(act, self._rng.choice(("prefill", "decode", "decode"))))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
        await asyncio.gather(*self._under_way)

    async def _do(self, act: str, role: str) -> None:
        fleet = self._fleet
        members = [member for member in fleet.members if member.role == role]
        idle = [member for member in members if member not in self._busy]
        running = sum(member.runs for member in members)
        if act == "reload":
            assert fleet.router is not None
            fleet.router.send_signal(signal.SIGHUP)
        elif act == "add":
            if len(members) >= MOST[role]:
                return
            await fleet.add(role)
        elif not idle or running <= LEAST[role]:
            return
        else:
            await self._hurt(act, self._rng.choice(idle))
        self.done[f"{act}_{role}" if act != "reload" else act] += 1

    async def _hurt(self, act: str, member: Member) -> None:
        fleet = self._fleet
        self._busy.add(member)
        if act == "kill":
            member.kill()
            await asyncio.sleep(self._rng.uniform(*DOWN_S))
            member.launch(fleet.used)
        elif act == "stall":
            member.signal(signal.SIGSTOP)
            await asyncio.sleep(self._rng.uniform(*STOPPED_S))
            member.signal(signal.SIGCONT)
        else:
            await fleet.drain(member, at_once=act == "take_out")
        self._busy.discard(member)
