"""What is done to the workers, and when: drawn from a seed, so that every router meets the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

ROLES = ("prefill", "decode")
WORKERS = {"prefill": 2, "decode": 4}
FIRST_S = 1.0
# The last act ends so long before the load does.
LAST_S = 1.0


@dataclass(frozen=True, slots=True, order=True)
class Act:
    """What is done to the worker in one place of the fleet, `at_s` seconds after the load began.

    what: kill, restart, stop, continue; fail and slow, which a second one ends; replace, by a worker at another
    address that joins before this one leaves; replace_dead, by one that joins after this one was killed.
    """

    at_s: float
    what: str
    role: str
    place: int


@dataclass(frozen=True, slots=True)
class Scenario:
    """joins: whether workers join and leave at run time, which not every router can."""

    name: str
    words: str
    acts: Callable[[random.Random, float], Iterator[Act]]
    joins: bool = False


def _victims(rng: random.Random) -> Iterator[tuple[str, int]]:
    """Places of the fleet, never the same twice in a row."""
    places = [(role, place) for role in ROLES for place in range(WORKERS[role])]
    last = None
    while True:
        victim = rng.choice([place for place in places if place != last])
        last = victim
        yield victim


def _spells(begin: str, end: str, lasting_s: float, every_s: float) -> Callable[[random.Random, float], Iterator[Act]]:
    """One worker after the other, each for a while."""

    def acts(rng: random.Random, load_s: float) -> Iterator[Act]:
        at_s = FIRST_S
        victims = _victims(rng)
        while at_s + lasting_s <= load_s - LAST_S:
            role, place = next(victims)
            yield Act(at_s, begin, role, place)
            yield Act(at_s + lasting_s, end, role, place)
            at_s += every_s

    return acts


def _replacements(rng: random.Random, load_s: float) -> Iterator[Act]:
    at_s = FIRST_S
    whats = ("replace", "replace_dead")
    for number, (role, place) in enumerate(_victims(rng)):
        if at_s > load_s - 3 * LAST_S:
            return
        yield Act(at_s, whats[number % 2], role, place)
        at_s += 2.0


def _one_of_each(what: str) -> Callable[[random.Random, float], Iterator[Act]]:
    """A decode worker for the first half, a prefill worker for the second."""

    def acts(rng: random.Random, load_s: float) -> Iterator[Act]:
        middle_s, end_s = load_s / 2, load_s - LAST_S
        for role, spell in (("decode", (FIRST_S, middle_s)), ("prefill", (middle_s, end_s))):
            place = rng.randrange(WORKERS[role])
            for at_s in spell:
                yield Act(at_s, what, role, place)

    return acts


def _outages(rng: random.Random, load_s: float) -> Iterator[Act]:
    for role, at_s in (("prefill", FIRST_S), ("decode", load_s / 2)):
        for place in range(WORKERS[role]):
            yield Act(at_s, "kill", role, place)
            yield Act(at_s + 1.0, "restart", role, place)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("kill", "SIGKILL, back after 1 s", _spells("kill", "restart", 1.0, 2.0)),
        Scenario("stop", "SIGSTOP for 3 s", _spells("stop", "continue", 3.0, 3.5)),
        Scenario("replace", "another address", _replacements, joins=True),
        Scenario("slow", "10 times slower", _one_of_each("slow")),
        Scenario("fail", "answers 500", _one_of_each("fail")),
        Scenario("outage", "a whole role killed, back after 1 s", _outages),
    )
}
