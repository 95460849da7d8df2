"""Shows the demo in the terminal, live and at the end: its steps, the policies, and where each kind of prompt went."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.style import Style
from rich.table import Table
from rich.text import Text

from eldr.demo.change import in_words
from eldr.demo.measure import PolicyRun, workers_per_kind
from eldr.demo.result import DemoResult
from eldr.load.outcome import mean_ms, percentile_ms
from eldr.workloads.kinds import KINDS

REFRESH_PER_S = 5


@dataclass(slots=True)
class Step:
    """One step of the demo. total: how many parts it has, or 0 if it is not counted in parts."""

    title: str
    total: int = 0
    done: int = 0
    started_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None
    failed: bool = False

    def advance(self) -> None:
        self.done += 1

    @property
    def seconds(self) -> float:
        return (self.ended_s or time.monotonic()) - self.started_s

    def __rich__(self) -> Table:
        progress = f"{self.done}/{self.total}" if self.total else ""
        mark: RenderableType = Spinner("dots", style="cyan")
        if self.ended_s is not None:
            mark = Text("✗", "bold red") if self.failed else Text("✓", "bold green")
        row = Table.grid(padding=(0, 1))
        row.add_row(mark, self.title, Text(progress, "cyan"), Text(f"{self.seconds:.0f} s", "dim"))
        return row


class View:
    """Collects and shows the state of the demo. A run is added when it starts, and changes while it is shown."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.steps: list[Step | Text] = []
        self.runs: list[PolicyRun] = []
        self.workers: list[str] = []
        self._started_s = time.monotonic()

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Keep the view on screen. If the output is not a terminal, print a line when each step ends."""
        if not self.console.is_terminal:
            yield
            return
        with Live(self, console=self.console, refresh_per_second=REFRESH_PER_S):
            yield

    @contextlib.contextmanager
    def step(self, title: str, total: int = 0) -> Iterator[Step]:
        """Show a step while the block runs."""
        step = Step(title, total)
        self.steps.append(step)
        try:
            yield step
        except BaseException:
            step.failed = True
            raise
        finally:
            step.ended_s = time.monotonic()
            if not self.console.is_terminal:
                self.console.print(f"{'failed' if step.failed else 'done'}: {title} ({step.seconds:.0f} s)")

    def say(self, text: str) -> None:
        """Show a line among the steps."""
        self.steps.append(Text(f"  {text}", "dim"))
        if not self.console.is_terminal:
            self.console.print(text)

    def __rich__(self) -> Group:
        parts: list[RenderableType] = [*self.steps]
        if self.runs:
            parts += ["", self.figures(), self.placements()]
        return Group(*parts)

    def conclude(self, result: DemoResult, output: Path) -> None:
        """Print the result. In a terminal, the tables are on screen already."""
        lines = headline(result) or ["no TPOT was measured"]
        self.console.print("", *lines, step_cost(result), sep="\n", highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.print(self.figures(), self.placements())
        check = result.check
        verdict = Text("PASSED ", "bold green") if result.passed else Text("FAILED ", "bold red")
        verdict.append(
            f"{check.equal} of {check.total} outputs are equal to those of a single plain vLLM worker", "default"
        )
        if check.ties:
            verdict.append(f", {check.ties} more differ only by tied logits", "default")
        self.console.print("", verdict)
        for difference in check.differences[:5]:
            self.console.print(
                f"  {difference.policy}, request {difference.number}: differs at token {difference.position}; "
                f"{difference.reason}"
            )
        for run in self.runs:
            for outcome in [outcome for outcome in run.outcomes if outcome.error is not None][:3]:
                self.console.print(f"  {run.policy}, request {outcome.number}: {outcome.error}", markup=False)
        self.console.print(f"report: {output / 'report.html'} ({time.monotonic() - self._started_s:.0f} s)")

    def figures(self) -> Table:
        """The figures, with a row for each policy."""
        table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
        table.add_column("policy", style="bold", no_wrap=True)
        for name in ("errors", "TTFT\np50 ms", "TPOT\np50 ms", "TPOT\np99 ms", "TPOT\nmean ms"):
            table.add_column(name, justify="right")
        for name in ("active\nexperts", "workers\nper kind"):
            table.add_column(name, justify="right", style="bold cyan")
        for run in self.runs:
            spread = workers_per_kind(run.placement(list(KINDS), self.workers))
            table.add_row(
                run.policy,
                Text(f"{run.errors} of {len(run.outcomes)}", "bold red" if run.errors else ""),
                _ms(percentile_ms(run.ttft_s, 50)),
                _ms(percentile_ms(run.tpot_s, 50)),
                _ms(percentile_ms(run.tpot_s, 99)),
                _ms(mean_ms(run.tpot_s)),
                _decimal(run.active_experts_mean),
                _decimal(spread),
            )
        return table

    def placements(self) -> Columns:
        """How many requests of each kind each decode worker served, for each policy."""
        return Columns([self._placement(run) for run in self.runs], padding=(0, 3))

    def _placement(self, run: PolicyRun) -> Table:
        table = Table(box=None, title=f"{run.policy}: kind → decode worker", title_style="bold", title_justify="left")
        table.add_column("")
        for number in range(len(self.workers)):
            table.add_column(f"D{number}", justify="right", min_width=4)
        kinds = list(KINDS)
        for kind, counts in zip(kinds, run.placement(kinds, self.workers), strict=True):
            share = [count / max(1, sum(counts)) for count in counts]
            cells = [Text(f"{count:>4}", _shade(s)) for count, s in zip(counts, share, strict=True)]
            table.add_row(kind, *cells)
        return table


def headline(result: DemoResult) -> list[str]:
    """A line for each policy: the change of TPOT and of active experts from the first policy to it."""
    first = result.runs[0]
    active = {run.policy: run.active_experts_mean for run in result.runs}
    before = active[first.policy]
    lines = []
    for policy, figures in result.tpot_changes.items():
        changes = ", ".join(f"{name} {in_words(change)}" for name, change in figures.items())
        after = active[policy]
        experts = f"; active experts {100 * (after / before - 1):+.0f} %" if before and after else ""
        lines.append(f"TPOT of {policy} against {first.policy}: {changes}{experts}")
    return lines


def step_cost(result: DemoResult) -> str:
    """What a decode step costs on this machine, and what the intervals are."""
    line = result.step_line
    return (
        f"means and 95 % intervals over {result.measured_rounds} rounds; a decode step on this machine: "
        f"{line.base_ms:.1f} ms + {line.per_expert_ms:.3f} ms x active experts of {line.layers} layers "
        f"+ {line.per_token_ms:.2f} ms x batch, R2 {line.r2:.3f}"
    )


def _shade(share: float) -> Style:
    """White text on blue, which gets lighter as the share grows."""
    strength = 0.15 + 0.85 * share
    return Style.parse(f"white on rgb({int(20 + 20 * strength)},{int(30 + 80 * strength)},{int(50 + 170 * strength)})")


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
