"""Repeats a router's decision log on fresh policies and reports where the choices differ."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from eldr.errors import EldrError
from eldr.policies.base import DecodeRequest, Policy
from eldr.policies.learned import Learned
from eldr.policies.logged import LogHeader, request_of
from eldr.policies.refit import Refit
from eldr.policies.shares import Share
from eldr.policies.worker_costs import LearnedCost
from eldr.replay.errors import ReplayError

T = TypeVar("T")
U = TypeVar("U")
# A different policy may differ in most of several million choices.
KEPT_DIFFERENCES = 1000


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a log and its position.

    number: the line number, from 1.
    """

    file: str
    number: int
    text: bytes

    @property
    def where(self) -> str:
        return f"{self.file}, line {self.number}"


@dataclass(frozen=True, slots=True)
class Difference:
    """A choice that came out differently.

    logged, chosen: the workers. None if the policy failed.
    """

    where: str
    request: str
    logged: str | None
    chosen: str | None


@dataclass(slots=True)
class Repetition:
    """The result of repeating a log.

    headers: one for each start of the router.
    decisions: the number of choices repeated.
    differing: the number of choices that came out differently.
    skipped: the number of decisions after a gap, which cannot be repeated.
    differences: the first KEPT_DIFFERENCES differences.
    gaps: where lines were lost.
    cut_off: incomplete last lines, as a crash leaves them.
    logged, chosen: worker -> requests sent there.
    """

    headers: list[LogHeader] = field(default_factory=list)
    decisions: int = 0
    differing: int = 0
    skipped: int = 0
    differences: list[Difference] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    cut_off: list[str] = field(default_factory=list)
    logged: Counter[str] = field(default_factory=Counter)
    chosen: Counter[str] = field(default_factory=Counter)

    @property
    def equal(self) -> bool:
        """Whether every decision of the log could be repeated and came out the same."""
        return not self.differing and not self.skipped and not self.gaps


def read_lines(paths: Iterable[Path]) -> Iterator[Line]:
    """Read the lines of one log's files, oldest first, decompressing .gz files.

    Raises ReplayError with the file name.
    """
    for path in paths:
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                for number, text in enumerate(file, 1):
                    yield Line(str(path), number, text)
        except (OSError, EOFError) as error:
            raise ReplayError(f"decision log {path}: {getattr(error, 'strerror', None) or error}") from None


def repeat_decisions(lines: Iterable[Line], make: Callable[[LogHeader], Policy]) -> Repetition:
    """Repeat a log: a policy is told what the log says, chooses again, and its choices are compared.

    If a choice differs, the request is started on the worker of the log, so that later choices start from the logged
    state. An incomplete line at the end of the log, or before the header of the next start, is what a crash leaves. It
    is not an error.

    lines: the lines of the log.
    make: makes the policy for each header.
    Raises ReplayError with the line that is not an event.
    """
    repeater = _Repeater(make)
    broken: tuple[Line, ReplayError] | None = None
    for line in lines:
        if not line.text.strip():
            continue
        try:
            event = json.loads(line.text)
            is_header = event["event"] == "log"
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if broken is None:
                broken = line, _no_event(line, error)
                continue
            raise broken[1] from None
        if broken is not None:
            if not is_header:
                raise broken[1]
            repeater.result.cut_off.append(broken[0].where)
            broken = None
        repeater.hear(event, line)
    if broken is not None:
        repeater.result.cut_off.append(broken[0].where)
    if not repeater.result.headers:
        raise ReplayError("the decision log has no header: it is empty or not a decision log")
    return repeater.result


def _no_event(line: Line, error: Exception) -> ReplayError:
    reason = str(error) if isinstance(error, EldrError) else repr(error)
    return ReplayError(f"decision log {line.where}: not an event of a decision log ({reason})")


