"""Environment variables of launchers, read with an error that names what is wrong."""

from collections.abc import Mapping

from job.errors import UserError


def first_set(environment: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """The first of these variables that is set, to more than nothing; None if none is."""
    return next((name for name in names if environment.get(name)), None)


def number(
    environment: Mapping[str, str],
    name: str,
    least: int = 0,
    below: int | None = None,
    limit: str = "",
    remedy: str = "",
) -> int:
    """The whole number in a variable.

    Raises:
        UserError: it is missing, no whole number, or out of range; it is named.
    """
    text = environment.get(name)
    if not text:
        raise UserError(name, None, "is not set, but other variables of a launcher are", remedy)
    if not text.isdecimal():
        raise UserError(name, text, "expected a whole number", remedy)
    value = int(text)
    if value < least:
        raise UserError(name, value, f"expected at least {least}", remedy)
    if below is not None and value >= below:
        expected = f"expected less than {limit}, which is {below}" if limit else f"expected less than {below}"
        raise UserError(name, value, expected, remedy)
    return value
