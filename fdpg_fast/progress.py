"""What a person sees while a run trains: a live panel in a terminal, plain lines elsewhere.

Both show the same numbers from the same record (a line of metrics.jsonl and one of timing.jsonl),
so what was seen can be looked up afterwards.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
)
from rich.table import Table
from rich.text import Text

__all__ = [
    "MOMENT",
    "PARTS",
    "Display",
    "PlainDisplay",
    "SilentDisplay",
    "TerminalDisplay",
    "acceptance_bar",
    "for_this_terminal",
    "joined",
    "moments_of",
    "one_line",
    "seconds_of",
    "show_evaluation",
    "show_table",
]

Record = Mapping[str, Any]

PARTS = ("sample", "score", "train")  # of a step, whose seconds a line of timing.jsonl has
MOMENT = "moment: "  # before the name of a feature: its mean


class Display(Protocol):
    """What a trainer tells the person who started it."""

    def start(
        self,
        header: Mapping[str, str],
        *,
        steps: int,
        done: int,
        divergence: str,
        goals: Mapping[str, float],
    ) -> None:
        """A run begins, or goes on after ``done`` steps."""

    def note(self, text: str) -> None:
        """One thing worth knowing."""

    def warn(self, text: str) -> None:
        """One thing that is probably wrong."""

    def step(self, record: Record, timing: Record) -> None:
        """One step's numbers."""

    def samples(self, step: int, rows: Sequence[Record]) -> None:
        """Some samples of a step."""

    def stop(self) -> None:
        """The last step is done, or the run is leaving."""

    def finish(self, evaluation: Record | None, files: Mapping[str, Path]) -> None:
        """All is done: what was measured, if anything, and where what was written is."""


class SilentDisplay:
    """Says nothing but warnings."""

    def start(self, header: Mapping[str, str], **run: Any) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)

    def step(self, record: Record, timing: Record) -> None: ...

    def samples(self, step: int, rows: Sequence[Record]) -> None: ...

    def stop(self) -> None: ...

    def finish(self, evaluation: Record | None, files: Mapping[str, Path]) -> None: ...


class PlainDisplay:
    """One line per look: for logs, pipes and machines without a terminal."""

    def __init__(self) -> None:
        self._pace = _Pace(0, 0)
        self._numbers = _Numbers("", {})

    def start(
        self,
        header: Mapping[str, str],
        *,
        steps: int,
        done: int,
        divergence: str,
        goals: Mapping[str, float],
    ) -> None:
        for key, value in header.items():
            print(f"{key:<12} {value}")
        self._pace = _Pace(steps, done)
        self._numbers = _Numbers(divergence, goals)

    def note(self, text: str) -> None:
        print(text, flush=True)

    def warn(self, text: str) -> None:
        print(f"WARNING: {text}", file=sys.stderr, flush=True)

    def step(self, record: Record, timing: Record) -> None:
        self._pace.tick(record["step"])
        numbers = "  ".join(f"{name} {value}" for name, value in self._numbers(record))
        print(
            f"step {record['step']}/{self._pace.steps}  {numbers}  {speed_of(timing)}  "
            f"left {self._pace.left()}",
            flush=True,
        )

    def samples(self, step: int, rows: Sequence[Record]) -> None:
        print(f"samples of step {step}: log a | log P | log pi | weight")
        for row in rows:
            print(
                f"  {_nats(row['log_base']):>8} {_nats(row['log_score']):>8} "
                f"{_nats(row['log_pi']):>8} {row['weight']:>+8.3f}  {_whole(row)}"
            )

    def stop(self) -> None: ...

    def finish(self, evaluation: Record | None, files: Mapping[str, Path]) -> None:
        _finish(Console(), evaluation, files)


