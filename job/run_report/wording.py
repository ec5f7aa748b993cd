"""Texts of a report in English and Chinese, and the form of its numbers."""

from datetime import UTC, datetime
from typing import Literal, NamedTuple

Language = Literal["en", "zh"]
NO_VALUE = "–"
"""Shown in place of a value that is not known."""


class Both(NamedTuple):
    """The same fact in both languages."""

    en: str
    zh: str


Text = str | Both
"""A text; a plain one, such as a number or a name, is the same in both languages."""


def same(text: str) -> Both:
    """Return a text that is the same in both languages."""
    return Both(text, text)


def phrase(en: str, zh: str, **texts: Text) -> Both:
    """Return a sentence in both languages, with each name in braces replaced by the text of that name."""
    return Both(
        en.format(**{name: in_language(text, "en") for name, text in texts.items()}),
        zh.format(**{name: in_language(text, "zh") for name, text in texts.items()}),
    )


def in_language(text: Text, language: Language) -> str:
    """Return `text` in one language."""
    return getattr(text, language) if isinstance(text, Both) else text


def count(value: float | None) -> str:
    """Return a whole number with its thousands set apart; a dash if it is not known."""
    return NO_VALUE if value is None else f"{value:,.0f}"


def decimal(value: float | None, digits: int = 4) -> str:
    """Return a number with so many digits after the point; a dash if it is not known."""
    return NO_VALUE if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """Return a fraction as a percentage; a dash if it is not known."""
    return NO_VALUE if value is None else f"{value:.1%}"


def duration(seconds: float | None) -> Text:
    """Return a length of time in hours, minutes or seconds; a dash if it is not known."""
    if seconds is None:
        return NO_VALUE
    if seconds >= 3600:
        return Both(f"{seconds / 3600:.2f} h", f"{seconds / 3600:.2f} 小时")
    if seconds >= 60:
        return Both(f"{seconds / 60:.1f} min", f"{seconds / 60:.1f} 分钟")
    return Both(f"{seconds:.0f} s", f"{seconds:.0f} 秒")


def moment(at: float | None) -> str:
    """Return a time, given in seconds since 1970, in UTC; a dash if it is not known."""
    return NO_VALUE if at is None else f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}Z"
