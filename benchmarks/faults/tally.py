"""What became of the requests of a trial, as numbers and as a table."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

from acts import SCENARIOS, WORKERS
from asking import NEVER, Reply
from rich import box
from rich.table import Table
from trial import Trial

LEGEND = (
    "lost: before the first byte. error event: streams that broke and said so.",
    "cut: streams that broke without a word. wrong: truncated as if complete, wrong, or hung.",
    "ms: p50/p99 of those that ended well; token: the first of a stream.",
    "spent twice: hand-offs that two decode requests were sent with.",
    "in use: decode workers that answered at the end; what is not used cannot break.",
)
END_S = 4.0
# Ends of streams that had begun.
BROKEN = ("error_event", "cut", "truncated")


def tally(trial: Trial) -> dict[str, Any]:
    """Ends and latencies of whole answers and of streams, and what a router could have done better.

    needless: streams that broke although nobody had killed their worker. in_use: decode workers that answered anything
    at the end.
    """
    found: dict[str, Any] = {"requests": len(trial.replies)}
    for name, stream in (("whole", False), ("streamed", True)):
        replies = [reply for request, reply in trial.replies if request.stream is stream]
        complete = [reply for reply in replies if reply.ended == "complete"]
        found[name] = {
            "requests": len(replies),
            "ended": dict(sorted(Counter(reply.ended for reply in replies).items())),
            "total_ms": _quantiles([reply.total_s for reply in complete]),
        }
        if stream:
            found[name]["first_token_ms"] = _quantiles([reply.first_s for reply in complete if reply.first_s])
    found["in_use"] = len(_in_use(trial))
    found["needless"] = sum(_needless(reply, trial.faults) for _, reply in trial.replies)
    found["spent_twice"] = trial.spent_twice
    found["messages"] = dict(Counter(f"{reply.ended}: {reply.message}" for _, reply in trial.replies if reply.message))
    return found


def _quantiles(times_s: list[float]) -> dict[str, float]:
    if len(times_s) < 2:
        return {}
    cuts = statistics.quantiles(times_s, n=100)
    return {"p50": round(1e3 * cuts[49], 1), "p99": round(1e3 * cuts[98], 1)}


def _in_use(trial: Trial) -> set[int]:
    since_s = trial.replies[-1][1].sent_s - END_S
    return {reply.port for _, reply in trial.replies if reply.sent_s > since_s and reply.ended == "complete"}


def _needless(reply: Reply, faults: dict[int, list[tuple[float, str]]]) -> bool:
    killed = (when_s for when_s, what in faults.get(reply.port, ()) if what == "killed")
    end_s = reply.sent_s + reply.total_s
    return reply.ended in BROKEN and not any(reply.sent_s <= when_s <= end_s for when_s in killed)


def losses(found: dict[str, Any]) -> dict[str, int]:
    """What a router need not lose: answers of which the client had nothing yet, and ends that never should be."""
    whole, streamed = Counter(found["whole"]["ended"]), Counter(found["streamed"]["ended"])
    return {
        "whole answers lost": whole.total() - whole["complete"],
        "streams lost before their first token": streamed.total()
        - sum(streamed[end] for end in ("complete", "error_event", *NEVER)),
        "streams truncated, cut, wrong or hung": sum(streamed[end] for end in NEVER),
        "streams broken on a worker that was not killed": found["needless"],
        "hand-offs used twice": found["spent_twice"],
    }


def table(results: dict[str, dict[str, dict[str, Any] | None]]) -> Table:
    """One row a scenario and router."""
    counts = _counts(results)
    shown = Table(title=f"requests that did not end well{counts}", box=box.SIMPLE_HEAD, padding=(0, 0))
    shown.add_column("", no_wrap=True)
    for heading in (
        "whole\nlost", "whole\nms", "streams\nlost", "error\nevent", "cut", "wrong", "token\nms",
        "spent\ntwice", "in\nuse",
    ):  # fmt: skip
        shown.add_column(heading, justify="right", no_wrap=True)
    for scenario, routers in results.items():
        shown.add_row(f"[bold]{scenario}[/]")
        for router, found in routers.items():
            shown.add_row(f"  {router}", *(["no API"] if found is None else _cells(found)))
    meanings = [f"{scenario}: {SCENARIOS[scenario].words}" for scenario in results]
    shown.caption = "\n".join((*LEGEND, *meanings))
    shown.caption_justify = "left"
    return shown


def _counts(results: dict[str, dict[str, dict[str, Any] | None]]) -> str:
    """Every trial has the same requests."""
    for found in (found for routers in results.values() for found in routers.values() if found):
        return f", of {found['whole']['requests']} whole and {found['streamed']['requests']} streamed each time"
    return ""


def _cells(found: dict[str, Any]) -> list[str]:
    whole, streamed = found["whole"], found["streamed"]
    ends, lost = Counter(streamed["ended"]), losses(found)
    cells = [
        lost["whole answers lost"], _shown(whole["total_ms"]), lost["streams lost before their first token"],
        ends["error_event"], ends["cut"], ends["truncated"] + ends["wrong"] + ends["hung"],
        _shown(streamed["first_token_ms"]), found["spent_twice"], f"{found['in_use']}/{WORKERS['decode']}",
    ]  # fmt: skip
    return [str(cell) for cell in cells]


def _shown(quantiles: dict[str, float]) -> str:
    return "/".join(f"{quantiles[name]:.0f}" for name in ("p50", "p99")) if quantiles else ""
