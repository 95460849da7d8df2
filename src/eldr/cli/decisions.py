"""`eldr decisions`: repeats a decision log and prints the differences."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eldr.policies.options import PolicyOptions
from eldr.settings import add_flags, given

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.console import RenderableType

    from eldr.calibration import Calibration
    from eldr.policies.base import Policy
    from eldr.policies.logged import LogHeader
    from eldr.replay.decisions import Line, Repetition

SUMMARY = "repeat a router's decision log and compare the choices"
EXAMPLES = """examples:
  eldr decisions decisions.jsonl
  eldr decisions decisions.jsonl.2.gz decisions.jsonl.1 decisions.jsonl
  eldr decisions decisions.jsonl --policy expected-union --calibration qwen3.eldr.npz
  eldr decisions decisions.jsonl --json | jq .differing

`eldr serve --decision-log FILE` writes the log. Give the files of a rotated log oldest first.

With --policy, --seed or a policy option, a different policy gets the same traffic. The result shows what it would have
chosen, each time in the state that the logged choices led to.

exit codes: 0 every choice came out the same, 1 some differ or could not be repeated, 2 not a decision log. With a
different policy, differences are not a failure.
"""
SHOWN = 10
EXIT_DIFFERENT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `eldr decisions`."""
    flag = parser.add_argument
    flag("log", type=Path, nargs="+", metavar="FILE", help="the decision log, or its files, oldest first; may be .gz")
    flag("--calibration", type=Path, metavar="FILE", help="calibration file, if it has moved (the path in the log)")
    flag("--policy", metavar="NAME", help="try this policy on the same traffic (the policy in the log)")
    flag("--seed", type=int, metavar="N", help="seed of the policy's random choices (the seed in the log)")
    flag("--json", action="store_true", help="print JSON")
    add_flags(parser, PolicyOptions)


def run(arguments: argparse.Namespace) -> int:
    """Run `eldr decisions` and return the exit code."""
    from rich.console import Console

    from eldr.replay.decisions import read_lines, repeat_decisions

    with _progress(arguments.log) as passed:
        repetition = repeat_decisions(passed(read_lines(arguments.log)), _maker(arguments))
    if arguments.json:
        print(json.dumps(_as_json(repetition), indent=2))
    else:
        Console().print(_as_text(repetition, arguments.policy or repetition.headers[-1].policy))
    return 0 if repetition.equal or _is_other(arguments) else EXIT_DIFFERENT


def _is_other(arguments: argparse.Namespace) -> bool:
    """Whether the flags ask for a different policy than the log's."""
    return bool(given(arguments, PolicyOptions)) or arguments.policy is not None or arguments.seed is not None


def _maker(arguments: argparse.Namespace) -> Callable[[LogHeader], Policy]:
    """Return a function that makes the policy of a header, as changed by the flags."""
    from eldr.policies import make_policy

    def make(header: LogHeader) -> Policy:
        return make_policy(
            arguments.policy or header.policy,
            header.options.changed(given(arguments, PolicyOptions)),
            calibration=_calibration(arguments, header),
            seed=header.seed if arguments.seed is None else arguments.seed,
        )

    return make


def _calibration(arguments: argparse.Namespace, header: LogHeader) -> Calibration | None:
    """Load the log's calibration from where it was or where it is now.

    For a different policy, load any that is given.
    """
    from eldr.calibration import load_calibration
    from eldr.replay.errors import ReplayError

    path: Path | None = arguments.calibration
    if path is None and header.calibration is not None:
        path = Path(header.calibration)
    if path is None:
        return None
    if arguments.calibration is None or not _is_other(arguments):
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise ReplayError(f"calibration {path}: {error.strerror}; give its new path with --calibration") from None
        if found != header.calibration_sha256:
            raise ReplayError(f"calibration {path} is not the file that the log was made with: the digests differ")
    return load_calibration(path)


@contextmanager
def _progress(paths: Iterable[Path]) -> Iterator[Callable[[Iterable[Line]], Iterator[Line]]]:
    """Show a progress bar on standard error over the bytes of the log. Yields a function that passes lines through."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("repeating", total=sum(path.stat().st_size for path in paths if path.is_file()))

        def passed(lines: Iterable[Line]) -> Iterator[Line]:
            for line in lines:
                progress.advance(task, len(line.text))
                yield line

        yield passed


def _as_json(repetition: Repetition) -> Mapping[str, Any]:
    return {
        "equal": repetition.equal,
        "decisions": repetition.decisions,
        "differing": repetition.differing,
        "not_repeated": repetition.skipped,
        "gaps": repetition.gaps,
        "cut_off": repetition.cut_off,
        "starts": [header.to_wire() for header in repetition.headers],
        "workers": {
            worker: {"logged": repetition.logged[worker], "chosen": repetition.chosen[worker]}
            for worker in sorted({*repetition.logged, *repetition.chosen})
        },
        "differences": [dataclasses.asdict(difference) for difference in repetition.differences],
    }


def _as_text(repetition: Repetition, policy: str) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from eldr.policies.logged import software

    differing = repetition.differing
    share = 100 * (1 - differing / max(repetition.decisions, 1))
    lines = [f"{repetition.decisions} decisions repeated with {policy}, {differing} differ ({share:.1f} % equal)"]
    lines += [f"gap at {gap}" for gap in repetition.gaps]
    if repetition.skipped:
        lines.append(f"{repetition.skipped} decisions after a gap could not be repeated")
    lines += [f"{where}: incomplete, as a crash leaves it" for where in repetition.cut_off]
    made_by = repetition.headers[0].made_by
    if differing and made_by != software():
        lines.append(f"the log was made by {_named(made_by)}; this is {_named(software())}")
    parts: list[RenderableType] = [Text(line) for line in lines]
    if differing:
        table = Table("where", "request", "logged", "now")
        for each in repetition.differences[:SHOWN]:
            table.add_row(each.where, each.request, each.logged or "(failed)", each.chosen or "(failed)")
        parts.append(table)
        parts += [Text(f"and {differing - SHOWN} more; --json shows more of them")] if differing > SHOWN else []
    return Group(*parts)


def _named(made_by: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in made_by.items())