class TerminalDisplay:
    """A bar, the numbers under it, and tables of samples that scroll by above."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._pace = _Pace(0, 0)
        self._numbers = _Numbers("", {})
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %  left {task.fields[left]}"),
            console=self.console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=None, left="?")
        self._live: Live | None = None

    def start(
        self,
        header: Mapping[str, str],
        *,
        steps: int,
        done: int,
        divergence: str,
        goals: Mapping[str, float],
    ) -> None:
        grid = Table.grid(padding=(0, 2))
        for key, value in header.items():
            grid.add_row(Text(key, style="dim"), Text(value))
        self.console.print(grid)
        self._pace = _Pace(steps, done)
        self._numbers = _Numbers(divergence, goals)
        self._bar.update(self._task, total=steps, completed=done)
        self._live = Live(self._bar, console=self.console, refresh_per_second=4)
        self._live.start()

    def note(self, text: str) -> None:
        self.console.print(Text(text))

    def warn(self, text: str) -> None:
        self.console.print(Text(f"warning: {text}", style="bold yellow"))

    def step(self, record: Record, timing: Record) -> None:
        self._pace.tick(record["step"])
        self._bar.update(self._task, completed=record["step"], left=self._pace.left())
        if self._live is not None:
            self._live.update(Group(self._bar, self._panel(record, timing)))

    def samples(self, step: int, rows: Sequence[Record]) -> None:
        table = Table(title=f"samples of step {step}", title_justify="left", expand=True)
        table.add_column("sample", ratio=1)
        for name in ("log a", "log P", "log π", "weight"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(
                Text(_whole(row)),
                _nats(row["log_base"]),
                _nats(row["log_score"]),
                _nats(row["log_pi"]),
                f"{row['weight']:+.3f}",
            )
        self.console.print(table)

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def finish(self, evaluation: Record | None, files: Mapping[str, Path]) -> None:
        _finish(self.console, evaluation, files)

    def _panel(self, record: Record, timing: Record) -> RenderableType:
        """The numbers in as many columns as fit, and the speed."""
        cells = [
            Text.assemble((f"{name}  ", "dim"), value) for name, value in self._numbers(record)
        ]
        width = max(cell.cell_len for cell in cells) + 3
        columns = max(1, (self.console.width + 3) // width)
        grid = Table.grid(padding=(0, 3))
        for at in range(0, len(cells), columns):
            grid.add_row(*cells[at : at + columns])
        return Group(grid, Text(speed_of(timing), style="dim"))


def for_this_terminal() -> Display:
    """The live panel where there is a terminal, plain lines where there is none."""
    console = Console()
    return TerminalDisplay(console) if console.is_terminal else PlainDisplay()


def _finish(console: Console, evaluation: Record | None, files: Mapping[str, Path]) -> None:
    if evaluation is not None:
        show_evaluation(console, evaluation)
    for name, path in files.items():  # whole, however long: a person may copy it
        print(f"{name:<8}{path}", file=console.file)


def acceptance_bar(console: Console, wanted: int, proposals: Callable[[], int]) -> Progress:
    """A bar that advances with what is accepted, and counts proposals in between.

    Nothing is shown where there is no terminal. Text printed meanwhile scrolls by above.
    """

    class Proposals(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"of {proposals()} proposals")

    bar = Progress(
        TextColumn("accepted"),
        MofNCompleteColumn(),
        BarColumn(),
        Proposals(),
        console=console,
        redirect_stdout=sys.stdout.isatty(),
        disable=not console.is_terminal,
        transient=True,
    )
    bar.add_task("", total=wanted)
    return bar


def show_evaluation(console: Console, evaluation: Record) -> None:
    """The table of before and after, and three samples of each."""
    from fdpg_fast.report import evaluation_table  # whose texts are joined by this module

    header = ("", "base", "tuned", "goal")
    title = f"{evaluation['samples']} fresh samples"
    show_table(console, title, header, evaluation_table(evaluation))
    for name in ("base", "tuned"):
        console.print(Text(f"{name}:", style="bold"))
        for prompt, text in list(
            zip(evaluation["texts"]["prompt"], evaluation["texts"][name], strict=True)
        )[:3]:
            whole, start = joined(prompt, text), len(prompt)
            console.print(Text.assemble("  ", (whole[:start], "dim"), one_line(whole[start:])))


def show_table(
    console: Console, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """A table of texts, the first column to the left and numbers to the right."""
    # Without lines between columns, so that five of value ± error go into 80 characters.
    table = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    first, *others = zip(header, *rows, strict=True)
    table.add_column(first[0])
    for column in others:  # a number in two lines is none
        least = max(map(cell_len, column))
        table.add_column(column[0], justify="right", min_width=least, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    needed = Measurement.get(console, console.options.update(max_width=10_000), table)
    width = max(console.width, needed.minimum if console.is_terminal else needed.maximum)
    Console(file=console.file, width=width).print(table)


def speed_of(timing: Record) -> str:
    """Samples per second, and where the time went."""
    total = seconds_of(timing)
    shares = " ".join(f"{part} {timing[part] / total:.0%}" for part in PARTS)
    return f"{timing['samples'] / total:.1f} samples/s ({shares})"


def seconds_of(timing: Record) -> float:
    """What a step took."""
    return float(sum(timing[part] for part in PARTS))


def moments_of(record: Record) -> list[str]:
    """The features whose means are in a record."""
    return [key.removeprefix(MOMENT) for key in record if key.startswith(MOMENT)]


def plus_minus(record: Record, value: str, error: str) -> str:
    """``0.312±0.021``, or what can be said of it."""
    centre, spread = record.get(value), record.get(error)
    if centre is None or not _finite(centre):
        return _not_finite(centre)
    centre = round(centre, 3) + 0.0  # no minus before a zero
    return f"{centre:.3f}±{spread:.3f}" if _finite(spread) else f"{centre:.3f}"


def one_line(text: str, limit: int = 240) -> str:
    """A sample on one line."""
    flat = re.sub(r"\s+", " ", text)
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def joined(prompt: str, text: str) -> str:
    """A prompt and its sample as one text; some tokenizers swallow the space between them."""
    apart = text[:1].isalnum() and not prompt[-1:].isspace()
    return f"{prompt} {text}" if prompt and apart else prompt + text


def _whole(row: Record) -> str:
    """A sample on one line, behind its prompt, or the end of that."""
    prompt = one_line(row["prompt"][-60:])
    return joined(prompt, one_line(row["text"]))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _not_finite(value: Any) -> str:
    return "n/a" if value is None or math.isnan(value) else str(value)


def _number(value: Any, spec: str) -> str:
    if not _finite(value):
        return _not_finite(value)
    return re.sub(r"^-(0\.0+)$", r"\1", format(value, spec))


def _nats(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "-∞" if value < 0 else "?"


class _Numbers:
    """The numbers of a step that say how the run is going, named and rounded."""

    def __init__(self, divergence: str, goals: Mapping[str, float]) -> None:
        self._divergence, self._goals = divergence, goals

    def __call__(self, record: Record) -> list[tuple[str, str]]:
        shown = [(self._divergence, plus_minus(record, "divergence", "divergence_se"))]
        for name in moments_of(record):
            goal = f" (goal {self._goals[name]:.3g})" if name in self._goals else ""
            shown.append((name, plus_minus(record, MOMENT + name, f"moment_se: {name}") + goal))
        expected = record["kl_target_base"]
        goal = f" (target {expected:.2f})" if _finite(expected) else ""
        shown.append(("KL to base", _number(record["kl_to_base"], ".2f") + goal))
        shown.append(("entropy/token", _number(record["entropy_per_token"], ".2f")))
        shown.append(("ESS", _number(record["target_ess"], ".0f")))
        shown.append(("log Z", _number(record["log_z"], ".2f")))
        shown.append(("gap", _number(record["gap_mean"], ".0e")))
        if record["n_skipped"]:
            shown.append(("skipped", f"{record['n_skipped']:.0f} samples with Z = 0"))
        return shown


class _Pace:
    """Time left, from the pace of the last steps."""

    def __init__(self, steps: int, done: int) -> None:
        self.steps = steps
        self._ticks = deque([(time.monotonic(), done)], maxlen=20)

    def tick(self, step: int) -> None:
        self._ticks.append((time.monotonic(), step))

    def left(self) -> str:
        (t0, s0), (t1, s1) = self._ticks[0], self._ticks[-1]
        if s1 <= s0:
            return "?"
        seconds = round((t1 - t0) / (s1 - s0) * (self.steps - s1))
        hours, rest = divmod(seconds, 3600)
        minutes, seconds = divmod(rest, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
