"""Prints a command's lines, tables, samples and progress bar."""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from job.errors import one_line
from job.redaction import redacted
from job.step_line import COLUMNS

_LOG_WIDTH = 400
_SAMPLE_INDENT = 4


class _Console(Console):
    """A console that removes secrets before it breaks lines: a secret broken over two lines would not be recognized."""

    @override
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(redacted(text), **options)


def make_console(width: int | None = None, **options: Any) -> Console:
    """Return a console that prints text as it is: brackets and colons in it are not markup.

    `width` is used only without a terminal: a large one keeps each event of a log on one line.
    """
    return _Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else width, **options)


class Report:
    """Output of the whole run: only rank 0 prints."""

    def __init__(self, rank: int = 0) -> None:
        self._console = make_console(_LOG_WIDTH, quiet=rank != 0, soft_wrap=not sys.stdout.isatty())
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    @property
    def columns(self) -> int:
        """Columns of a terminal that is wider than usual; otherwise the usual 80, also for a log."""
        return max(COLUMNS, self._console.width) if self._console.is_terminal else COLUMNS

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(line)

    def sample(self, prompt: str, text: str) -> None:
        """Print a prompt and the text that a model made of it.

        On a terminal the prompt is bold and the text stands below it, indented, in lines that fit. In a log both are
        one line.
        """
        if self._console.is_terminal:
            heading, body = Text(redacted(prompt), style="bold"), Text(redacted(text))
            self._console.print(Group(heading, Padding(body, (0, 0, 0, _SAMPLE_INDENT))))
        else:
            self.say(f"    {one_line(prompt)} → {one_line(text)}")

    def table(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """Print names and values as a table."""
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_column()
        table.add_column(justify="right")
        for name, value in rows:
            table.add_row(name, value)
        self._console.print(table)

    def rows(self, title: str, rows: Iterable[tuple[str, str]]) -> None:
        """Print names and values, which may be long: as a table on a terminal, as one line each in a log."""
        if self._console.is_terminal:
            self.table(title, rows)
        else:
            for name, value in rows:
                self.say(f"{title}: {name.strip()}: {value}")

    def start_bar(self, what: str, total: int | None, completed: int = 0) -> None:
        """Show a progress bar on a terminal; do nothing without a terminal."""
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

    @property
    def shows_bar(self) -> bool:
        """True while there is a progress bar."""
        return self._progress is not None

    def advance(self, completed: int, rate: str = "") -> None:
        """Move the bar to `completed`. An empty `rate` keeps the last one."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=completed)
            if rate:
                self._progress.update(self._task, rate=rate)

    def end_bar(self) -> None:
        """Remove the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
