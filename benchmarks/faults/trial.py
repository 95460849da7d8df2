"""One router in one scenario: the same requests at the same times, the same acts on the same places of the fleet."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from acts import WORKERS, Act, Scenario
from asking import Reply, Request, ask
from members import Member
from rivals import HEADERS, Rival, running

FEWEST_TOKENS, MOST_TOKENS = 4, 40
CLIENT_TIMEOUT_S = 30.0
READY_WITHIN_S = 60.0
# Complete answers in a row that show every worker to be in use.
READY_ANSWERS = 16
# A worker that left is ended when its running requests are sure to be through.
LEFT_FOR_S = 2.0


@dataclass(frozen=True, slots=True)
class Load:
    """rate_per_s requests arrive in the mean for load_s seconds."""

    load_s: float
    rate_per_s: float
    seed: int


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of it. replies: request and reply, in the order of arrival. faults: a worker's port -> when and what.

    spent_twice: hand-offs that more than one decode request was sent with.
    """

    replies: list[tuple[Request, Reply]]
    faults: dict[int, list[tuple[float, str]]]
    spent_twice: int


def requests(load: Load) -> list[tuple[float, Request]]:
    """Arrival times and requests: half streamed, half chats."""
    rng = random.Random(load.seed)
    arrivals: list[tuple[float, Request]] = []
    at_s = rng.expovariate(load.rate_per_s)
    while at_s < load.load_s:
        tokens = rng.randint(FEWEST_TOKENS, MOST_TOKENS)
        request = Request(f"request {len(arrivals)}", tokens, rng.random() < 0.5, chat=rng.random() < 0.5)
        arrivals.append((at_s, request))
        at_s += rng.expovariate(load.rate_per_s)
    return arrivals


class Course:
    """The fleet of one trial, its router, and what is done to them."""

    def __init__(self, rival: Rival, session: aiohttp.ClientSession, members: list[Member], used: Path) -> None:
        self._rival = rival
        self._session = session
        self._used = used
        # Who holds a place of the fleet, and everybody who ever did.
        self._places = {role: [member for member in members if member.role == role] for role in WORKERS}
        self.members = members

    async def act(self, acts: list[Act]) -> None:
        begun_s = time.monotonic()
        async with asyncio.TaskGroup() as under_way:
            for act in sorted(acts):
                await asyncio.sleep(begun_s + act.at_s - time.monotonic())
                under_way.create_task(self._do(act))

    async def _do(self, act: Act) -> None:
        member = self._places[act.role][act.place]
        match act.what:
            case "kill":
                member.kill()
            case "restart":
                member.launch(self._used)
            case "stop":
                member.signal(signal.SIGSTOP)
            case "continue":
                member.signal(signal.SIGCONT)
            case "fail":
                member.signal(signal.SIGUSR1)
            case "slow":
                member.signal(signal.SIGUSR2)
            case "replace":
                await self._replace(act, member)
            case "replace_dead":
                member.kill()
                await self._replace(act, member)

    async def _replace(self, act: Act, old: Member) -> None:
        new = self._places[act.role][act.place] = Member(act.role)
        self.members.append(new)
        new.launch(self._used)
        await until_listening([new])
        await self._rival.join(self._session, new)
        await self._until_serving(new, True)
        await self._rival.leave(self._session, old)
        await self._until_serving(old, False)
        await asyncio.sleep(LEFT_FOR_S)
        old.kill()

    async def _until_serving(self, member: Member, wanted: bool) -> None:
        deadline_s = time.monotonic() + READY_WITHIN_S
        while (member.url in await self._rival.serving(self._session)) is not wanted:
            if time.monotonic() > deadline_s:
                raise SystemExit(f"{self._rival.name}: {member.url} did not {'join' if wanted else 'leave'}")
            await asyncio.sleep(0.05)


async def until_listening(members: list[Member]) -> None:
    deadline_s = time.monotonic() + READY_WITHIN_S
    for member in members:
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", member.port)
                writer.close()
                break
            except OSError:
                if time.monotonic() > deadline_s:
                    raise SystemExit(f"a worker does not listen on port {member.port}") from None
                await asyncio.sleep(0.05)


async def try_router(name: str, scenario: Scenario, load: Load, folder: Path) -> Trial | None:
    """None if the router cannot do what the scenario asks for."""
    used = folder / "used.txt"
    used.write_bytes(b"")
    members = [Member(role) for role, count in WORKERS.items() for _ in range(count)]
    acts = list(scenario.acts(random.Random(load.seed), load.load_s))
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=CLIENT_TIMEOUT_S)
    try:
        for member in members:
            member.launch(used)
        await until_listening(members)
        with running(name, members, folder) as rival:
            if scenario.joins and not rival.takes_joins:
                return None
            async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
                await _until_ready(rival, session, folder)
                course = Course(rival, session, members, used)
                acting = asyncio.create_task(course.act(acts))
                replies = await _send_all(session, rival.url, requests(load))
                await acting
    finally:
        for member in members:
            member.kill()
    spent = Counter(used.read_text().split())
    faults = {member.port: member.faults for member in members}
    return Trial(replies, faults, sum(count > 1 for count in spent.values()))


async def _until_ready(rival: Rival, session: aiohttp.ClientSession, folder: Path) -> None:
    deadline_s = time.monotonic() + READY_WITHIN_S
    in_a_row = 0
    while in_a_row < READY_ANSWERS:
        if time.monotonic() > deadline_s:
            raise SystemExit(f"{rival.name} did not start: see {folder / rival.name}.log")
        reply = await ask(session, rival.url, Request("ready?", 1, stream=False), HEADERS)
        if reply.ended == "complete":
            in_a_row += 1
        else:
            in_a_row = 0
            await asyncio.sleep(0.1)


async def _send_all(
    session: aiohttp.ClientSession, url: str, arrivals: list[tuple[float, Request]]
) -> list[tuple[Request, Reply]]:
    begun_s = time.monotonic()
    asked = []
    async with asyncio.TaskGroup() as under_way:
        for at_s, request in arrivals:
            await asyncio.sleep(begun_s + at_s - time.monotonic())
            asked.append(under_way.create_task(ask(session, url, request, HEADERS)))
    return [(request, task.result()) for (_, request), task in zip(arrivals, asked, strict=True)]
