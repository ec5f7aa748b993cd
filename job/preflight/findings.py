"""Rows that `job check` prints: ✓ right, ! not certain, ✗ wrong, each with what was found and what to do."""

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
    """One row of the table."""

    mark: str
    """`RIGHT`, `UNSURE` or `WRONG`."""
    name: str
    """Name of the check."""
    found: str
    """What the check found."""
    remedy: str = ""
    """What to do about it; empty if nothing has to be done."""


@dataclass
class Findings:
    """All rows, in the order in which the checks added them."""

    rows: list[Finding] = field(default_factory=list)

    def right(self, name: str, found: str) -> None:
        """Add a row for something that is as it should be."""
        self._add(RIGHT, name, found, "")

    def unsure(self, name: str, found: str, remedy: str = "") -> None:
        """Add a row for something that may go wrong, or that cannot be checked from here."""
        self._add(UNSURE, name, found, remedy)

    def wrong(self, name: str, found: str, remedy: str) -> None:
        """Add a row for something that makes the run fail."""
        self._add(WRONG, name, found, remedy)

    def judge(self, name: str, is_right: bool, found: str, remedy: str) -> None:
        """Add a row that is right or wrong; the remedy is shown only if it is wrong."""
        self._add(RIGHT if is_right else WRONG, name, found, "" if is_right else remedy)

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """End the block at a UserError or an error of store or disk, and add a row `name` that says what is wrong."""
        try:
            yield
        except UserError as error:
            shown = f"{error.setting}: {error.value!r}: " if error.value is not None else f"{error.setting}: "
            self.wrong(name, shown + error.expected, error.remedy or "correct this setting")
        except storage.StoreError as error:
            self.wrong(name, str(error), "check that the store is running, or try again later")
        except OSError as error:
            self.wrong(name, str(error), "correct the path or its permissions")

    @property
    def any_wrong(self) -> bool:
        """True if at least one row is wrong."""
        return any(row.mark == WRONG for row in self.rows)

    def _add(self, mark: str, name: str, found: str, remedy: str) -> None:
        self.rows.append(Finding(mark, name, one_line(found), one_line(remedy)))


def show(console: Console, title: str, rows: list[Finding]) -> None:
    """Print the rows as a table."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for heading in ("", "check", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(Text(row.mark, _COLOURS[row.mark]), row.name, row.found, row.remedy)
    console.print(table)
