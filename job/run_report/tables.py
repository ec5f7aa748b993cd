"""Small parts that several sections of a report use."""

from collections.abc import Sequence
from typing import TypeVar

from job.run_report.blocks import Note, Table
from job.run_report.run_facts import RunFacts
from job.run_report.wording import NO_VALUE, Text, count, phrase

Value = TypeVar("Value")


def by_run(names: Sequence[str], rows: Sequence[tuple[Text, list[Text]]]) -> Table:
    """Return a table with a column for each run, without the rows in which no run has a value."""
    shown_rows = [[label, *values] for label, values in rows if any(value != NO_VALUE for value in values)]
    return Table(["", *names] if len(names) > 1 else [], shown_rows)


def heading(runs: Sequence[RunFacts], name: str) -> list[Note]:
    """Return the name of a run as a paragraph, if there are several runs."""
    return [Note(name)] if len(runs) > 1 else []


def spread(values: Sequence[Value], most: int) -> list[Value]:
    """Return at most so many of the values, evenly spread, with the first and the last."""
    if len(values) <= most:
        return list(values)
    if most == 1:
        return [values[-1]]
    return [values[round(index * (len(values) - 1) / (most - 1))] for index in range(most)]


def ends(values: Sequence[Value], most: int) -> list[Value]:
    """Return at most so many of the values, an even number: the first half of them and the last half."""
    return list(values) if len(values) <= most else [*values[: most // 2], *values[-most // 2 :]]


def note_of_ends(english: str, chinese: str, number: int, most: int) -> list[Note]:
    """Return a paragraph that says how many of the values `ends` leaves out; none if it leaves out nothing.

    Args:
        english: the sentence, with {all} and {hidden} for the number of all values and of those left out.
        chinese: the same in Chinese.
        number: how many values there are.
        most: as in `ends`.
    """
    if number <= most:
        return []
    return [Note(phrase(english, chinese, all=count(number), hidden=count(number - most)))]


def cut(text: str, most: int) -> str:
    """Return at most so many characters of a text, with an ellipsis if there were more."""
    return text if len(text) <= most else f"{text[:most]}…"