class _Repeater:
    """Sends every line to the run of the router that wrote it. During an upgrade two routers write to the same file."""

    def __init__(self, make: Callable[[LogHeader], Policy]) -> None:
        self.result = Repetition()
        self._make = make
        self._runs: dict[str | None, _Run] = {}

    def hear(self, event: dict[str, Any], line: Line) -> None:
        name = event.get("run")
        if event["event"] == "log":
            header = _parsed(line, lambda: LogHeader.from_wire(event))
            self.result.headers.append(header)
            self._runs[name] = _Run(self.result, self._make(header))
        elif name in self._runs:
            _parsed(line, lambda: self._runs[name].hear(event, line))
        else:
            raise ReplayError(
                f"decision log {line.where}: there is no header before this line; give the older files of the log first"
            )


def _parsed(line: Line, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except (ValueError, KeyError, TypeError, IndexError, EldrError) as error:
        raise _no_event(line, error) from None


class _Run:
    """One start of the router: its policy, its numbered workers, and what runs, started here or by other routers."""

    def __init__(self, result: Repetition, policy: Policy) -> None:
        self._result = result
        self._policy = policy
        self._behind_gap = False
        self._workers: list[str] = []
        self._requests: dict[str, DecodeRequest] = {}
        self._shares: dict[int, Share] = {}

    def hear(self, event: dict[str, Any], line: Line) -> None:
        kind, policy = event["event"], self._policy
        if kind == "gap":
            self._result.gaps.append(f"{line.where}: {event['lines']} lines were lost")
            self._behind_gap = True
        elif self._behind_gap:
            self._result.skipped += kind == "choose"
        elif kind == "choose":
            request = self._choose(event, line)
            if event["started"]:
                _tell(policy.started, request, event["worker"])
        elif kind == "refit":
            policy.refitted(Refit.from_wire(event))
        elif kind == "learned":
            policy.learned(Learned.from_wire(event))
        elif kind == "cost_learned":
            policy.cost_learned(event["worker"], LearnedCost.from_wire(event))
        elif kind == "joined":
            self._workers.append(event["worker"])
            policy.joined(event["worker"])
        elif kind == "left":
            policy.left(event["worker"])
        elif kind == "started":
            _tell(policy.started, self._requests[event["id"]], event["worker"])
        elif kind == "prompt_computed":
            _tell(policy.prompt_computed, self._requests[event["id"]], event["worker"])
        elif kind == "finished":
            request = self._requests.pop(event["id"])
            request.generated_tokens = event.get("generated_tokens")
            _tell(policy.finished, request, event["worker"])
        elif kind == "elsewhere_started":
            share = self._shares[event["share"]] = Share.from_wire(event)
            _tell(policy.elsewhere_started, event["worker"], share)
        elif kind == "elsewhere_prompt_computed":
            _tell(policy.elsewhere_prompt_computed, event["worker"], self._shares[event["share"]])
        elif kind == "elsewhere_finished":
            _tell(policy.elsewhere_finished, event["worker"], self._shares.pop(event["share"]))
        else:
            raise KeyError(kind)

    def _choose(self, event: dict[str, Any], line: Line) -> DecodeRequest:
        request = request_of(event, self._workers)
        eligible = [self._workers[number] for number in event["eligible"]]
        in_flight = dict(zip(eligible, event["load"], strict=True))
        self._requests[request.request_id] = request
        logged, chosen = event["worker"], _worker_of(self._policy, request, in_flight)
        result = self._result
        result.decisions += 1
        if logged is not None:
            result.logged[logged] += 1
        if chosen is not None:
            result.chosen[chosen] += 1
        if chosen != logged:
            result.differing += 1
            if result.differing <= KEPT_DIFFERENCES:
                result.differences.append(Difference(line.where, request.request_id, logged, chosen))
        return request


def _tell(hook: Callable[[T, U], None], one: T, other: U) -> None:
    """Call a hook the way the router does: if the policy fails, the run goes on."""
    with contextlib.suppress(Exception):
        hook(one, other)


def _worker_of(policy: Policy, request: DecodeRequest, in_flight: dict[str, int]) -> str | None:
    """Return the policy's choice, or None if it fails. The router then took the least loaded worker."""
    try:
        return policy.choose(request, in_flight).worker
    except Exception:
        return None
