"""A report as Markdown, in one language: for the model card, and to be read where no browser is."""

import re
from collections.abc import Iterator, Sequence

from job.redaction import redacted
from job.run_report.blocks import Block, Cards, Chart, Code, Note, Section, Table
from job.run_report.wording import Both, Language, Text, in_language

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~$!&])")
"""Characters that Markdown, or HTML inside it, may give a meaning."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


def to_markdown(title: Both, about: Both, sections: Sequence[Section], language: Language, level: int = 1) -> str:
    """Return the report without its charts and without secrets.

    Args:
        title: the first heading.
        about: the line below it.
        sections: what the report says.
        language: the language of its texts.
        level: level of the first heading; 2 inside another document.
    """
    lines = [f"{'#' * level} {_escaped(title, language)}", "", _escaped(about, language), ""]
    for section in sections:
        written = [line for block in section.blocks for line in _lines(block, language)]
        if written:
            lines += [f"{'#' * (level + 1)} {_escaped(section.title, language)}", "", *written]
    return "\n".join(lines)


def _lines(block: Block, language: Language) -> Iterator[str]:
    match block:
        case Note(text):
            yield from (_escaped(text, language), "")
        case Code(text):
            yield from ("```bash", redacted(text).replace("```", "'''"), "```", "")
        case Cards(title, cards):
            yield from (f"**{_escaped(title, language)}**", "")
            yield from _table(["", ""], cards, language)
        case Table(header, rows) if rows:
            yield from _table(header or [""] * len(rows[0]), rows, language)
        case Chart():
            pass  # The page has the charts.


def _table(header: Sequence[Text], rows: Sequence[Sequence[Text]], language: Language) -> Iterator[str]:
    yield f"| {' | '.join(_escaped(cell, language) for cell in header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(_escaped(cell, language) for cell in row)} |"
    yield ""


def _escaped(text: Text, language: Language) -> str:
    plain = _CONTROL.sub(" ", redacted(in_language(text, language))).strip()  # An escaped secret is not recognized.
    return _SPECIAL.sub(r"\\\1", plain)
