"""What a preflight finds, row by row: ✓ right, ! not certain, ✗ wrong, and what to do about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from rich.text import Text

from job import storage
from job.errors import UserError, one_line

RIGHT, UNSURE, WRONG = "✓", "!", "✗"
_COLOURS = {RIGHT: "green", UNSURE: "yellow", WRONG: "bold red"}


@dataclass(frozen=True)
class Finding:
    """One row."""

    mark: str
    name: str
    """What was looked at."""
    found: str
    remedy: str = ""


@dataclass
class Findings:
    """All rows, in the order in which they were found."""

    rows: list[Finding] = field(default_factory=list)

    def right(self, name: str, found: str) -> None:
        """It is as it should be."""
        self._add(RIGHT, name, found, "")

    def unsure(self, name: str, found: str, remedy: str = "") -> None:
        """It may go wrong, or cannot be known from here."""
        self._add(UNSURE, name, found, remedy)

    def wrong(self, name: str, found: str, remedy: str) -> None:
        """It cannot go well."""
        self._add(WRONG, name, found, remedy)

    def judge(self, name: str, is_right: bool, found: str, remedy: str) -> None:
        """✓ or ✗, with the same words."""
        self._add(RIGHT if is_right else WRONG, name, found, "" if is_right else remedy)

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Makes a row of what a person or the store has done wrong inside the block, which ends there."""
        try:
            yield
        except UserError as error:
            shown = f"{error.setting}: {error.value!r}: " if error.value is not None else f"{error.setting}: "
            self.wrong(name, shown + error.expected, error.remedy or "correct it")
        except storage.StoreError as error:
            self.wrong(name, str(error), "see to the store, or wait until it answers")
        except OSError as error:
            self.wrong(name, str(error), "correct the place, or its rights")

    @property
    def are_wrong(self) -> bool:
        """Whether anything is."""
        return any(row.mark == WRONG for row in self.rows)

    def _add(self, mark: str, name: str, found: str, remedy: str) -> None:
        self.rows.append(Finding(mark, name, one_line(found), one_line(remedy)))


def show(console: Console, title: str, rows: list[Finding]) -> None:
    """The rows as a table."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for heading in ("", "check", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(Text(row.mark, _COLOURS[row.mark]), row.name, row.found, row.remedy)
    console.print(table)
