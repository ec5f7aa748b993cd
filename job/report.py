"""What a person watching the run sees: one line a log interval, and on a terminal a bar with rate and time left."""

import math
import sys
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from job.redaction import redacted

_LOG_WIDTH = 400


class _Console(Console):
    """Removes secrets before a text is laid out: one that is broken over two lines would not be found any more."""

    @override
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(redacted(text), **options)


def make_console(width: int | None = None, **options: Any) -> Console:
    """A console for text that a person may have chosen: brackets and colons in it are no markup.

    Nothing is wrapped at `width` where there is no terminal: a log keeps one event on one line.
    """
    return _Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else width, **options)


class Report:
    """Says things once for the whole run: on other ranks than the first it is silent."""

    def __init__(self, rank: int = 0) -> None:
        self._console = make_console(_LOG_WIDTH, quiet=rank != 0, soft_wrap=not sys.stdout.isatty())
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def say(self, line: str) -> None:
        """One line."""
        self._console.print(line)

    def table(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """Names and values."""
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_column()
        table.add_column(justify="right")
        for name, value in rows:
            table.add_row(name, value)
        self._console.print(table)

    def rows(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """Names and values that may be long: a table on a terminal, in a log one line each."""
        if self._console.is_terminal:
            self.table(title, rows)
        else:
            for name, value in rows:
                self.say(f"{title}: {name.strip()}: {value}")

    def start_bar(self, what: str, total: int | None, completed: int = 0, unit: str = "steps") -> None:
        """Begins a progress bar; without a terminal there is none, the lines say it all."""
        if self._console.is_terminal and not self._console.quiet:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}", markup=False),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(what, total=total, completed=completed, rate="")

    def advance(self, completed: int, rate: str = "") -> None:
        """Moves the bar to `completed`; an empty rate leaves the last one standing."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=completed)
            if rate:
                self._progress.update(self._task, rate=rate)

    def end_bar(self) -> None:
        """Takes the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def metrics_line(step: int, total_steps: int, values: dict[str, Any], seconds_left: float) -> str:
    """The line of a log interval; what is not finite is not among the values."""
    parts = [
        f"step {step}/{total_steps}",
        f"loss {values.get('train/loss', math.nan):.4f}",
        f"lr {values['train/learning_rate']:.2e}",
        f"grad norm {values.get('train/gradient_norm', math.inf):.3f}",
        f"{values['speed/tokens_per_second']:,.0f} tokens/s",
        *([f"MFU {values['speed/mfu']:.1%}"] if "speed/mfu" in values else []),
        *([f"skipped {values['train/skipped_steps']}"] if values["train/skipped_steps"] else []),
        f"data wait {values['speed/data_wait']:.1%}",
        *([f"stall {values['speed/stall']:.1%}"] if values["speed/stall"] else []),
        f"memory {values['memory/peak_gib']:.2f} GiB",
        f"seen {values['train/tokens_seen']:,} tokens",
        f"ETA {timedelta(seconds=round(seconds_left))}",
    ]
    return " | ".join(parts)
