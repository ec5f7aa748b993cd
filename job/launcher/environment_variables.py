"""Reading the environment variables of launchers, with errors that name the variable."""

from collections.abc import Iterable, Mapping

from job.errors import UserError


def first_defined(environment: Mapping[str, str], names: Iterable[str]) -> str | None:
    """Return the first of these names whose variable is set and not empty; None if there is none."""
    return next((name for name in names if environment.get(name)), None)


def read_required(environment: Mapping[str, str], name: str, remedy: str = "") -> str:
    """Return the value of an environment variable.

    Raises:
        UserError: the variable is not set, or empty.
    """
    text = environment.get(name)
    if not text:
        raise UserError(name, None, "is not set, although other variables of a launcher are", remedy)
    return text


def read_integer(
    environment: Mapping[str, str],
    name: str,
    minimum: int = 0,
    below: int | None = None,
    below_name: str = "",
    remedy: str = "",
) -> int:
    """Return the integer in an environment variable.

    Args:
        environment: all variables.
        name: the variable to read.
        minimum: smallest allowed value.
        below: the value must be less than this; None: there is no upper limit.
        below_name: variable that contains `below`, for the error message.
        remedy: what the user should do if the value is wrong.

    Raises:
        UserError: the variable is missing, not an integer, or out of range.
    """
    text = read_required(environment, name, remedy)
    if not text.isdecimal():
        raise UserError(name, text, "expected a whole number", remedy)
    value = int(text)
    if value < minimum:
        raise UserError(name, value, f"expected at least {minimum}", remedy)
    if below is not None and value >= below:
        limit = f"{below_name}, which is {below}" if below_name else str(below)
        raise UserError(name, value, f"expected less than {limit}", remedy)
    return value
