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

from eldr.demo.measure import PolicyRun, workers_per_kind
from eldr.demo.result import DemoResult
from eldr.load.outcome import percentile_ms
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

    def __init__(self, console: Console, requests_per_policy: int) -> None:
        self.console = console
        self.steps: list[Step] = []
        self.runs: list[PolicyRun] = []
        self.workers: list[str] = []
        self.requests_per_policy = requests_per_policy
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

    def __rich__(self) -> Group:
        parts: list[RenderableType] = [*self.steps]
        if self.runs:
            parts += ["", self.figures(), self.placements()]
        return Group(*parts)

    def conclude(self, result: DemoResult, output: Path) -> None:
        """Print the verdict and the report's path. If the output is not a terminal, print the tables first."""
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
        for name in ("requests", "errors", "TTFT p50\nms *", "TPOT p50\nms *", "TPOT p99\nms *"):
            table.add_column(name, justify="right")
        for name in ("active\nexperts", "workers\nper kind"):
            table.add_column(name, justify="right", style="bold cyan")
        for run in self.runs:
            spread = workers_per_kind(run.placement(list(KINDS), self.workers))
            table.add_row(
                run.policy,
                f"{len(run.outcomes)}/{self.requests_per_policy}",
                Text(str(run.errors), "bold red" if run.errors else ""),
                _ms(percentile_ms(run.ttft_s, 50)),
                _ms(percentile_ms(run.tpot_s, 50)),
                _ms(percentile_ms(run.tpot_s, 99)),
                _decimal(run.active_experts_mean),
                _decimal(spread),
            )
        table.caption = f"* no evidence of speed: {len(self.workers) + 2} engines share this machine's cores"
        table.caption_justify = "left"
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


def _shade(share: float) -> Style:
    """White text on blue, which gets lighter as the share grows."""
    strength = 0.15 + 0.85 * share
    return Style.parse(f"white on rgb({int(20 + 20 * strength)},{int(30 + 80 * strength)},{int(50 + 170 * strength)})")


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
