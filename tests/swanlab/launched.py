"""What a command line of `python -m launch.swanlab` has come to."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Said:
    """What a command has come to."""

    code: int
    out: str
    err: str


Launch = Callable[..., Said]
