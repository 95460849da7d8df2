"""The view of all processes of a router on one machine (`--processes`), whichever of them is asked.

The one that is asked has the others' answers within a moment, and puts them together with its own. One that does not
answer in time is left out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import orjson

from eldr.router.peers.siblings import Siblings

log = logging.getLogger("eldr.router")

# Of the state for the page: so many decisions.
DECISIONS = 60


class Whole:
    """Answers from all processes. siblings: None if this one is the only one."""

    def __init__(self, siblings: Siblings | None) -> None:
        self.siblings = siblings
        self._tasks: set[asyncio.Task[None]] = set()

    def gather(self, kind: bytes, details: bytes, own: bytes, finish: Callable[[list[bytes]], None]) -> None:
        """Call `finish` with this process's own answer and those of the others, of the same kind."""
        if self.siblings is None:
            finish([own])
            return
        task = asyncio.get_running_loop().create_task(self._gather(self.siblings.ask(kind, details), own, finish))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _gather(self, asking: Awaitable[list[bytes]], own: bytes, finish: Callable[[list[bytes]], None]) -> None:
        others = [answer for answer in await asking if answer]
        try:
            finish([own, *others])
        except Exception:
            log.exception("the answers of this router's processes cannot be put together")


def all_metrics(texts: Iterable[bytes]) -> bytes:
    """Put expositions of several processes together. Each begins with the label of its samples and a line end.

    The samples of a family have to stand together (https://prometheus.io/docs/instrumenting/exposition_formats/).
    """
    families: dict[bytes, tuple[list[bytes], list[bytes]]] = {}
    end = b""
    for text in texts:
        label, _, rest = text.partition(b"\n")
        samples: list[bytes] = []
        for line in rest.splitlines():
            if line.startswith(b"# EOF"):
                end = line + b"\n"
            elif line.startswith(b"# "):
                name = line.split(b" ", 3)[2]
                about, samples = families.setdefault(name, ([], []))
                if line not in about:
                    about.append(line)
            else:
                name, brace, labels = line.partition(b"{")
                if brace and b" " not in name:
                    samples.append(name + b"{" + label + b"," + labels)
                else:
                    name, _, value = line.partition(b" ")
                    samples.append(name + b"{" + label + b"} " + value)
    lines = [line for about, samples in families.values() for line in (*about, *samples)]
    return b"".join(line + b"\n" for line in lines) + end


def all_workers(lists: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Put lists of workers together: what the processes know is alike, and what they run adds up.

    `elsewhere` is then what runs there for other machines.
    """
    own = lists[0]
    for worker in own:
        busy = worker["in_flight"] + worker["elsewhere"]
        for others in lists[1:]:
            for other in others:
                if (other["url"], other["role"]) == (worker["url"], worker["role"]):
                    worker["in_flight"] += other["in_flight"]
        worker["elsewhere"] = max(0, busy - worker["in_flight"])
    return own


def all_states(answers: list[bytes]) -> bytes:
    """Put states for the page together."""
    if len(answers) == 1:
        return answers[0]
    states = [orjson.loads(answer) for answer in answers]
    state = states[0]
    for other in states[1:]:
        for part in ("totals", "queue"):
            for key, value in other[part].items():
                if key != "slots":
                    state[part][key] += value
        for name, histogram in other["histograms"].items():
            counts = state["histograms"][name]["counts"]
            state["histograms"][name]["counts"] = [a + b for a, b in zip(counts, histogram["counts"], strict=True)]
        state["decisions"] += other["decisions"]
    state["workers"] = all_workers([each["workers"] for each in states])
    state["decisions"] = sorted(state["decisions"], key=lambda placed: -placed["unix_s"])[:DECISIONS]
    reasons: dict[tuple[str, str], int] = {}
    for each in states:
        for reason in each["reasons"]:
            key = reason["policy"], reason["reason"]
            reasons[key] = reasons.get(key, 0) + reason["count"]
    state["reasons"] = [
        {"policy": policy, "reason": reason, "count": count}
        for (policy, reason), count in sorted(reasons.items(), key=lambda item: -item[1])
    ]
    if state["peers"] is not None:
        state["peers"]["processes"] = len(states)
    return orjson.dumps(state)
