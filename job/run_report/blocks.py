"""The blocks that make up a section of a report. `page` and `markdown` each write them in their own form."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from job.run_report.wording import Both, Text


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: Text


@dataclass(frozen=True)
class Table:
    """Rows of texts; the first of each row is its name."""

    header: Sequence[Text]
    rows: Sequence[Sequence[Text]]


@dataclass(frozen=True)
class Code:
    """Commands or a program, to be copied."""

    text: str


@dataclass(frozen=True)
class Chart:
    """A drawing with its heading, once for each horizontal axis that it has."""

    title: Both
    drawings: dict[str, Markup]
    """The drawing by axis: ``steps``, ``tokens`` and ``hours``, or ``all`` if it has only one."""


@dataclass(frozen=True)
class Cards:
    """Texts side by side under a heading."""

    title: Text
    cards: Sequence[tuple[Text, str]]
    """Label and text of each card."""


Block = Note | Table | Code | Chart | Cards


@dataclass(frozen=True)
class Section:
    """A part of the report with its own heading."""

    name: str
    """Name of the section in links."""
    title: Both
    blocks: Sequence[Block]
