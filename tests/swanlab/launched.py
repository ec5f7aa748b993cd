"""Types for the result of a command line of `python -m launch.swanlab`."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class CommandResult:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


Launch = Callable[..., CommandResult]
